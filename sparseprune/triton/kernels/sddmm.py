"""Sampled products on the tensor cores; PRECISION and UPCAST as in ``linear``."""

from __future__ import annotations

import triton
import triton.language as tl

from .linear import product


@triton.jit
def bsr_sddmm_kernel(
    dy, x, crow, index, out, M, bands, stride_dm, stride_dn, stride_xm, stride_xk,
    ROWS: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out: `[nblocks, ROWS, COLS]` = the sum over M tokens of dy `[M, N]` x `[M, K]` at the kept blocks alone.

    crow: int32 `[bands + 1]`, index: int32 `[nblocks]`. A program finds the band of its block by bisection of crow.
    """
    entry = tl.program_id(0)
    low = entry * 0
    high = low + bands
    while high - low > 1:
        middle = (low + high) // 2
        beyond = tl.load(crow + middle) > entry
        low = tl.where(beyond, low, middle)
        high = tl.where(beyond, middle, high)
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLS)
    r = tl.arange(0, BLOCK_R)
    n = low * ROWS + i
    k = tl.load(index + entry) * COLS + j
    from_dy = dy + r.to(tl.int64)[None, :] * stride_dm + n.to(tl.int64)[:, None] * stride_dn
    from_x = x + r.to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for done in range(0, M, BLOCK_R):
        left = M - done
        a = tl.load(from_dy, mask=(r < left)[None, :], other=0.0)
        b = tl.load(from_x, mask=(r < left)[:, None], other=0.0)
        acc = product(a, b, acc, PRECISION, UPCAST)
        from_dy += BLOCK_R * stride_dm
        from_x += BLOCK_R * stride_xm
    to = out + entry.to(tl.int64) * (ROWS * COLS) + i[:, None] * COLS + j[None, :]
    tl.store(to, acc.to(out.dtype.element_ty))
