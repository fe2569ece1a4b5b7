"""Kind "groups": rows in groups of ``height`` that share their columns.

A slot is the part of a group in one K-block. Order of the entries: row block, K-block, slot, entry, then the rows of
the group; the slots of a K-block are sorted by their count. index int16 `[entries + slack]`: column within its
K-block, read as unsigned; offsets int32 `[slots + 1, 2]`: first entry of the slot, and its group within the row block;
values and perm `[(entries + slack) * height]`. csrc/cpu/linear_groups.inl multiplies with it, and says why in this
order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .kinds import Kind
from .plan import SLACK, Plan

__all__ = ["flat_positions", "height_of", "pack", "pack_canonical"]


def _blocks(rows: int, columns: int, height: int, tokens: int, density: float) -> tuple[int, int]:
    """(k_block, row_block) for a kernel that is to run on ``tokens`` tokens.

    Vectorised over tokens, the K-block of a tile's panel should fit into L1 (32 KiB) beside the entries that stream
    past, and still hold enough entries of a row to pay for loading and storing its sums.
    """
    whole = min(-(-columns // 8) * 8, 65536)
    if height >= 8:
        return max(8, whole), 128  # as many rows as are written to y at a time (csrc/cpu/linear_groups.inl, kWriteRows)
    if tokens == 1:
        k_block = whole
    elif height > 1:
        k_block = 256 * height
    elif tokens <= 8:
        k_block = 1024
    elif tokens <= 16:
        k_block = 512
    elif tokens <= 32:
        k_block = 256
    else:
        k_block = 96 if density > 0.35 else 160 if density > 0.15 else 192 if density > 0.07 else 256
    row_block = min(256, max(16, -(-rows // 64) * 16))  # at least four row blocks, for threads to share
    return max(8, min(k_block, whole)), row_block


def height_of(r: int) -> int:
    """The tallest group of rows that a kernel knows and that divides a block of r rows."""
    return next(h for h in (16, 8, 4, 2, 1) if r % h == 0)


def _plan(shape: tuple[int, int], height: int, tokens: int, density: float) -> Plan:
    rows, columns = shape
    return Plan(int(Kind.GROUPS), rows, columns, height, *_blocks(rows, columns, height, tokens, density))


def pack(
    shape: tuple[int, int],
    height: int,
    group: Tensor,
    column: Tensor,
    canonical: Tensor,
    row_step: int,
    tokens: int,
    density: float,
) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """The entries of a weight of this shape, one a (group of rows, column). canonical: the flat place in the values of
    each entry's first row, ``row_step`` further on that of the next one.
    Returns plan, index, offsets and perm.
    """
    rows, columns = shape
    device = group.device
    plan = _plan(shape, height, tokens, density)
    k_block, row_block = plan.k_block, plan.row_block
    k_blocks, per_block, groups = -(-columns // k_block), row_block // height, rows // height

    def slots_of(of: Tensor, k: Tensor) -> Tensor:
        block = of // per_block
        in_block = torch.clamp(groups - block * per_block, max=per_block)  # the last row block may be short
        return block * (per_block * k_blocks) + k * in_block + (of - block * per_block)

    slot = slots_of(group, column // k_block)
    counts = torch.bincount(slot, minlength=groups * k_blocks)
    every_group = torch.arange(groups, device=device).repeat(k_blocks)
    every_k = torch.arange(k_blocks, device=device).repeat_interleave(groups)
    every_slot = slots_of(every_group, every_k)
    within, segment = torch.empty_like(every_slot), torch.empty_like(every_slot)
    within[every_slot] = every_group % per_block
    segment[every_slot] = every_group // per_block * k_blocks + every_k
    if height < 8:  # equal counts follow one another, so that the end of a kernel's loop is predicted
        most = int(counts.max()) + 1 if counts.numel() else 1
        by_count = torch.argsort(segment * most + counts, stable=True)
        moved = torch.empty_like(by_count)
        moved[by_count] = torch.arange(by_count.numel(), device=device)
        slot, counts, within = moved[slot], counts[by_count], within[by_count]
    order = torch.sort(slot.to(torch.int32), stable=True).indices
    offsets = torch.zeros(groups * k_blocks + 1, 2, dtype=torch.int32, device=device)
    offsets[1:, 0] = counts.cumsum(0)
    offsets[:-1, 1] = within
    index = (column % k_block)[order]
    index = torch.where(index > 32767, index - 65536, index).to(torch.int16)
    perm = (canonical[order].unsqueeze(1) + torch.arange(height, device=device) * row_step).reshape(-1).to(torch.int32)
    index = torch.cat([index, index.new_zeros(SLACK)])
    perm = torch.cat([perm, perm.new_full((SLACK * height,), -1)])
    return plan, index, offsets, perm


def pack_canonical(
    shape: tuple[int, int],
    height: int,
    crow_indices: Tensor,
    col_indices: Tensor,
    blocksize: tuple[int, int],
    transpose: bool,
    tokens: int,
    density: float,
) -> tuple[Plan, Tensor, Tensor, Tensor]:
    """What :func:`pack` gives for the weight of this shape in csr or bsr, or with ``transpose`` for that of the shape
    turned round, through the compiled core, which sorts nothing: a tenth of the time. The indices are int32, on the
    CPU. ValueError where they point outside of the weight.
    """
    plan = _plan(shape, height, tokens, density)
    (rows, columns), (r, c) = shape, blocksize
    entries = col_indices.numel() * r * c // height
    index = torch.zeros(entries + SLACK, dtype=torch.int16)
    offsets = torch.empty(rows // height * -(-columns // plan.k_block) + 1, 2, dtype=torch.int32)
    perm = torch.full(((entries + SLACK) * height,), -1, dtype=torch.int32)
    crow, col = crow_indices.contiguous(), col_indices.contiguous()
    require_c().pack_groups(
        crow.data_ptr(),
        col.data_ptr(),
        (crow.numel() - 1, col.numel(), (rows if transpose else columns) // c, r, c),
        plan[1:],
        transpose,
        index.data_ptr(),
        offsets.data_ptr(),
        perm.data_ptr(),
    )
    return plan, index, offsets, perm


def flat_positions(index: Tensor, offsets: Tensor, plan: Plan) -> Tensor:
    """int64 `[entries * height]`: see :func:`sparseprune.packing.flat_positions`."""
    _, rows, columns, height, k_block, row_block = plan
    device = index.device
    groups, k_blocks, per_block = -(-rows // height), -(-columns // k_block), row_block // height
    first_of, k_of = [], []
    for first in range(0, groups, per_block):
        here = min(groups, first + per_block) - first
        first_of.append(torch.full((here * k_blocks,), first, device=device))
        k_of.append(torch.arange(k_blocks, device=device).repeat_interleave(here))
    if not first_of:
        return torch.zeros(0, dtype=torch.int64, device=device)
    counts = (offsets[1:, 0] - offsets[:-1, 0]).long()
    group = (torch.cat(first_of) + offsets[:-1, 1].long()).repeat_interleave(counts)
    column = torch.cat(k_of).repeat_interleave(counts) * k_block + (index[: group.numel()].long() & 0xFFFF)
    row = group.unsqueeze(1) * height + torch.arange(height, device=device)
    return (row * columns + column.unsqueeze(1)).flatten()
