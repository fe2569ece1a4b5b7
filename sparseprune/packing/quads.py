"""Kind "quads": int8 values in fours of neighbouring columns, for activations in 8 bits.

As kind "groups", but an entry is a quad: four columns from a multiple of four on, of each of ``height`` rows. k_block
counts columns, index quads within the K-block; values and perm `[(entries + slack) * height * 4]`, 0 and -1 where the
layout stores none. scale float32 `[2, rows]`: the scale of each row, and the sum of its values, a whole number.
csrc/cpu/int8.inl multiplies with it: what lets its sums stay within 16 and 32 bits is seen to here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import groups
from .kinds import Kind
from .plan import Plan

__all__ = ["QUAD", "flat_positions", "pack", "quantise", "reach", "scale_of", "why_not"]

QUAD = 4
_MOST_COLUMNS = 65536  # sums of that many products of 255 and 127 are within 32 bits
_SAMPLE = 8  # rows that are asked first whether they were rounded before
_TALL = 0.85  # of all quads kept: rows in groups, which share every load of activations, cost no more


def why_not(shape: tuple[int, int]) -> str | None:
    """Why a weight of this shape has no such form; None where it has."""
    if shape[1] % QUAD or not 0 < shape[1] <= _MOST_COLUMNS:
        return f"needs in_features a multiple of {QUAD}, at most {_MOST_COLUMNS}, got {shape[1]}"
    return None


def pack(canonical: Tensor, blocksize: tuple[int, int], tokens: int) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """canonical: int `[rows, columns]`, the flat place of each stored value among the canonical ones, -1 where none is;
    blocksize: of the layout. Returns plan, index, offsets and perm. ValueError on a shape that has no such form.
    """
    rows, columns = canonical.shape
    reason = why_not((rows, columns))
    if reason is not None:
        raise ValueError(f"pack: activations in int8 {reason}")
    height = groups.height_of(blocksize[0])
    quads = canonical.view(rows, columns // QUAD, QUAD)
    if height == 1 and bool((quads >= 0).any(2).float().mean() > _TALL):
        height = groups.height_of(rows)
    parts = quads.view(rows // height, height, columns // QUAD, QUAD).transpose(1, 2)
    group, column = (parts >= 0).flatten(2).any(2).nonzero(as_tuple=True)
    places = parts[group, column].reshape(-1, QUAD)  # [entries * height, 4], an entry's rows one behind the other
    density = group.numel() * height / max(1, rows * (columns // QUAD))
    first = torch.arange(group.numel(), device=canonical.device) * height
    # a row of a panel has as many bytes here as there
    plan, index, offsets, order = groups.pack(
        (rows, columns // QUAD), height, group, column, first, 1, max(tokens, 2), density
    )
    perm = torch.cat([places, places.new_full((1, QUAD), -1)])[order.long()]
    k_block = plan.k_block * QUAD
    return plan._replace(kind=int(Kind.QUADS), columns=columns, k_block=k_block), index, offsets, perm.flatten().int()


def flat_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[entries * height * 4]`: see :func:`sparseprune.packing.flat_positions`."""
    in_quads = plan._replace(columns=plan.columns // QUAD, k_block=plan.k_block // QUAD)
    quad = groups.flat_positions(index, offsets, in_quads)
    return (quad.unsqueeze(1) * QUAD + torch.arange(QUAD, device=index.device)).flatten()


def quantise(exact: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """exact: packed values `[n]`, row of each int64 `[n]`; returns them as int8, and scale `[2, rows]`.

    A scale is :func:`reach` / 127. Values that came from such a rounding, as from a file, are given back unchanged.
    """
    scale = scale_of(_of_rows(reach(exact), row, rows))
    few = row < int(row.min()) + _SAMPLE if row.numel() else row.bool()
    if few.any() and bool(_grid(exact[few], row[few], rows)[1][row[few]].all()):
        known, there = _grid(exact, row, rows)
        scale = torch.where(there, known, scale)
    values = (exact / scale[row]).round().clamp(-127, 127).to(torch.int8)
    total = torch.zeros(rows, dtype=torch.int64, device=exact.device).index_add(0, row, values.long())
    return values, torch.stack([scale.float(), total.float()])


def scale_of(largest: Tensor) -> Tensor:
    """largest: how far the values of each row reach; returns the steps that 127 of are as much, 1 where there are no
    values.
    """
    return torch.where(largest == 0, 1.0, (largest / 127).clamp(min=torch.finfo(torch.float32).tiny))


def reach(values: Tensor) -> Tensor:
    """values: `[..., n]`, n even, of which two by two are neighbours in half a quad; returns `[..., n]`: the magnitude
    of each or, where both have one sign, of their sum. Cut into 127 steps, no value rounds to more than these, and no
    two of one sign to more than 128 together.
    """
    pairs = values.unflatten(-1, (-1, 2))
    alike = pairs.sign().prod(-1, keepdim=True) > 0
    both = torch.where(alike, pairs.sum(-1, keepdim=True).abs(), 0.0).expand_as(pairs)
    return torch.where(both > pairs.abs(), both, pairs.abs()).flatten(-2)


def _of_rows(values: Tensor, row: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=values.dtype, device=values.device).scatter_reduce(0, row, values, "amax")


def _grid(exact: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(scale `[rows]`, bool `[rows]`: whether all values of the row are whole multiples of it that fit a quad)."""
    peak = _of_rows(exact.abs(), row, rows)
    scale, there = torch.ones_like(peak), torch.zeros_like(peak, dtype=torch.bool)
    for most in range(127, 62, -1):  # a row's largest value may be half of what its pairs reach
        step = torch.where(peak > 0, peak / most, 1.0)
        count = exact / step[row]
        off = _of_rows((count - count.round()).abs(), row, rows) > 1e-4
        fits = ~off & (_of_rows(reach(count.round()), row, rows) <= 128) & ~there
        scale, there = torch.where(fits, step, scale), there | fits
    return scale, there
