"""prune_: zeroes the weights that matter least, once, and says what it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.filters import FilterFn, select_linears
from .criteria import Criterion, PruneContext, ScoreFn, make_criterion
from .granularity import Granularity, Heads, Neurons, Plan
from .masks import MaskSet

__all__ = ["LayerRow", "PruneReport", "check_floor", "make_report", "prune_", "trim_"]


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report: weight shape (N, K), ``kept`` of ``total`` weights."""

    fqn: str
    shape: tuple[int, int]
    granularity: str
    kept: int
    total: int

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class PruneReport:
    """What is pruned, per layer and in all; ``str()`` prints it. ``skipped``: fqn -> why a Linear was left dense."""

    layers: tuple[LayerRow, ...]
    masks: MaskSet = field(repr=False)
    skipped: dict[str, str]
    criterion: str
    scope: str

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.layers)

    @property
    def total(self) -> int:
        return sum(row.total for row in self.layers)

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0

    @property
    def sparsity(self) -> float:
        return 1.0 - self.density

    def to_dict(self) -> dict[str, Any]:
        """For JSON: counts, densities, reasons and the hash of the masks."""
        rows = [
            {
                "name": r.fqn,
                "shape": list(r.shape),
                "granularity": r.granularity,
                "kept": r.kept,
                "total": r.total,
                "density": r.density,
            }
            for r in self.layers
        ]
        return {
            "criterion": self.criterion,
            "scope": self.scope,
            "kept": self.kept,
            "total": self.total,
            "density": self.density,
            "mask_hash": self.masks.mask_hash(),
            "layers": rows,
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        names = [row.fqn or "(the model)" for row in self.layers]
        width = max([len(name) for name in names] + [5])
        lines = [f"pruned by {self.criterion}, scope {self.scope}"]
        for name, row in zip(names, self.layers):
            empty = "  nothing left" if row.kept == 0 else ""
            shape = f"[{row.shape[0]}, {row.shape[1]}]"
            lines.append(
                f"  {name:<{width}}  {shape:>14}  {row.granularity}  {row.kept:,} of {row.total:,}  "
                f"density {row.density:.4f}{empty}"
            )
        lines.append(f"  {'total':<{width}}  {self.kept:,} of {self.total:,}  density {self.density:.4f}")
        lines += [f"  left dense: {fqn or '(the model)'}: {why}" for fqn, why in self.skipped.items()]
        return "\n".join(lines)


def prune_(
    model: nn.Module,
    sparsity: float | None = None,
    criterion: str | Criterion | ScoreFn = "magnitude",
    granularity: str | Granularity | Mapping[str, str | Granularity] = "element",
    scope: str = "global",
    filter_fn: FilterFn | None = None,
    data: Any = None,
    *,
    densities: Mapping[str, float] | None = None,
    criterion_options: Mapping[str, Any] | None = None,
    floor: float = 0.0,
) -> PruneReport:
    """Zeroes weights of the model's Linears in place and returns the report; the modules stay ``nn.Linear``.

    sparsity: the share of the units (weights, blocks, heads, neurons) set to zero, in [0, 1]; exactly
    ``U - round(sparsity * U)`` of U units stay, counted over all layers with ``scope="global"`` and in every layer with
    ``scope="layer"``. ``NM`` fixes its own sparsity, which may be left out. criterion: a name, a ``Criterion`` or
    ``fn(linear, fqn) -> scores [N, K]``; some names need ``data``. granularity: ``"element"``, ``Block(r, c)``,
    ``NM(n, m)``, ``Heads()``, ``Neurons()``, ``Mixture(...)``, or a dict from name patterns to them. densities: name
    pattern -> relative density, scaled so that the total is exact. floor: the least density of a layer under
    ``scope="global"``, as a share of the density of all, in [0, 1], so that no layer starves. filter_fn(module, fqn):
    which Linears, instead of the default.

    Raises ValueError, before anything is changed, on arguments that do not fit the model; scores that are NaN name
    their layer.
    """
    selection = select_linears(model, filter_fn)
    made = make_criterion(criterion, criterion_options)
    if made.needs_data and data is None:
        raise ValueError(f"prune_: criterion {made.name!r} needs data; pass data=batches of the model's inputs")
    plan = Plan.build(model, selection.selected, granularity, scope, densities, floor)
    check_floor(made, floor)
    sparsity = plan.check_sparsity(sparsity)
    layers = {fqn: selection.selected[fqn] for fqn in plan.layers}
    weights: dict[str, Tensor] = {fqn: linear.weight.detach() for fqn, linear in layers.items()}
    if made.needs_gradients:
        gradients = {fqn: linear.weight.grad for fqn, linear in layers.items() if linear.weight.grad is not None}
        made.observe({fqn: weights[fqn] for fqn in gradients}, gradients)
    context = PruneContext(model, layers, weights, plan, sparsity, data)
    with torch.no_grad():
        masks = _checked(made.masks(context), layers, made)
        masks.apply_(model)
        trim_(layers, plan, sparsity)
    return make_report(plan, masks, {**selection.skipped, **plan.skipped}, made.name)


def check_floor(criterion: Criterion, floor: float) -> None:
    """ValueError where a criterion that chooses its masks by itself would pass the floor over."""
    if floor and type(criterion).masks is not Criterion.masks:
        raise ValueError(f"floor: criterion {criterion.name!r} chooses its masks by itself; leave floor out")


def make_report(plan: Plan, masks: MaskSet, skipped: dict[str, str], criterion: str) -> PruneReport:
    """The report on these masks under this plan."""
    kinds = {fqn: str(part.granularity) for part in plan.parts for fqn in part.layers}
    rows = []
    for fqn in masks:
        shape = masks.shape(fqn)
        rows.append(LayerRow(fqn, shape, kinds[fqn], masks.kept_of(fqn), shape[0] * shape[1]))
    return PruneReport(tuple(rows), masks, skipped, criterion, plan.scope)


@torch.no_grad()
def trim_(layers: Mapping[str, nn.Linear], plan: Plan, sparsity: float) -> None:
    """Multiplies the survivors by the article's trim factor where a granularity asks for it. Once, with the final
    masks.
    """
    for part in plan.parts:
        if isinstance(part.granularity, (Heads, Neurons)) and part.granularity.trim_rescale and sparsity < 1:
            for fqn in part.layers:
                layers[fqn].weight.mul_(part.granularity.trim(1 - sparsity))


def _checked(masks: Mapping[str, Tensor], layers: Mapping[str, nn.Linear], criterion: Criterion) -> MaskSet:
    def each() -> Iterator[tuple[str, Tensor]]:
        for fqn, linear in layers.items():
            mask = masks.get(fqn)
            if mask is None or mask.shape != linear.weight.shape:
                got = "none" if mask is None else list(mask.shape)
                raise ValueError(
                    f"criterion {criterion.name!r}: mask of {fqn!r} expected shape {list(linear.weight.shape)}, "
                    f"got {got}"
                )
            yield fqn, mask

    return MaskSet(each())
