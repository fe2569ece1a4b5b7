"""Masking through the compiled CUDA kernels: one pass over memory each, queued on the current stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._registry import kernel
from ._environment import DTYPE_CODES, capturing, launching, why_not_cuda, why_not_tensors
from ._tensors import address

SIZES = (1, 2, 4, 8)  # bytes of an element that a masked copy takes


def _why_not_dense(tensors: tuple[Tensor | None, ...], mask: Tensor | None) -> list[str]:
    reasons = why_not_cuda(*tensors)
    first = next(tensor for tensor in tensors if tensor is not None)
    if mask is not None and mask.device != first.device:
        reasons.append(f"needs the mask on {first.device}, got {mask.device}")
    if not all(t.is_contiguous() for t in (*tensors, mask) if t is not None):
        reasons.append("needs contiguous tensors")
    return reasons


def _why_not_copy(w: Tensor, mask: Tensor) -> list[str]:
    reasons = why_not_cuda(w, dtypes=(w.dtype,))
    reasons += why_not_tensors(mask, dtypes=(torch.bool,)) if not reasons else []
    if w.element_size() not in SIZES:
        reasons.append(f"needs elements of {', '.join(map(str, SIZES))} bytes, got {w.dtype}")
    if not (w.is_contiguous() and mask.is_contiguous()):
        reasons.append("needs contiguous tensors")
    return reasons


def _copy(w: Tensor, mask: Tensor, out: Tensor) -> None:
    with launching(w) as (cuda, stream):
        cuda.masked_copy(w.data_ptr(), mask.data_ptr(), out.data_ptr(), w.numel(), w.element_size(), stream)


@kernel("apply_mask_", "cuda", _why_not_copy)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`, contiguous. Zeroes w where mask is False."""
    _copy(w, mask, w)


@kernel("masked_copy", "cuda", _why_not_copy)
def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w, mask (bool): `[...]`, contiguous; returns w with zeros where mask is False."""
    out = torch.empty_like(w)
    _copy(w, mask, out)
    return out


def _why_not_threshold_mask(w: Tensor, threshold: Tensor) -> list[str]:
    reasons = _why_not_dense((w,), None)
    if threshold.device != w.device:
        reasons.append(f"needs the threshold on {w.device}, got {threshold.device}")
    return reasons


@kernel("threshold_mask", "cuda", _why_not_threshold_mask)
def threshold_mask(w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; returns (bool |w| >= threshold, w there and 0 elsewhere, their count as int64 0-dim), in one pass.

    Waits for the stream once, to report NaN; not while a CUDA graph is recorded, where NaN counts as below.
    """
    mask = torch.empty(w.shape, dtype=torch.bool, device=w.device)
    out = torch.empty_like(w)
    counts = torch.zeros(2, dtype=torch.int64, device=w.device)
    cut = threshold.to(w.dtype)
    with launching(w) as (cuda, stream):
        cuda.threshold_mask(
            w.data_ptr(), cut.data_ptr(), DTYPE_CODES[w.dtype], mask.data_ptr(), out.data_ptr(), counts.data_ptr(),
            w.numel(), stream,
        )  # fmt: skip
    if not capturing(w.device) and int(counts[1]):
        raise ValueError(
            f"threshold_mask: {int(counts[1])} NaN among the values; find their source, or use torch.nan_to_num first"
        )
    return mask, out, counts[0].clone()


def _one_dtype(reasons: list[str], first: Tensor, second: Tensor, names: str) -> list[str]:
    if first.dtype != second.dtype:
        reasons.append(f"needs {names} of one dtype, got {first.dtype} and {second.dtype}")
    return reasons


def _why_not_mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> list[str]:
    reasons = _why_not_dense((grad, w, score_grad), mask)
    if score_grad is not None and score_grad.dtype != torch.float32:
        reasons.append(f"needs score_grad in float32, got {score_grad.dtype}")
    return _one_dtype(reasons, grad, w, "grad and w")


@kernel("mask_gradient_", "cuda", _why_not_mask_gradient_)
def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> None:
    """All `[...]`, contiguous: score_grad += grad * w, grad still dense; then grad is zeroed where mask is False."""
    with launching(grad) as (cuda, stream):
        cuda.mask_gradient(
            grad.data_ptr(), w.data_ptr(), mask.data_ptr(), address(score_grad), grad.numel(), DTYPE_CODES[grad.dtype],
            stream,
        )  # fmt: skip


def _why_not_masked_adamw_(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, mask: Tensor | None, *rest: object
) -> list[str]:
    reasons = _why_not_dense((p, grad, exp_avg, exp_avg_sq), mask)
    for moment in (exp_avg, exp_avg_sq):
        if moment.dtype != torch.float32:
            reasons.append(f"needs moments in float32, got {moment.dtype}")
            break
    return _one_dtype(reasons, p, grad, "p and grad")


@kernel("masked_adamw_", "cuda", _why_not_masked_adamw_)
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
    with launching(p) as (cuda, stream):
        cuda.masked_adamw(
            p.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(), address(mask), p.numel(),
            DTYPE_CODES[p.dtype], 1 - lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
            lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), stream,
        )  # fmt: skip
