"""A run that rounds: which layers stay exact, and the four forms side by side, dense and sparse, float32 and int8."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..nn import SparsifyReport, sparsify_
from ..pruning.granularity import Block, make_granularity
from ..pruning.masks import MaskSet
from ..training import RoundingReport, choose_exact_layers
from .config import RunConfig
from .display import Display
from .sources import Source

__all__ = ["choose_exact", "forms_table", "make_sparse", "other_forms"]

_OTHERS = ("dense int8", "sparse float32")


def choose_exact(
    config: RunConfig, source: Source, model: nn.Module, masks: MaskSet, display: Display
) -> RoundingReport | None:
    """Which layers rounding costs too much, by the validation split; None where nothing is rounded."""
    pruning = config.pruning
    layers = [fqn for fqn in masks if isinstance(model.get_submodule(fqn), nn.Linear)]
    if not pruning.rounds or config.layout == "dense" or not layers:
        return None
    display.say("measuring: what rounding costs on the validation split")
    report = choose_exact_layers(
        model, source.loaders["valid"], layers=layers, value_dtype=pruning.value_dtype,
        activations=pruning.activations, tolerance=config.rounding_tolerance,
    )  # fmt: skip
    display.say(str(report))
    return report


def make_sparse(
    config: RunConfig, model: nn.Module, masks: MaskSet, tokens: int, rounding: RoundingReport | None
) -> SparsifyReport | None:
    """Sparse where it pays, rounded as the configuration says; None with ``layout="dense"``."""
    if config.layout == "dense":
        return None
    if rounding is None:
        return sparsify_(model, layout=config.layout, tokens=tokens)
    return sparsify_(
        model, layout=config.layout, tokens=tokens, filter_fn=_healed(masks), value_dtype=config.pruning.value_dtype,
        activations=config.pruning.activations, exact_layers=rounding.exact, **_blocks(config),
    )  # fmt: skip


def other_forms(
    config: RunConfig, dense: nn.Module, model: nn.Module, masks: MaskSet, tokens: int
) -> dict[str, nn.Module]:
    """What the sparse int8 model is shown beside, besides the dense one; empty where no activations are rounded."""
    if config.pruning.activations != "int8" or config.layout == "dense":
        return {}
    made = {"dense int8": copy.deepcopy(dense), "sparse float32": copy.deepcopy(model)}
    sparsify_(made["dense int8"], tokens=tokens, filter_fn=_healed(masks), value_dtype="int8", activations="int8")
    sparsify_(made["sparse float32"], layout=config.layout, tokens=tokens, filter_fn=_healed(masks), **_blocks(config))
    return {name: made[name].eval() for name in _OTHERS}


def _healed(masks: MaskSet) -> Any:
    """What was not pruned did not heal under any rounding either."""
    return lambda module, fqn: fqn in masks


def _blocks(config: RunConfig) -> dict[str, Any]:
    """The blocks that were pruned, where their layout is asked for."""
    given = config.pruning.granularity
    kind = None if isinstance(given, dict) else make_granularity(given)
    if config.layout != "bsr" or not isinstance(kind, Block):
        return {}
    return {"blocksize": (kind.r, kind.c)}


def forms_table(record: dict[str, Any]) -> list[str]:
    """Lines: loss, accuracy and latency of each form, in runs that round; none for others."""
    forms = record.get("forms")
    if not forms:
        return []
    rows = {"dense float32": record["dense"], **forms, "sparse int8": record["pruned"]}
    base = record["dense"]
    lines = ["", f"{'':<14}  valid loss  valid acc.  test loss  test acc.     kept      ms  times as fast"]
    for name in ("dense float32", "dense int8", "sparse float32", "sparse int8"):
        row = rows[name]
        valid, test = row["valid"], row["test"]
        dense, speed = base["test"]["accuracy"], base["latency_ms"] / row["latency_ms"]
        kept = f"{test['accuracy'] / dense:.1%}" if dense else "-"
        lines.append(
            f"{name:<14}  {valid['loss']:10.4f}  {valid['accuracy']:10.4f}  {test['loss']:9.4f}  "
            f"{test['accuracy']:9.4f}  {kept:>7}  {row['latency_ms']:6.2f}  {speed:13.2f}"
        )
    rounding = record.get("rounding") or {}
    lines.append(f"layers kept in float32: {', '.join(rounding.get('exact', ())) or 'none'}")
    return lines
