"""prune_: zeroes the weights that matter least, once, and says what it did."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..nn.filters import FilterFn, select_linears
from ..nn.matrices import shared_linears
from ..nn.other_weights import count_parameters, other_weights
from ..nn.views import LinearViews
from .criteria import Criterion, PruneContext, ScoreFn, make_criterion
from .granularity import Granularity, Heads, Neurons
from .intake import calibration_data
from .masks import MaskSet
from .plan import Plan

__all__ = [
    "LayerRow",
    "PruneReport",
    "check_floor",
    "make_report",
    "prune_",
    "prune_below_",
    "trim_",
    "warn_starved",
]

#: Share of the density of all below which a layer counts as nearly empty.
_STARVED = 0.05


@dataclass(frozen=True)
class LayerRow:
    """One layer of a report: weight shape (N, K), ``kept`` of ``total`` weights."""

    name: str
    shape: tuple[int, int]
    granularity: str
    kept: int
    total: int

    @property
    def density(self) -> float:
        return self.kept / self.total if self.total else 1.0


@dataclass(frozen=True)
class PruneReport:
    """What is pruned, per layer and in all; ``str()`` prints it. ``skipped``: fqn -> why a Linear was left dense.

    ``other_weights``: larger weights that no Linear holds, which pruning passes over, with their share of
    ``parameters``, the entries of all the model's parameters; ``total`` and ``density`` are those of ``layers`` alone.
    ``zeros``: how many of the weights kept are zero, as an earlier pruning leaves them.
    """

    layers: tuple[LayerRow, ...]
    masks: MaskSet = field(repr=False)
    skipped: dict[str, str]
    criterion: str
    scope: str
    other_weights: dict[str, str] = field(default_factory=dict)
    parameters: int = 0
    zeros: int = 0

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
                "name": r.name,
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
            "other_weights": dict(self.other_weights),
            "parameters": self.parameters,
            "zeros": self.zeros,
        }

    def __str__(self) -> str:
        names = [row.name or "(the model)" for row in self.layers]
        width = max([len(name) for name in names] + [5])
        lines = [f"pruned by {self.criterion}, scope {self.scope}"]
        for name, row in zip(names, self.layers):
            empty = "  nothing left" if row.kept == 0 else ""
            shape = f"[{row.shape[0]}, {row.shape[1]}]"
            lines.append(
                f"  {name:<{width}}  {shape:>14}  {row.granularity}  {row.kept:,} of {row.total:,}  "
                f"density {row.density:.4f}{empty}"
            )
        share = f", {self.total / self.parameters:.3f} of all parameters" if self.parameters else ""
        lines.append(f"  {'total':<{width}}  {self.kept:,} of {self.total:,}  density {self.density:.4f}{share}")
        if self.zeros:
            lines.append(f"  {self.zeros:,} of the weights kept are zero all the same, from an earlier pruning perhaps")
        lines += [f"  left dense: {fqn or '(the model)'}: {why}" for fqn, why in self.skipped.items()]
        lines += [f"  no Linear, left dense: {name}: {what}" for name, what in self.other_weights.items()]
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
    floor: float | None = None,
    tokenizer: Any = None,
) -> PruneReport:
    """Zeroes weights of the model's Linears in place and returns the report; the modules stay ``nn.Linear``.

    Conv1D (GPT-2), the packed ``nn.MultiheadAttention`` and a mixture's experts in one tensor are pruned as the Linears
    they are in truth, and stay what they are: the report names them as :func:`sparsify_` would make them.

    Weights are `[N, K]`, N outputs and K inputs. sparsity: the share of the units (weights, blocks, heads, neurons) set
    to zero, in [0, 1]; exactly ``U - round(sparsity * U)`` of U units stay, counted over all layers with
    ``scope="global"`` and in every layer with ``scope="layer"``. ``NM`` fixes its own sparsity, which may be left out.
    criterion: a name, a ``Criterion`` or ``fn(linear, fqn) -> scores [N, K]``; some names need ``data``, some the
    gradients of a backward pass, which one that needs them is shown once, as they lie in ``.grad``: clear them first
    (``model.zero_grad()``) where your own loop has called ``observe`` with them. granularity:
    ``"element"``, ``Block(r, c)``, ``NM(n, m)``, ``Heads()``, ``Neurons()``, ``Mixture(...)``, or a dict from name
    patterns to them. data: what the model reads, for criteria that measure
    it, in any form of :mod:`~sparseprune.pruning.intake`: token ids, batches, a ``datasets.Dataset``, texts with the
    ``tokenizer``. criterion_options: arguments
    of a named criterion. densities: name pattern -> relative density, scaled so that the total is exact. floor: the
    least density of a layer under ``scope="global"``, as a share of the density of all, in [0, 1]; None: half of it,
    and a unit of every layer as far as they go round, so that no layer starves; 0: the highest scores alone decide.
    filter_fn(module, fqn): which Linears, instead of the default.

    Raises ValueError, before anything is changed, on arguments that do not fit the model or the modes in force
    (inference mode, autocast); scores that are NaN name their layer. Warns, naming them, of layers that end nearly
    empty.
    """
    views = LinearViews(model)
    model = views.model()
    selection = select_linears(model, filter_fn)
    made = make_criterion(criterion, criterion_options)
    _check_modes(made, selection.selected)
    _check_writable("prune_", selection.selected)
    if made.needs_data and data is None:
        raise ValueError(f"prune_: criterion {made.name!r} needs data; pass data=batches of the model's inputs")
    if made.needs_data:
        data = calibration_data(data, model, tokenizer, "prune_")
    plan = Plan.build(model, selection.selected, granularity, scope, densities, floor)
    check_floor(made, floor)
    sparsity = plan.check_sparsity(sparsity)
    layers = {fqn: selection.selected[fqn] for fqn in plan.layers}
    weights: dict[str, Tensor] = {fqn: linear.weight.detach() for fqn, linear in layers.items()}
    if made.needs_gradients:
        found = {fqn: views.gradient(linear) for fqn, linear in layers.items()}
        gradients = {fqn: gradient for fqn, gradient in found.items() if gradient is not None}
        missing = [fqn or "(the model)" for fqn in layers if fqn not in gradients]
        if missing and made is not criterion:  # made from a name a moment ago, so it has seen nothing else
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise ValueError(
                f"prune_: criterion {made.name!r} needs gradients, got none on layers {', '.join(missing[:10])}{more}; "
                "call backward first, or pass a Criterion that has observed them"
            )
        made.observe({fqn: weights[fqn] for fqn in gradients}, gradients)
    context = PruneContext(model, layers, weights, plan, sparsity, data)
    with torch.no_grad():
        masks = _checked(made.masks(context), layers, made)
        masks.apply_(model)
        trim_(layers, plan, sparsity)
    report = make_report(model, plan, masks, {**selection.skipped, **plan.skipped}, made.name)
    if sparsity < 1:
        warn_starved("prune_", plan, {row.name: (row.kept, row.total) for row in report.layers})
    return report


def prune_below_(model: nn.Module, threshold: float, filter_fn: FilterFn | None = None) -> PruneReport:
    """Zeroes in place every weight of the model's Linears with ``|w| < threshold``, as after a training that made most
    weights small (L1, weight decay under masks), and returns the report; how many stay is what the weights give.

    threshold: at least 0, rounded to each weight's dtype. filter_fn(module, fqn): which Linears, instead of the
    default. Mask and zeros of a layer are one pass over it. Raises ValueError, before anything is changed, on a
    threshold that is no such number, on a NaN weight, and on weights of inference mode.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not 0 <= threshold < math.inf:
        raise ValueError(f"prune_below_: threshold expected a number of at least 0, got {threshold!r}")
    model = shared_linears(model)
    selection = select_linears(model, filter_fn)
    _check_writable("prune_below_", selection.selected)
    plan = Plan.build(model, selection.selected, "element", "layer")
    layers = {fqn: selection.selected[fqn] for fqn in plan.layers}
    found = {}
    for fqn, linear in layers.items():
        try:
            found[fqn] = ops.threshold_mask(linear.weight, float(threshold))
        except ValueError as error:
            raise ValueError(f"prune_below_: weight of {fqn or '(the model)'!r}: {error}") from None
    with torch.no_grad():
        for fqn, (_, zeroed, _) in found.items():
            layers[fqn].weight.copy_(zeroed)
    masks = MaskSet((fqn, mask) for fqn, (mask, _, _) in found.items())
    report = make_report(model, plan, masks, {**selection.skipped, **plan.skipped}, f"|w| < {threshold:g}")
    kept = {row.name: (row.kept, row.total) for row in report.layers}
    warn_starved("prune_below_", plan, kept, "threshold")
    return report


def _check_modes(criterion: Criterion, linears: Mapping[str, nn.Linear]) -> None:
    """ValueError where inference mode or autocast would stop the work halfway, or change what it measures."""
    if criterion.needs_data or criterion.needs_gradients:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                f"prune_: criterion {criterion.name!r} expected gradients to be possible, got torch.inference_mode; "
                "call it outside (it turns gradients off itself where it needs none)"
            )
        device = next(iter(linears.values())).weight.device.type
        if torch.is_autocast_enabled(device):
            raise ValueError(
                f"prune_: criterion {criterion.name!r} measures the model in its own precision, got torch.autocast "
                f"({torch.get_autocast_dtype(device)}); call it outside"
            )


def _check_writable(who: str, linears: Mapping[str, nn.Linear]) -> None:
    """ValueError where a weight was made in inference mode and is written outside of it."""
    if not torch.is_inference_mode_enabled():
        for fqn, linear in linears.items():
            if linear.weight.is_inference():
                raise ValueError(
                    f"{who}: weight of {fqn!r} expected to be writable, got an inference tensor; build or load the "
                    "model outside torch.inference_mode"
                )


def warn_starved(who: str, plan: Plan, kept: Mapping[str, tuple[int, int]], lower: str = "sparsity") -> None:
    """UserWarning that names the layers left nearly empty. kept: fqn -> (weights kept, weights); lower: which argument
    to lower. Layers to which ``densities`` give nothing, and those without weights, are not meant.
    """
    overall = sum(k for k, _ in kept.values()) / max(1, sum(total for _, total in kept.values()))
    starved = [
        f"{fqn or '(the model)'} ({k:,} of {total:,})"
        for fqn, (k, total) in kept.items()
        if total and k <= _STARVED * overall * total and (plan.densities is None or plan.densities.get(fqn, 1) > 0)
    ]
    if not starved:
        return
    floored = plan.scope == "global" and plan.densities is None and plan.floor is not None
    remedy = "Leave floor at its default, or use" if floored else "Use"
    shown = ", ".join(starved[:10]) + (f" and {len(starved) - 10} more" if len(starved) > 10 else "")
    warnings.warn(
        f"{who}: expected every layer to keep some weights, got nearly none (density {overall:.4f} over all) in "
        f"{shown}; what such a layer gives hardly depends on its input. {remedy} a lower {lower}, or leave the layer "
        "out with filter_fn",
        UserWarning,
        stacklevel=3,
    )


def check_floor(criterion: Criterion, floor: float | None) -> None:
    """ValueError where a criterion that chooses its masks by itself would pass the floor over."""
    if floor and type(criterion).masks is not Criterion.masks:
        raise ValueError(f"floor: criterion {criterion.name!r} chooses its masks by itself; leave floor out")


def make_report(
    model: nn.Module, plan: Plan, masks: MaskSet, skipped: dict[str, str], criterion: str
) -> PruneReport:
    """The report on these masks of the model under this plan."""
    kinds = {fqn: str(part.granularity) for part in plan.parts for fqn in part.layers}
    rows: list[LayerRow] = []
    layers = masks.layers_of(model)
    for fqn in masks:
        shape = masks.shape(fqn)
        rows.append(LayerRow(fqn, shape, kinds[fqn], masks.kept_of(fqn), shape[0] * shape[1]))
    others, parameters = other_weights(model), count_parameters(model)
    weights = {fqn: linear.weight.detach() for fqn, linear in layers.items()}
    zeros = sum(int((weight.eq(0) & masks[fqn].to(weight.device)).sum()) for fqn, weight in weights.items())
    return PruneReport(tuple(rows), masks, skipped, criterion, plan.scope, others, parameters, zeros)


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
