"""What a run has won: both models on the three splits, in bytes and in time, as a record, a table and pictures."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..bench import describe, interleave
from ..nn import SparsifyReport
from ..pruning.batches import device_of, logits_of
from ..pruning.granularity import Heads, Neurons
from ..pruning.masks import MaskSet
from ..structured import shrink_
from ..training import evaluate
from .config import RunConfig
from .devices import describe_device
from .display import Display, kept_in_words
from .rounding import choose_exact, forms_table, make_sparse, other_forms
from .sources import Source

__all__ = ["check_record", "layouts_of", "measure", "plot", "summary"]


def measure(
    config: RunConfig, setup: Source, dense: nn.Module, model: nn.Module, masks: MaskSet, folder: Path, display: Display
) -> dict[str, Any]:
    """Both models on the three splits, in bytes and in time; ``model`` becomes sparse where that pays."""
    from .. import checkpoint

    names = {"train": "train_plain", "valid": "valid", "test": "test"}
    display.say("measuring: three splits, bytes, latency")
    layers = {fqn: masks.kept_of(fqn) / max(1, math.prod(masks.shape(fqn))) for fqn in masks}
    # A layer with a low-rank term is sparse already, and holds what it kept as it is.
    linears = [m for m in (model.get_submodule(fqn) for fqn in masks) if isinstance(m, nn.Linear)]
    ranks = {fqn: len(m.low_rank_a) for fqn, m in model.named_modules() if getattr(m, "low_rank_a", None) is not None}
    factors = sum(rank * sum(masks.shape(fqn)) for fqn, rank in ranks.items())
    dense_parameters = sum(p.numel() for p in dense.parameters())
    checkpoint.save(dense, folder / "dense.safetensors")
    dense_bytes = (folder / "dense.safetensors").stat().st_size
    (folder / "dense.safetensors").unlink()
    tokens, device = setup.latency["input_ids"].numel(), device_of(model)
    masked = copy.deepcopy(model)
    if _shrinks(config.pruning.granularity):
        display.say(str(shrink_(model)))
    # Counted once units are cut, whose biases go with them.
    pruned_weights = {id(m.weight) for m in map(model.get_submodule, masks) if isinstance(m, nn.Linear)}
    pruned_parameters = sum(
        int(torch.count_nonzero(p)) if id(p) in pruned_weights else p.numel() for p in model.parameters()
    )
    for trained in (dense, masked, model):
        trained.requires_grad_(False)  # a frozen weight is not compared with what was packed at every call
    rounding = choose_exact(config, setup, model, masks, display)
    forms = other_forms(config, dense, model, masks, tokens)
    report = make_sparse(config, model, masks, tokens, rounding) if linears else None
    checkpoint.save(model, folder / "pruned.safetensors", "inference")
    setup.save_parts(folder)
    dense.eval()
    model.eval()
    masked.eval()

    def call(which: nn.Module) -> Callable[[], object]:
        return lambda: which(**setup.latency)

    with torch.inference_mode():
        timing = interleave(
            {"dense": call(dense), "masked": call(masked), "pruned": call(model)}
            | {name: call(form) for name, form in forms.items()},
            rounds=15, min_time=0.05, device=device,
        )  # fmt: skip
        drift = float((logits_of(model(**setup.latency)) - logits_of(masked(**setup.latency))).abs().max())
    figures: dict[str, dict[str, Any]] = {}
    for which, network in (("dense", dense), ("pruned", model)):
        figures[which] = {split: evaluate(network, setup.loaders[loader]) for split, loader in names.items()}
        figures[which]["latency_ms"] = timing.time(which).median * 1e3
    for name, form in forms.items():
        figures[name] = {split: evaluate(form, setup.loaders[split]) for split in ("valid", "test")}
        figures[name]["latency_ms"] = timing.time(name).median * 1e3
    figures["dense"] |= {"bytes": dense_bytes, "parameters": dense_parameters}
    size = (folder / "pruned.safetensors").stat().st_size
    figures["pruned"] |= {"bytes": size, "parameters": pruned_parameters}
    ratio = timing.ratio("pruned", "dense")
    return {
        "name": folder.name,
        "seed": config.seed,
        "config": config.to_dict(),
        "versions": {"sparseprune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": describe(),
        "cpu": describe()["cpu"],
        "device": describe_device(device),
        "model": setup.source,
        "data": setup.data.name,
        "labels": len(setup.data.label_names),
        "data_hash": setup.data.digest(),
        "mask_hash": masks.mask_hash(),
        "density": (masks.kept + factors) / masks.total,
        "prunable_parameters": masks.total,
        "layers": layers,
        "ranks": ranks,
        "layouts": None if report is None else report.to_dict(),
        "latency_batch": list(setup.latency["input_ids"].shape),
        "latency_spread_ms": {n: [1e3 * timing.time(n).low, 1e3 * timing.time(n).high] for n in timing.samples},
        "masked_latency_ms": timing.time("masked").median * 1e3,
        "sparse_against_masked": drift,
        "dense": figures["dense"],
        "pruned": figures["pruned"],
        "speedup": ratio.median,
        "speedup_spread": [ratio.low, ratio.high],
        "accuracy_kept": _kept(figures),
        "rounding": None if rounding is None else rounding.to_dict(),
        "forms": {name: figures[name] for name in forms},
    }  # fmt: skip


def _shrinks(granularity: Any) -> bool:
    """Whether whole heads or neurons go, so that the matrices can be cut."""
    specs = granularity.values() if isinstance(granularity, dict) else [granularity]
    parts = [part for spec in specs for part in (getattr(spec, "first", spec),)]
    return any(part in ("heads", "neurons") or isinstance(part, Heads | Neurons) for part in parts)


def plot(folder: Path, history: dict[str, Any], record: dict[str, Any], say: Callable[[str], None]) -> list[str]:
    """Draws curves.png, layers.png and tradeoff.png; returns their names, none where matplotlib is absent."""
    try:
        from .plots import draw
    except ImportError as error:
        say(f"no plots: they need matplotlib ({error}); pip install 'sparseprune[plot]'")
        return []
    return draw(folder, history, record)


_FIGURES: dict[str, Any] = {
    **{split: {"loss": float, "accuracy": float} for split in ("train", "valid", "test")},
    "latency_ms": float, "bytes": int, "parameters": int,
}  # fmt: skip
_RECORD: dict[str, Any] = {
    "dense": _FIGURES, "pruned": _FIGURES, "latency_batch": list, "speedup": float, "density": float,
    "prunable_parameters": int, "accuracy_kept": (float, int, type(None)),
    "machine": {"cpu": str, "threads": int, "load_1min": (float, int, type(None)), "torch": str},
}  # fmt: skip


def _kept(figures: dict[str, dict[str, Any]]) -> float | None:
    """The share of the dense model's test accuracy; None where that model has none right."""
    dense, pruned = (figures[which]["test"]["accuracy"] for which in ("dense", "pruned"))
    return pruned / dense if dense else None


def check_record(record: Any, source: str) -> dict[str, Any]:
    """``record`` where it has all that :func:`summary` shows; ValueError, naming ``source``, where it has not."""

    wrong = "expected the run.json of a run, got another record: "

    def check(value: Any, wanted: Any, path: str) -> None:
        if isinstance(wanted, dict):
            if not isinstance(value, dict):
                what = path.rstrip(".") or "it"
                raise ValueError(f"{source}: {wrong}{what} is a {type(value).__name__}, not an object")
            for key, inner in wanted.items():
                if key not in value:
                    raise ValueError(f"{source}: {wrong}{path}{key} is missing")
                check(value[key], inner, f"{path}{key}.")
            return
        kinds = (float, int) if wanted is float else wanted
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{source}: {wrong}{path.rstrip('.')} is a {type(value).__name__}")

    check(record, _RECORD, "")
    return record


def summary(record: dict[str, Any]) -> str:
    """The final table as text: dense beside pruned, with the ratio pruned / dense (latency: dense / pruned)."""
    dense, pruned = record["dense"], record["pruned"]
    rows: list[tuple[str, str, str, str]] = [("", "dense", "pruned", "ratio")]
    for split in ("train", "valid", "test"):
        for key in ("loss", "accuracy"):
            a, b = dense[split][key], pruned[split][key]
            rows.append((f"{split} {key}", f"{a:.4f}", f"{b:.4f}", f"{b / a:.3f}" if a else "-"))
    for key, label in (("parameters", "parameters kept"), ("bytes", "bytes on disk")):
        ratio = f"{pruned[key] / dense[key]:.3f}" if dense[key] else "-"
        rows.append((label, f"{dense[key]:,}", f"{pruned[key]:,}", ratio))
    batch = " x ".join(map(str, record["latency_batch"]))
    verdict = f"{record['speedup']:.2f} " + ("times faster" if record["speedup"] >= 1 else "times: dense wins")
    latency = [f"{figures['latency_ms']:.2f}" for figures in (dense, pruned)]
    rows.append((f"latency, {batch} tokens, ms", latency[0], latency[1], verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}" for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    machine = record["machine"]
    kept = f"density {record['density']:.4f} of {record['prunable_parameters']:,} weights in the pruned Linears"
    kept += f"; test accuracy kept {kept_in_words(record)}"
    more = [] if not record.get("stopped") else [f"{record['stopped']}: accuracy suffers; give it more seconds"]
    if (layouts := layouts_of(record)) is not None:
        more += layouts.outline()
    where = f"{machine['cpu']}, {machine['threads']} threads, load {machine['load_1min']}, torch {machine['torch']}"
    if record.get("device", "cpu") != "cpu":
        where += f", computed on {record['device']}"
    note = "latency: one batch, texts x tokens; test texts spread over the split, padded to the longest of them"
    return "\n".join([*lines, kept, note, *more, *forms_table(record), where])


def layouts_of(record: dict[str, Any]) -> SparsifyReport | None:
    """What ``sparsify_`` reported in the run; None where it made nothing sparse. ValueError on another record."""
    found = record.get("layouts")
    return None if found is None else SparsifyReport.from_dict(found)
