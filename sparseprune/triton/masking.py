"""Masking ops as Triton kernels: one pass over memory each, on the current stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._registry import kernel
from ..device_memory import capturing
from ._environment import guard, kernels, why_not_triton

WARPS = 4
ROUNDS = 8  # blocks that a program of threshold_mask takes, so that its atomics are few


def block_of(size: int) -> int:
    """Elements a program, for a largest element of ``size`` bytes: 16 bytes a thread of four warps, one vector each."""
    return WARPS * 32 * 16 // size


def shape_of(*tensors: Tensor | None) -> tuple[tuple[int], dict[str, int]]:
    """(grid, launch options) for element-wise work over the first tensor's elements."""
    present = [tensor for tensor in tensors if tensor is not None]
    block = block_of(max(tensor.element_size() for tensor in present))
    return (-(-present[0].numel() // block),), {"BLOCK": block, "num_warps": WARPS}


def as_bytes(mask: Tensor) -> Tensor:
    """The same memory as uint8: Triton has no pointers to bool that every release loads alike."""
    return mask.view(torch.uint8)


def _why_not_dense(tensors: tuple[Tensor | None, ...], mask: Tensor | None, any_dtype: bool = False) -> list[str]:
    reasons = why_not_triton(*tensors, check_dtype=not any_dtype)
    if mask is not None and tensors[0] is not None and mask.device != tensors[0].device:
        reasons.append(f"needs the mask on {tensors[0].device}, got {mask.device}")
    if not all(t.is_contiguous() for t in (*tensors, mask) if t is not None):
        reasons.append("needs contiguous tensors")
    return reasons


def _why_not_apply_mask_(w: Tensor, mask: Tensor) -> list[str]:
    return _why_not_dense((w,), mask)


@kernel("apply_mask_", "triton", _why_not_apply_mask_)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`, contiguous. Zeroes w where mask is False. Bytes an element: 2 of w and 1."""
    if w.numel():
        with guard(w):
            grid, options = shape_of(w)
            kernels("masking").apply_mask_kernel[grid](w, as_bytes(mask), w.numel(), **options)


def _why_not_masked_copy(w: Tensor, mask: Tensor) -> list[str]:
    return _why_not_dense((w,), mask)


@kernel("masked_copy", "triton", _why_not_masked_copy)
def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w, mask (bool): `[...]`, contiguous; returns w with zeros where mask is False."""
    out = torch.empty_like(w)
    if w.numel():
        with guard(w):
            grid, options = shape_of(w)
            kernels("masking").masked_copy_kernel[grid](w, as_bytes(mask), out, w.numel(), **options)
    return out


def reject_nan(op: str, count: Tensor) -> None:
    """ValueError where the int64 counter is not 0. Waits for the stream, unless it is captured into a CUDA graph."""
    if capturing(count.device):
        return
    if int(count):
        raise ValueError(f"{op}: NaN among the values, and NaN has no rank; find its source, or use torch.nan_to_num")


def _why_not_threshold_mask(w: Tensor, threshold: Tensor) -> list[str]:
    reasons = _why_not_dense((w,), None)
    if threshold.device != w.device:
        reasons.append(f"needs the threshold on {w.device}, got {threshold.device}")
    return reasons


@kernel("threshold_mask", "triton", _why_not_threshold_mask)
def threshold_mask(w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; returns (bool |w| >= threshold, w there and 0 elsewhere, their count as int64 0-dim), in one pass.

    Waits for the stream once, to report NaN; not while a CUDA graph is captured, where NaN counts as below.
    """
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    out = torch.empty_like(w)
    counts = torch.zeros(2, dtype=torch.int64, device=w.device)
    if w.numel():
        with guard(w):
            block = block_of(4)  # of any dtype: what is counted has four bytes
            cut = threshold.to(w.dtype)
            kernels("masking").threshold_mask_kernel[(-(-w.numel() // (block * ROUNDS)),)](
                w, cut, as_bytes(mask), out, counts, w.numel(), BLOCK=block, ROUNDS=ROUNDS, num_warps=WARPS
            )
            reject_nan("threshold_mask", counts[1])
    return mask, out, counts[0].clone()


def _why_not_mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> list[str]:
    return _why_not_dense((grad, w, score_grad), mask)


@kernel("mask_gradient_", "triton", _why_not_mask_gradient_)
def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> None:
    """All `[...]`, contiguous: score_grad += grad * w, grad still dense; then grad is zeroed where mask is False."""
    if grad.numel():
        scores = score_grad is not None
        with guard(grad):
            grid, options = shape_of(grad, score_grad)
            into = score_grad if scores else grad
            kernels("masking").mask_gradient_kernel[grid](
                grad, w, as_bytes(mask), into, grad.numel(), SCORES=scores, **options
            )


def _why_not_masked_adamw_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> list[str]:
    return _why_not_dense((p, grad, exp_avg, exp_avg_sq), mask)


@kernel("masked_adamw_", "triton", _why_not_masked_adamw_)
def masked_adamw_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """All `[...]`, contiguous: one AdamW step, decoupled decay, in float32; p and the moments become 0 where masked."""
    if not p.numel():
        return
    with guard(p):
        grid, options = shape_of(p, grad, exp_avg, exp_avg_sq)
        kernels("masking").masked_adamw_kernel[grid](
            p, grad, exp_avg, exp_avg_sq, as_bytes(mask) if mask is not None else p, p.numel(),
            1 - lr * weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step),
            MASKED=mask is not None, **options,
        )  # fmt: skip
