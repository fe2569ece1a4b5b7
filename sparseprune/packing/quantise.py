"""Packed values in eight bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import bitmask8, quads
from .kinds import Kind
from .places import flat_positions
from .plan import Plan

__all__ = ["quantise"]


def quantise(exact: Tensor, index: Tensor, offsets: Tensor, plan: Sequence[int]) -> tuple[Tensor, Tensor]:
    """exact: packed values `[packed]`; returns them as int8, and a scale a row `[rows]`: largest magnitude / 127, or
    the float beside it that gives back, to the bit, values which came from such a rounding, as from a file.
    Forms for activations in 8 bits have scales, and sums, of their own (:func:`sparseprune.packing.quads.quantise`).
    """
    named = Plan(*plan)
    positions = flat_positions(index, offsets, named)
    row = positions // max(1, named.columns)
    if named.kind in (Kind.QUADS, Kind.BITMASK8):
        if named.kind == Kind.QUADS:
            narrow, scale = quads.quantise(exact[: row.numel()], row, named.rows)
        else:
            narrow, scale = bitmask8.quantise(exact[: row.numel()], positions, named)
        return torch.cat([narrow, narrow.new_zeros(exact.numel() - row.numel())]), scale
    largest = torch.zeros(named.rows, dtype=exact.dtype, device=exact.device)
    largest = largest.scatter_reduce(0, row, exact[: row.numel()].abs(), "amax")
    scale = _known(quads.scale_of(largest), exact[: row.numel()], row)
    values = torch.zeros(exact.numel(), dtype=torch.int8, device=exact.device)
    values[: row.numel()] = (exact[: row.numel()] / scale[row]).round().clamp(-127, 127).to(torch.int8)
    return values, scale


def _known(scale: Tensor, exact: Tensor, row: Tensor) -> Tensor:
    """Of each row's scale and the floats beside it the first that all values of the row are whole multiples of, as
    floats multiply; where none is, the scale itself.
    """
    found, open_rows = scale.clone(), torch.ones_like(scale, dtype=torch.bool)
    for candidate in (scale, *(torch.nextafter(scale, torch.full_like(scale, far)) for far in (0.0, math.inf))):
        step = candidate[row]
        off = ((exact / step).round() * step != exact).to(scale.dtype)
        fits = open_rows & (torch.zeros_like(scale).scatter_reduce(0, row, off, "amax") == 0)
        found, open_rows = torch.where(fits, candidate, found), open_rows & ~fits
        if not bool(open_rows.any()):
            break
    return found
