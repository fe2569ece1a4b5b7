"""Element-wise masking: each kernel reads and writes every element once. All tensors are contiguous, `[n]`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def apply_mask_kernel(w, mask, n, BLOCK: tl.constexpr):
    """w: `[n]` of any 1-, 2-, 4- or 8-byte dtype, zeroed in place where mask (uint8 `[n]`) is 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    keep = tl.load(mask + i, mask=inside, other=0)
    # A whole vector is read, chosen from and written: a store under a mask of data would fall apart into elements.
    value = tl.load(w + i, mask=inside, other=0)
    tl.store(w + i, tl.where(keep != 0, value, 0), mask=inside)


@triton.jit
def masked_copy_kernel(w, mask, out, n, BLOCK: tl.constexpr):
    """out: `[n]` = w where mask (uint8 `[n]`) is not 0, else 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    keep = tl.load(mask + i, mask=inside, other=0)
    value = tl.load(w + i, mask=inside, other=0)
    tl.store(out + i, tl.where(keep != 0, value, 0), mask=inside)


@triton.jit
def threshold_mask_kernel(w, threshold, mask, out, counts, n, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    """mask: uint8 `[n]` = |w| >= threshold[0]; out: `[n]` = w there, else 0; counts: int64 `[2]` += kept, NaN.

    A program takes ROUNDS times BLOCK elements, for its one or two atomics.
    """
    first = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    cut = tl.load(threshold).to(tl.float32)
    seen = tl.zeros((BLOCK,), tl.int32)  # kept, and NaN in the upper half: of ROUNDS elements each
    for part in range(ROUNDS):
        i = first + part * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        value = tl.load(w + i, mask=inside, other=0)
        wide = value.to(tl.float32)
        keep = (tl.abs(wide) >= cut) & inside
        tl.store(mask + i, keep.to(tl.uint8), mask=inside)
        tl.store(out + i, tl.where(keep, value, 0), mask=inside)
        seen += keep.to(tl.int32) + (wide != wide).to(tl.int32) * 65536
    tl.atomic_add(counts, tl.sum(seen & 65535, 0).to(tl.int64), sem="relaxed")
    nans = tl.sum(seen >> 16, 0)
    if nans > 0:
        tl.atomic_add(counts + 1, nans.to(tl.int64), sem="relaxed")


@triton.jit
def mask_gradient_kernel(grad, w, mask, score_grad, n, SCORES: tl.constexpr, BLOCK: tl.constexpr):
    """All `[n]`. SCORES: score_grad += grad * w, grad still dense; then grad is zeroed where mask (uint8) is 0."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    keep = tl.load(mask + i, mask=inside, other=0)
    dense = tl.load(grad + i, mask=inside, other=0)
    if SCORES:
        weight = tl.load(w + i, mask=inside, other=0).to(tl.float32)
        score = tl.load(score_grad + i, mask=inside, other=0).to(tl.float32)
        score += dense.to(tl.float32) * weight
        tl.store(score_grad + i, score.to(score_grad.dtype.element_ty), mask=inside)
    tl.store(grad + i, tl.where(keep != 0, dense, 0), mask=inside)


@triton.jit
def masked_adamw_kernel(
    p, grad, exp_avg, exp_avg_sq, mask, n,
    decay, beta1, rest1, beta2, rest2, eps, step_size, root_correction,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One AdamW step over `[n]`, in float32; p and both moments become 0 where mask (uint8) is 0.

    decay = 1 - lr * weight_decay; rest = 1 - beta; step_size = lr / (1 - beta1^step);
    root_correction = 1 / sqrt(1 - beta2^step).
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    g = tl.load(grad + i, mask=inside, other=0).to(tl.float32)
    value = tl.load(p + i, mask=inside, other=0).to(tl.float32) * decay
    m = tl.load(exp_avg + i, mask=inside, other=0).to(tl.float32)
    v = tl.load(exp_avg_sq + i, mask=inside, other=0).to(tl.float32)
    m = m + (g - m) * rest1
    v = v * beta2 + g * g * rest2
    value = value - m / (tl.sqrt(v) * root_correction + eps) * step_size
    if MASKED:
        keep = tl.load(mask + i, mask=inside, other=0) != 0
        value = tl.where(keep, value, 0.0)
        m = tl.where(keep, m, 0.0)
        v = tl.where(keep, v, 0.0)
    tl.store(p + i, value.to(p.dtype.element_ty), mask=inside)
    tl.store(exp_avg + i, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + i, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
