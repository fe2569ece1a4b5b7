"""Every kind of packed form by what is asked of it here: where its values lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import bitmask, bitmask8, gpu, groups, quads
from .kinds import GpuKind, Kind
from .plan import Plan

__all__ = ["flat_positions", "to_dense"]

_POSITIONS: dict[int, Callable[[Tensor, Tensor, Plan], Tensor]] = {
    Kind.GROUPS: groups.flat_positions,
    Kind.BITMASK: bitmask.flat_positions,
    Kind.QUADS: quads.flat_positions,
    Kind.BITMASK8: bitmask8.flat_positions,
    GpuKind.STRIPS: gpu.strip_positions,
    GpuKind.DELTAS: gpu.delta_positions,
    GpuKind.ENTRIES: gpu.block_positions,
    GpuKind.BLOCKS: gpu.block_positions,
}


def flat_positions(index: Tensor, offsets: Tensor, plan: Sequence[int]) -> Tensor:
    """int64 `[packed]`: where in the flat `[rows * columns]` weight each packed value lies, the slack left out.
    ValueError on a kind that is not there.
    """
    named = Plan(*plan)
    if named.kind not in _POSITIONS:
        raise ValueError(f"packing: kind expected one of {[int(kind) for kind in _POSITIONS]}, got {named.kind}")
    return _POSITIONS[named.kind](index, offsets, named)


def to_dense(index: Tensor, offsets: Tensor, values: Tensor, scale: Tensor | None, plan: Sequence[int]) -> Tensor:
    """The dense `[rows, columns]`, float32 or wider, of a packed form: what its kernel multiplies with."""
    named = Plan(*plan)
    positions = flat_positions(index, offsets, named)
    wide = torch.promote_types(values.dtype, torch.float32)
    if named.kind == GpuKind.DELTAS:  # some of whose entries have no value
        values = values[gpu.delta_entries(index, offsets, named)[2]]
    values = values.flatten()
    flat = torch.zeros(named.rows * named.columns, dtype=wide, device=values.device)
    flat[positions] = values[: positions.numel()].to(wide)
    dense = flat.view(named.rows, named.columns)
    return dense if scale is None else dense * scale.flatten()[: named.rows].unsqueeze(1)
