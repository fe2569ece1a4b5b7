"""Exact selection by radix histograms, and the masks it gives. All tensors are contiguous.

A value's sortable key is a 32-bit integer that orders as the value does: the bits of |x|, or, signed, the bits of x
with the sign turned (-0 counts as 0); 16-bit types fill the upper half. Digits of 11, 11 and 10 bits: two settle 16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sortable_key(x, MAGNITUDE: tl.constexpr):
    """x: float32, float16 or bfloat16 `[n]`; returns uint32 `[n]`."""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
    else:
        bits = x.to(tl.uint32, bitcast=True)
    if MAGNITUDE:
        return bits & 0x7FFFFFFF
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit
def radix_histogram_kernel(
    x, counts, prefix, n, chunks,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """counts: int64 `[BINS + 1]` += how many keys that begin with prefix[0] (int64) have each digit; last, the NaN.

    Each program takes ``chunks`` runs of BLOCK elements, so that BINS global atomics are paid once for all of them.
    """
    first = tl.program_id(0).to(tl.int64) * chunks * BLOCK
    bins = tl.zeros((BINS,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    wanted = tl.load(prefix).to(tl.uint32)
    for chunk in range(chunks):
        i = first + chunk * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        value = tl.load(x + i, mask=inside, other=0)
        wide = value.to(tl.float32)
        bad += (wide != wide).to(tl.int32)
        key = sortable_key(value, MAGNITUDE)
        take = inside
        if SHIFT + WIDTH < 32:
            take = take & ((key >> (SHIFT + WIDTH)) == wanted)
        digit = ((key >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        bins += tl.histogram(digit, BINS, mask=take)
    bin_index = tl.arange(0, BINS)
    tl.atomic_add(counts + bin_index, bins.to(tl.int64), mask=bins > 0, sem="relaxed")
    bad_here = tl.sum(bad, 0)
    if bad_here > 0:
        tl.atomic_add(counts + BINS, bad_here.to(tl.int64), sem="relaxed")


@triton.jit
def radix_select_kernel(counts, state, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """state: int64 `[2]` = (prefix, rank): appends the digit of the rank-th largest; rank becomes that within it."""
    reverse = BINS - 1 - tl.arange(0, BINS)
    here = tl.load(counts + reverse)
    upto = tl.cumsum(here, 0)
    prefix = tl.load(state)
    rank = tl.load(state + 1)
    hit = (upto >= rank) & (upto - here < rank)
    digit = tl.sum(tl.where(hit, reverse, 0), 0).to(tl.int64)
    above = tl.sum(tl.where(hit, upto - here, 0), 0)
    tl.store(state, (prefix << WIDTH) | digit)
    tl.store(state + 1, rank - above)


@triton.jit
def key_value_kernel(state, value, SHIFT: tl.constexpr, MAGNITUDE: tl.constexpr):
    """value: `[1]` of the result's dtype = the value whose key begins with state[0] and has SHIFT bits more."""
    key = (tl.load(state) << SHIFT).to(tl.uint32)
    if not MAGNITUDE:
        key = tl.where((key >> 31) != 0, key ^ 0x80000000, key ^ 0xFFFFFFFF)
    if value.dtype.element_ty.primitive_bitwidth == 16:
        tl.store(value, (key >> 16).to(tl.uint16).to(value.dtype.element_ty, bitcast=True))
    else:
        tl.store(value, key.to(tl.float32, bitcast=True))


@triton.jit
def count_ties_kernel(x, threshold, ties, bad, n, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """ties: int32 `[ceil(n / BLOCK)]` = how many elements of each block equal threshold[0]; bad[0] (int64) += NaN."""
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside, other=float("nan")).to(tl.float32)
    nans = tl.sum(((value != value) & inside).to(tl.int32), 0)
    if nans > 0:
        tl.atomic_add(bad, nans.to(tl.int64), sem="relaxed")
    if MAGNITUDE:
        value = tl.abs(value)
    cut = tl.load(threshold).to(tl.float32)
    tl.store(ties + block, tl.sum((value == cut).to(tl.int32), 0))


@triton.jit
def cut_mask_kernel(x, threshold, upto, allowed, mask, n, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr):
    """mask: uint8 `[n]` = above threshold[0], or equal to it and among the first allowed[0] (int64) of all that are.

    upto: int64 `[ceil(n / BLOCK)]`, how many ties lie in this block and all before it.
    """
    block = tl.program_id(0)
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    value = tl.load(x + i, mask=inside, other=float("nan")).to(tl.float32)
    if MAGNITUDE:
        value = tl.abs(value)
    cut = tl.load(threshold).to(tl.float32)
    tie = (value == cut).to(tl.int32)
    before = tl.load(upto + block) - tl.sum(tie, 0)
    rank = before + tl.cumsum(tie, 0)
    keep = (value > cut) | ((tie != 0) & (rank <= tl.load(allowed)))
    tl.store(mask + i, keep.to(tl.uint8), mask=inside)


@triton.jit
def nm_mask_kernel(scores, mask, bad, groups, KEPT: tl.constexpr, OF: tl.constexpr, BLOCK: tl.constexpr):
    """scores, mask (uint8): `[groups, OF]`; keeps the KEPT largest of each, ties to the lower index; bad[0] += NaN."""
    group = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, OF)
    at = group[:, None] * OF + lane[None, :]
    inside = (group < groups)[:, None] & (lane < OF)[None, :]
    value = tl.load(scores + at, mask=inside, other=0).to(tl.float32)
    mine, other = tl.expand_dims(value, 2), tl.expand_dims(value, 1)
    my_lane = tl.expand_dims(tl.expand_dims(lane, 0), 2)
    other_lane = tl.expand_dims(tl.expand_dims(lane, 0), 1)
    beaten_by = (other > mine) | ((other == mine) & (other_lane < my_lane))
    rank = tl.sum(beaten_by.to(tl.int32), 2)
    tl.store(mask + at, (rank < KEPT).to(tl.uint8), mask=inside)
    nans = tl.sum(tl.sum((value != value).to(tl.int32), 1), 0)
    if nans > 0:
        tl.atomic_add(bad, nans.to(tl.int64), sem="relaxed")


@triton.jit
def block_scores_kernel(scores, out, width, blocks, rows, cols, COLS: tl.constexpr, BLOCK: tl.constexpr):
    """scores: `[R * rows, width]`; out: float32 `[R, blocks]`, the sum of each rows x cols block; COLS: cols rounded
    up.
    """
    band = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col = tl.arange(0, COLS)
    inside = (block < blocks)[:, None] & (col < cols)[None, :]
    at = scores + band * rows * width + (block[:, None] * cols + col[None, :])
    total = tl.zeros((BLOCK, COLS), tl.float32)
    for _ in range(rows):
        total += tl.load(at, mask=inside, other=0).to(tl.float32)
        at += width
    tl.store(out + band * blocks + block, tl.sum(total, 1), mask=block < blocks)
