"""The kinds of the GPU kernels: where their values lie. :mod:`sparseprune.cuda.packed` packs and multiplies them.

strips: index int32 `[strips * 32]`, offsets int32 `[strips + 1]`: a strip's first value; values in the order of
csrc/cuda/linear_bitmap.cu, rounded up to 8. Plan: height: the most values of a strip, k_block 64, row_block 16.

deltas: index uint8 `[entries]`, offsets int32 `[rows + 1]`: a row's first run of 8; values `[entries]`, 0 where a byte
is 0 (padding) or 255 (254 columns on): csrc/cuda/linear_delta.cu. Plan: height: how many entries have a value.

entries and blocks: index is col_indices, offsets crow_indices, values as in csr or bsr. Plan:
a block is height x k_block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["DELTA_RUN", "DELTA_STEP", "STRIP_COLUMNS", "STRIP_ROWS", "block_positions", "delta_entries",
           "delta_positions", "strip_positions"]  # fmt: skip

STRIP_ROWS, STRIP_COLUMNS = 16, 64
DELTA_STEP, DELTA_RUN = 254, 8


def strip_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[nnz]`: see :func:`sparseprune.packing.flat_positions`."""
    across = -(-plan.columns // STRIP_COLUMNS)
    bits = index.view(-1, 32, 1) >> torch.arange(32, dtype=torch.int32, device=index.device) & 1
    # A bit is nibble * 4 + k of its lane; values lie by strip, nibble, lane and k.
    kept = bits.view(-1, 32, 8, 4).transpose(1, 2).reshape(-1).nonzero().flatten()
    strip, nibble, lane, k = kept // 1024, kept // 128 % 8, kept // 4 % 32, kept % 4
    row = strip // across * STRIP_ROWS + lane // 4 + nibble % 2 * 8
    column = strip % across * STRIP_COLUMNS + lane % 4 * 16 + nibble // 2 * 4 + k
    return row * plan.columns + column


def delta_entries(index: Tensor, offsets: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """(crow int32 `[rows + 1]`, col int32 `[nnz]`, at int64 `[nnz]`: which entry each is), without a question to the
    device, so that a CUDA graph may hold it.
    """
    count, device = plan.height, index.device
    has = (index != 0) & (index != 255)
    step = torch.where(has, index, torch.where(index == 255, DELTA_STEP, 0)).long()
    begin = offsets.long() * DELTA_RUN
    steps, kept = (torch.zeros(index.numel() + 1, dtype=torch.int64, device=device) for _ in range(2))
    steps[1:], kept[1:] = step.cumsum(0), has.cumsum(0)
    row = torch.repeat_interleave(
        torch.arange(plan.rows, device=device), begin[1:] - begin[:-1], output_size=index.numel()
    )
    column = steps[1:] - steps[begin[row]] - 1
    place = torch.where(has, kept[1:] - 1, count)  # those without a value share the one behind the last
    at = torch.zeros(count + 1, dtype=torch.int64, device=device)
    at[place] = torch.arange(index.numel(), device=device)
    at = at[:count]
    return kept[begin].to(torch.int32), column[at].to(torch.int32), at


def delta_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[nnz]`, of the entries that have a value."""
    crow, col, _ = delta_entries(index, offsets, plan)
    return block_positions(col, crow, plan._replace(height=1, k_block=1))


def block_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[nblocks * r * c]`."""
    r, c, device = plan.height, plan.k_block, index.device
    counts = (offsets[1:] - offsets[:-1]).long()
    band = torch.repeat_interleave(torch.arange(counts.numel(), device=device), counts, output_size=index.numel())
    row = band.view(-1, 1, 1) * r + torch.arange(r, device=device).view(-1, 1)
    column = index.long().view(-1, 1, 1) * c + torch.arange(c, device=device)
    return (row * plan.columns + column).flatten()
