"""Kind "bitmask": one bit a column, least significant first, and the values of a row in order.

index uint8 `[rows, ceil(columns / 64) * 8]`; offsets int32 `[rows + 1]`: first value of each row; values and perm
`[nnz + slack]` in row order. csrc/cpu/linear_bitmask.inl multiplies with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .kinds import Kind
from .plan import SLACK, Plan

__all__ = ["flat_positions", "pack", "wanted"]


#: lanes of the tier -> bytes of a value -> density from which bits beat indices at 1, 2, 4 and 8 tokens, measured.
_LEAST = {
    8: {4: (0.29, 0.22, 0.33, 0.55), 2: (0.25, 0.2, 0.31, 0.5), 1: (0.25, 0.2, 0.31, 0.5)},
    16: {4: (0.23, 0.16, 0.26, 0.46), 2: (0.165, 0.12, 0.22, 0.43), 1: (0.21, 0.15, 0.26, 0.44)},
}


def wanted(height: int, tokens: int, density: float, dtype: torch.dtype) -> bool:
    """Whether values of this dtype lie behind bits. Bits take the same time for each column, whatever is kept, and so
    beat indices where reading the weight is what takes the time, unless few are set.
    """
    if height > 1 or tokens > 8:
        return False
    lanes = 8 if _native.C is None else _native.C.lanes()
    least = _LEAST[16 if lanes == 16 else 8][min(4, dtype.itemsize)]
    return density > least[(tokens - 1).bit_length()]


def pack(shape: tuple[int, int], row: Tensor, column: Tensor, canonical: Tensor) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """The entries at (row, column) of a weight of this shape; canonical: the flat place of each in the values. Returns
    plan, index, offsets and perm.
    """
    rows, columns = shape
    order = torch.argsort(row * columns + column)
    row_bytes = -(-columns // 64) * 8
    kept = torch.zeros(rows, row_bytes * 8, dtype=torch.uint8, device=row.device)
    kept[row, column] = 1
    bit = 1 << torch.arange(8, dtype=torch.uint8, device=row.device)
    index = (kept.view(rows, row_bytes, 8) * bit).sum(2, dtype=torch.uint8)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    offsets[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    perm = canonical[order].to(torch.int32)
    perm = torch.cat([perm, perm.new_full((SLACK,), -1)])
    plan = Plan(int(Kind.BITMASK), rows, columns, 1, columns, rows)
    return plan, index, offsets, perm


def flat_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[nnz]`: see :func:`sparseprune.packing.flat_positions`."""
    bit = torch.arange(8, device=index.device)
    kept = (index.unsqueeze(2) >> bit & 1).flatten(1)[:, : plan.columns]
    return kept.flatten().nonzero().flatten()
