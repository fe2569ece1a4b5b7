"""Units: what is kept or dropped together, with the way from scores of weights to theirs, and from units to masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from .. import ops
from ..structured import Share

__all__ = [
    "Layers",
    "UnitMap",
    "block_sums",
    "blown_up",
    "blown_up_units",
    "combine",
    "line_map",
    "named_units",
    "shared_map",
]

Layers = Mapping[str, nn.Linear]


@dataclass(frozen=True)
class UnitMap:
    """The units of one or several weights. ``key`` names them; unit scores have ``shape``; ``weights_per_unit`` weights
    each.

    ``layers``: the fqns of the weights. ``key``: the fqn for elements and blocks, ``NAME:heads`` and
    ``NAME:neurons`` with the block's name, unique in a plan. ``axis``: True for the other axis of a matrix that is
    cut along both. ``stage``: 1 for the second stage of a mixture.
    """

    key: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    weights_per_unit: int
    reduce_fn: Callable[[Mapping[str, Tensor]], Tensor] = field(repr=False)
    expand_fn: Callable[[Tensor], dict[str, Tensor]] = field(repr=False)
    axis: bool = False
    stage: int = 0

    @property
    def units(self) -> int:
        return math.prod(self.shape)

    def reduce(self, scores: Mapping[str, Tensor]) -> Tensor:
        """scores: fqn -> `[N, K]`; returns the sum over each unit, of ``shape``."""
        return self.reduce_fn(scores)

    def expand(self, units: Tensor) -> dict[str, Tensor]:
        """units: bool of ``shape``, True = kept; returns fqn -> bool `[N, K]`."""
        return self.expand_fn(units)


def line_map(fqn: str, shape: tuple[int, int], dim: int) -> UnitMap:
    """The rows (dim 0) or columns (dim 1) of one weight."""
    key = f"{fqn}:{'columns' if dim else 'rows'}"
    reduce, expand = partial(_line_sums, fqn, 1 - dim), partial(_lines, fqn, shape, dim)
    return UnitMap(key, (fqn,), (shape[dim],), shape[1 - dim], reduce, expand, axis=True)


def shared_map(key: str, layers: Layers, shares: Sequence[Share], units: int) -> UnitMap:
    """Units that own lines of several weights."""
    parts = [(share.layer, share.lines(units), share.dim) for share in shares]
    shapes = {fqn: (layers[fqn].out_features, layers[fqn].in_features) for fqn, _, _ in parts}
    weights = sum(lines.shape[1] * shapes[fqn][1 - dim] for fqn, lines, dim in parts)
    reduce, expand = partial(_shared_sums, parts), partial(_shared_masks, parts, shapes)
    return UnitMap(key, tuple(shapes), (units,), weights, reduce, expand)


# The two directions of every kind of unit. Plain functions, so that plans can be pickled.


def named_units(fqn: str, units: Tensor) -> dict[str, Tensor]:
    return {fqn: units}


def block_sums(fqn: str, size: tuple[int, int], scores: Mapping[str, Tensor]) -> Tensor:
    return ops.block_scores(scores[fqn], size)


def blown_up(blocksize: tuple[int, int], units: Tensor) -> Tensor:
    """units: `[N / r, K / c]`; returns `[N, K]`, each entry a whole block."""
    return units.repeat_interleave(blocksize[0], 0).repeat_interleave(blocksize[1], 1)


def blown_up_units(fqn: str, blocksize: tuple[int, int], units: Tensor) -> dict[str, Tensor]:
    return {fqn: blown_up(blocksize, units)}


def _line_sums(fqn: str, over: int, scores: Mapping[str, Tensor]) -> Tensor:
    return scores[fqn].float().sum(over)


def _lines(fqn: str, shape: tuple[int, int], dim: int, units: Tensor) -> dict[str, Tensor]:
    return {fqn: units.unsqueeze(1 - dim).expand(shape).contiguous()}


def _shared_sums(parts: Sequence[tuple[str, Tensor, int]], scores: Mapping[str, Tensor]) -> Tensor:
    sums = [scores[fqn].float().sum(1 - dim)[lines].sum(1) for fqn, lines, dim in parts]
    return torch.stack([s.to(sums[0].device) for s in sums]).sum(0)


def _shared_masks(
    parts: Sequence[tuple[str, Tensor, int]], shapes: Mapping[str, tuple[int, int]], units: Tensor
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for fqn, lines, dim in parts:
        kept = torch.zeros(shapes[fqn][dim], dtype=torch.bool, device=units.device)
        kept[lines.to(units.device)[units].flatten()] = True
        masks |= _lines(fqn, shapes[fqn], dim, kept)
    return masks


def combine(maps: Sequence[UnitMap], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """A weight stays where every map that covers it keeps it."""
    masks: dict[str, Tensor] = {}
    for m, k in zip(maps, kept):
        for fqn, mask in m.expand(k).items():
            masks[fqn] = masks[fqn] & mask if fqn in masks else mask
    return masks
