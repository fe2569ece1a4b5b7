"""The settings of a run: what is trained, pruned and measured, on which data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from .._config import Config
from ..data import SETS, Augment
from ..gan import GANConfig, GANPruner
from ..pruning.granularity import NM, make_granularity
from ..pruning.plan import Plan
from ..pruning.schedules import CubicSchedule, Schedule
from ..training import DistillConfig, DistillPruner
from ..training.config import METHODS as TRAINING_METHODS

__all__ = ["METHODS", "RunConfig", "check_dense_epochs", "check_layout", "check_rounding", "final_density",
           "method_config", "method_name", "override", "pruner_of", "read_settings", "schedule"]  # fmt: skip

#: What a run can be asked to prune by: where learned scores come from, or learned scores with the adversary.
METHODS = (*TRAINING_METHODS, "gan")
DATA_CHECKS = ("report", "stop", "off")
LAYOUTS = ("auto", "csr", "bsr", "nm", "dense")
DENSITY = 0.1
SEEDS = 2**32
_FILES = {"train": None, "valid": None, "test": None, "labels": None}


@dataclass(frozen=True)
class RunConfig(Config):
    """One run. pruning: how; a GANConfig brings in the adversary. data: a built-in set, a folder with three splits
    (:func:`~sparseprune.data.load_folder`), or None with the three files given. model: None for the built-in encoder,
    else a transformers hub name or folder. teacher: the same name or folder once more, where it is a fine-tuned
    classifier, which saves the dense training.

    dense_epochs, dense_lr, batch_size: the dense fine-tuning. drop, swap, mask: token augmentation. layout: "auto",
    "csr", "bsr", "nm", or "dense" to leave the Linears alone. latency_batch: examples in the batch that is timed.
    prune_layers: shell patterns of the names of the Linears to prune; none: all but the head. train_limit and
    other_limit (>= 1) cut the splits, for trials. labels: a file of label names, one a line, that the numbers in the
    three files count from 0; None: the distinct labels of the training file. data_check: "report" says what is wrong
    with the data (duplicates, conflicting labels, empty or cut texts, leakage between splits), "stop" also refuses to
    run on it, "off" does not look. robustness: test examples on which both models are judged with typos, missing words
    and long texts; 0 leaves it out. min_dense_steps: so many steps at least, by reading a small set more often.
    rounding_tolerance (>= 0): the share by which rounding, where ``pruning`` has it, may raise the validation loss
    before the layers that cost most stay in float32.
    """

    VERSION: ClassVar[int] = 2

    pruning: DistillConfig = field(default_factory=DistillConfig)
    data: str | None = "clinc10"
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    model: str | None = None
    teacher: str | None = None
    hidden: int = 256
    ffn: int = 1024
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    max_length: int | None = None
    batch_size: int = 64
    dense_epochs: int = 4
    dense_lr: float = 1e-3
    drop: float = 0.05
    swap: float = 0.0
    mask: float = 0.05
    layout: str = "auto"
    latency_batch: int = 64
    prune_layers: tuple[str, ...] = ()
    train_limit: int | None = None
    other_limit: int | None = None
    seed: int = 0
    labels: str | None = None
    data_check: str = "report"
    robustness: int = 1000
    min_dense_steps: int = 0
    rounding_tolerance: float = 0.01

    def __post_init__(self) -> None:
        files = (self.train, self.valid, self.test)
        if self.data is None and None in files:
            raise ValueError(
                "RunConfig: without data all of train, valid and test expected, each a TSV, JSONL or CoNLL file"
            )
        if self.data is not None and self.data not in SETS and not Path(self.data).expanduser().is_dir():
            raise ValueError(
                f"RunConfig: data expected one of {', '.join(SETS)} or a folder with train, validation and test, got "
                f"{self.data!r}; or give three files"
            )
        if self.data is not None and files != (None, None, None):
            raise ValueError("RunConfig: either data or the files train, valid and test, got both")
        if self.data in SETS and self.labels is not None:
            raise ValueError("RunConfig: labels go with the files train, valid and test, got data and labels")
        for name in ("robustness", "min_dense_steps", "rounding_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"RunConfig: {name} expected >= 0, got {getattr(self, name)!r}")
        if self.data_check not in DATA_CHECKS:
            raise ValueError(
                f"RunConfig: data_check expected one of {', '.join(DATA_CHECKS)}, got {self.data_check!r}"
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"RunConfig: layout expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        for name in ("hidden", "ffn", "layers", "heads", "batch_size", "latency_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig: {name} expected >= 1, got {getattr(self, name)!r}")
        for name in ("max_length", "train_limit", "other_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"RunConfig: {name} expected >= 1, or None for no limit, got {value!r}")
        if not (self.dense_epochs >= 0 and self.dense_lr > 0 and math.isfinite(self.dense_lr)):
            raise ValueError(
                f"RunConfig: dense_epochs >= 0 and dense_lr > 0 expected, got {self.dense_epochs!r}, {self.dense_lr!r}"
            )
        if self.hidden % self.heads:
            raise ValueError(f"RunConfig: heads ({self.heads}) must divide hidden ({self.hidden})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"RunConfig: dropout expected in [0, 1), got {self.dropout!r}")
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"RunConfig: seed expected from 0 to {SEEDS - 1}, got {self.seed!r}")
        Augment(self.drop, self.swap, self.mask)


def method_config(method: str, base: DistillConfig | None = None, **settings: Any) -> DistillConfig:
    """A configuration of this method (one of ``METHODS``) with these settings, and with those of ``base`` besides."""
    if method not in METHODS:
        raise ValueError(f"method expected one of {', '.join(METHODS)}, got {method!r}")
    kind = GANConfig if method == "gan" else DistillConfig
    kept = {} if base is None else {f.name: getattr(base, f.name) for f in fields(kind) if hasattr(base, f.name)}
    return kind(**{**kept, "method": "scores" if method == "gan" else method, **settings})


def method_name(config: DistillConfig) -> str:
    """The entry of ``METHODS``."""
    return "gan" if config.adversarial else config.method


def pruner_of(config: DistillConfig) -> type[DistillPruner]:
    """The trainer that takes this configuration."""
    return GANPruner if config.adversarial else DistillPruner


def schedule(density: float | None, granularity: Any) -> Schedule:
    """The trainer's own schedule ending at this density; None: at what the N:M ``granularity`` keeps, else at 0.1.

    ValueError unless the density is in (0, 1], and where N:M keeps another.
    """
    return CubicSchedule(final_density(density, granularity))


def final_density(density: float | None, granularity: Any, default: float = DENSITY) -> float:
    """``density``; None: what the N:M ``granularity`` keeps, else the default. Errors as :func:`schedule` has them."""
    fixed = _fixed(granularity)
    if density is None:
        density = default if fixed is None else fixed
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density expected in (0, 1], the share of the weights kept, got {density!r}")
    if fixed is not None and not math.isclose(density, fixed, abs_tol=1e-9):
        raise ValueError(
            f"density {density:g}: granularity {granularity!r} keeps {fixed:g} of the weights; leave the density out"
        )
    return density


def _fixed(granularity: Any) -> float | None:
    """The density that the granularity fixes; None where it fixes none."""
    sparsity = None if isinstance(granularity, dict) else make_granularity(granularity).fixed_sparsity
    return None if sparsity is None else 1 - sparsity


def read_settings(path: Path) -> RunConfig:
    """The settings that a run wrote as settings.json. ValueError, with the file's name, on anything else."""
    if path.is_dir():
        path = path / "settings.json"
    try:
        return RunConfig.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; expected the settings.json of a run") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from None


def override(config: RunConfig, given: Mapping[str, Any]) -> tuple[RunConfig, list[str]]:
    """``config`` with the settings of the command line in ``given`` (by the option's name) in place of its own, and a
    line for each that differs.

    An lr is that of the dense training and of the pruning, a seed that of everything; N:M fixes the density; epochs
    that are given are not raised to a number of steps.
    """
    pruning, changes = config.pruning, dict[str, Any]()
    for name, value in given.items():
        if name == "method":
            pruning = method_config(value, pruning)
        elif name == "epochs":
            pruning = replace(pruning, epochs=value, min_steps=0)
        elif name == "dense_epochs":
            changes |= {"dense_epochs": value, "min_dense_steps": 0}
        elif name in ("compensation", "max_seconds", "granularity", "value_dtype", "activations", "autocast"):
            pruning = replace(pruning, **{name: value})
        elif name == "lr":
            pruning, changes["dense_lr"] = replace(pruning, lr=value), value
        elif name == "seed":
            pruning, changes["seed"] = replace(pruning, seed=value), value
        elif name == "layers":
            changes["prune_layers"] = tuple(value)
        elif name == "model":
            changes["model"] = None if value == "encoder" else value
        elif name == "teacher":
            changes = {"model": value, **changes, "teacher": value}
        elif name != "density":
            changes[name] = value
    if "density" in given or _fixed(pruning.granularity) is not None:
        final = schedule(given.get("density"), pruning.granularity)
        pruning = replace(pruning, density=None, schedule=final)
    if changes.keys() & _FILES.keys():
        changes.setdefault("data", None)
    elif "data" in changes:
        changes |= _FILES
    changed = replace(config, pruning=pruning, **changes)
    check_dense_epochs(given.get("dense_epochs"), changed.teacher)
    if given.keys() & {"layout", "value_dtype", "activations"}:
        check_rounding(changed.layout, changed.pruning)
    return changed, differences(config, changed)


def check_dense_epochs(epochs: int | None, teacher: str | None) -> None:
    """ValueError where epochs of dense training are asked for that a teacher saves."""
    if epochs and teacher is not None:
        raise ValueError(
            f"dense_epochs: expected none with the teacher {teacher}, which is fine-tuned already, got {epochs}; leave "
            "one of the two out"
        )


def check_rounding(layout: str, pruning: DistillConfig) -> None:
    """ValueError where rounding is asked for that no kernel of the layout does."""
    if layout == "dense" and pruning.rounds:
        got = f"value_dtype {pruning.value_dtype!r}, activations {pruning.activations!r}"
        raise ValueError(
            f"layout 'dense' leaves Linears in float32, expected no rounding, got {got}; leave these out, or take "
            "another layout"
        )


def check_layout(layout: str, plan: Plan) -> None:
    """ValueError where the layout cannot hold what the granularity leaves."""
    others = [part.granularity for part in plan.parts if not isinstance(part.granularity, NM)]
    if layout == "nm" and others:
        raise ValueError(f"layout 'nm' expected a granularity N:M such as 2:4, got {others[0]!r}; take layout 'auto'")


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """``name: old -> new`` for each setting that differs, those of the pruning as ``pruning.name``."""
    before, after = _flat(old.to_dict()), _flat(new.to_dict())
    return [f"{key}: {_short(before.get(key))} -> {_short(value)}" for key, value in after.items()
            if before.get(key) != value]  # fmt: skip


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    inner = settings["pruning"]
    return {**{k: v for k, v in settings.items() if k != "pruning"}, **{f"pruning.{k}": v for k, v in inner.items()}}


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
