"""Granularities over several weights: whole attention heads and whole feed-forward neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ...structured import Share, attention_blocks, feed_forwards, head_groups
from ..counts import kept_count
from ..factors import Factors
from ..selectors import Selector, topk_units
from ..units import Layers, UnitMap, line_map, shared_map
from .base import Granularity

__all__ = ["Heads", "Neurons"]


@dataclass(frozen=True)
class _Structured(Granularity):
    """``per_axis``: keep sqrt(R) of the units and, in every matrix, sqrt(R) of its other axis, so R overall (the
    article's ``Factors(convention="formula").pruning``); only the units shrink away, the other axis stays as zeros.
    ``trim_rescale``: the survivors are multiplied by that reading's ``trim`` once, when the masks are final.
    """

    per_axis: bool = False
    trim_rescale: bool = False

    def trim(self, density: float) -> float:
        """What the survivors are multiplied by."""
        return Factors.from_retention(density, convention="formula").trim if self.trim_rescale else 1.0

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float | None = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        if self.per_axis:
            if densities is not None:
                raise ValueError(f"{type(self).__name__}: per_axis and densities do not go together; drop one")
            sparsity = 1 - math.sqrt(1 - sparsity)
        units = [i for i, m in enumerate(maps) if not m.axis]
        chosen: dict[int, Tensor] = dict(
            zip(
                units,
                topk_units(
                    [maps[i] for i in units], [scores[i] for i in units], sparsity, scope, densities, selector, floor
                ),
            )
        )
        for i, m in enumerate(maps):
            if m.axis:
                chosen[i] = selector.topk([scores[i]], kept_count(selector.total(m.units), sparsity))[0]
        return [chosen[i] for i in range(len(maps))]

    def _axes(self, layers: Layers, shares: Sequence[Share]) -> list[UnitMap]:
        """Maps over the other axis: the columns of the matrices whose rows are units, the rows of those whose
        columns are.
        """
        if not self.per_axis:
            return []
        shapes = {s.layer: (layers[s.layer].out_features, layers[s.layer].in_features) for s in shares}
        return [line_map(s.layer, shapes[s.layer], 1 - s.dim) for s in shares]


def _covered(layers: Layers, wanted: Sequence[str], what: str, reasons: dict[str, str]) -> bool:
    """True where all the Linears of a block are being pruned; else those that are get a reason."""
    missing = [fqn for fqn in wanted if fqn not in layers]
    if missing:
        reasons.update({fqn: f"{missing[0]}, of the same {what}, is not selected" for fqn in wanted if fqn in layers})
    return not missing


@dataclass(frozen=True)
class Heads(_Structured):
    """Whole attention heads: their rows of query, key and value and their columns of the output, in every attention
    block found by structure. Heads that share a key and a value go together, and so does one head in all layers that
    read one position bias (T5). ``H - round(sparsity * H)`` of H stay; ``shrink_`` then cuts them out. Weights that are
    no ``nn.Linear`` (Conv1D, ``nn.MultiheadAttention``) want ``expose_linears_`` first. Weights are `[N, K]`: a head of
    d features is d rows of query, key and value and d columns of the output.

    per_axis, trim_rescale: the article's reading per axis, and its factor. Linears that belong to no such block, or to
    one not selected whole, stay dense, with the reason in the report's ``skipped``; ValueError where none is left.
    """

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps: list[UnitMap] = []
        reasons: dict[str, str] = {}
        blocks, unfit = attention_blocks(model)
        for group in head_groups(blocks):
            shares = [share for block in group for share in block.shares]
            if not _covered(layers, [share.layer for share in shares], "attention", reasons):
                continue
            maps.append(shared_map(f"{group[0].name}:heads", layers, shares, group[0].units))
            maps += self._axes(layers, shares)
        return maps, _uncovered(layers, maps, reasons, unfit, "no attention block")


@dataclass(frozen=True)
class Neurons(_Structured):
    """Whole feed-forward neurons: their row of the expanding Linear (and of the gate) and their column of the
    contracting one, both `[N, K]`. ``I - round(sparsity * I)`` of I stay; ``shrink_`` then cuts them out.

    per_axis, trim_rescale: the article's reading per axis, and its factor. Linears that belong to no such block, or to
    one not selected whole, stay dense, with the reason in the report's ``skipped``; ValueError where none is left.
    """

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps: list[UnitMap] = []
        reasons: dict[str, str] = {}
        blocks, unfit = feed_forwards(model)
        for block in blocks:
            if not _covered(layers, block.layers, "feed-forward", reasons):
                continue
            maps.append(shared_map(f"{block.name}:neurons", layers, block.shares, block.neurons))
            maps += self._axes(layers, block.shares)
        return maps, _uncovered(layers, maps, reasons, unfit, "no feed-forward block")


def _uncovered(
    layers: Layers, maps: Sequence[UnitMap], reasons: Mapping[str, str], unfit: Mapping[str, str], default: str
) -> dict[str, str]:
    covered = {fqn for m in maps for fqn in m.layers}
    left = {}
    for fqn in layers:
        if fqn not in covered:
            near = next((why for name, why in unfit.items() if name and fqn.startswith(name + ".")), None)
            left[fqn] = reasons.get(fqn) or near or f"part of {default}"
    return left
