"""Kind "bitmask8": as kind "bitmask", in int8 and for activations in 8 bits.

One bit a column and the values of a row in order; scale float32 `[2, rows]` and the rounding of the values are those of
kind "quads", and so are the results, to the bit. csrc/cpu/int8_bitmask.inl multiplies with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import bitmask, quads
from .kinds import Kind
from .plan import Plan

__all__ = ["flat_positions", "pack", "quantise", "wanted"]

_TOKENS = 8  # up to which reading the weight is what takes the time
_PANEL = 16384  # bytes of activations, 8 or 16 lanes of them, that stay in L1 beside quads


def wanted(canonical: Tensor, tokens: int) -> bool:
    """canonical: as of :func:`sparseprune.packing.quads.pack`. Bits take the same time for each column, and more for
    each token; quads for each that holds a value, whatever the tokens, of which they multiply 8 or 16 at once. The
    numbers are nanoseconds of 64 columns, measured.
    """
    rows, columns = canonical.shape
    if tokens > _TOKENS or not canonical.numel():
        return False
    kept = float((canonical.view(rows, columns // quads.QUAD, quads.QUAD) >= 0).any(2).float().mean())
    wide = _native.C is not None and _native.C.lanes() == 16
    far = 1.5 if columns * (16 if wide else 8) > _PANEL else 1.0
    if wide:
        return 2.6 + 0.3 * tokens < far * (1.5 + 8.5 * kept)
    return 2.9 + tokens < far * (1.2 + 6.0 * kept)


def pack(canonical: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """canonical: int `[rows, columns]`, the flat place of each stored value among the canonical ones, -1 where none is.
    Returns plan, index, offsets and perm. ValueError on a shape that has no such form.
    """
    rows, columns = canonical.shape
    reason = quads.why_not((rows, columns))
    if reason is not None:
        raise ValueError(f"pack: activations in int8 {reason}")
    row, column = (canonical >= 0).nonzero(as_tuple=True)
    plan, index, offsets, perm = bitmask.pack((rows, columns), row, column, canonical[row, column])
    return plan._replace(kind=int(Kind.BITMASK8)), index, offsets, perm


flat_positions = bitmask.flat_positions


def quantise(exact: Tensor, positions: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """exact: packed values `[n]`, positions: the flat place of each in the weight, rising; returns them as int8, and
    scale `[2, rows]`, as :func:`sparseprune.packing.quads.quantise` makes them of the quads that they are in.
    """
    kept, quad = torch.unique_consecutive(positions // quads.QUAD, return_inverse=True)
    whole = exact.new_zeros(kept.numel(), quads.QUAD)
    whole[quad, positions % quads.QUAD] = exact
    row = (kept * quads.QUAD // max(1, plan.columns)).repeat_interleave(quads.QUAD)
    narrow, scale = quads.quantise(whole.flatten(), row, plan.rows)
    return narrow.view(-1, quads.QUAD)[quad, positions % quads.QUAD], scale
