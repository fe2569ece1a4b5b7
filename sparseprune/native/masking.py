"""Masking through the compiled core: one pass over memory each."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ._inputs import DTYPE_CODES, why_not_cpu


def _need_contiguous(*tensors: Tensor | None) -> list[str]:
    return [] if all(t is None or t.is_contiguous() for t in tensors) else ["needs contiguous tensors"]


def _why_not_apply_mask_(w: Tensor, mask: Tensor) -> list[str]:
    return why_not_cpu(w) + _need_contiguous(w)


@kernel("apply_mask_", "native", _why_not_apply_mask_)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`, w contiguous. Zeroes w where mask is False."""
    mask = mask.contiguous()
    require_c().apply_mask(w.data_ptr(), mask.data_ptr(), w.numel(), w.element_size())


@kernel("masked_copy", "native", lambda w, mask: why_not_cpu(w))
def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w, mask (bool): `[...]`; returns w with zeros where mask is False, contiguous."""
    w, mask = w.contiguous(), mask.contiguous()
    out = torch.empty(w.shape, dtype=w.dtype)
    require_c().masked_copy(w.data_ptr(), mask.data_ptr(), out.data_ptr(), w.numel(), w.element_size())
    return out


@kernel("threshold_mask", "native", lambda w, threshold: why_not_cpu(w, threshold))
def threshold_mask(w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; returns (bool |w| >= threshold, w where it is so and 0 elsewhere, the count as int64 0-dim)."""
    w = w.contiguous()
    mask = torch.empty(w.shape, dtype=torch.bool)
    out = torch.empty(w.shape, dtype=w.dtype)
    count, nans = require_c().threshold_mask(
        w.data_ptr(), DTYPE_CODES[w.dtype], float(threshold), mask.data_ptr(), out.data_ptr(), w.numel()
    )
    if nans:
        raise ValueError(
            f"threshold_mask: {nans} NaN among the values; find their source, or use torch.nan_to_num first"
        )
    return mask, out, torch.tensor(count)


def _why_not_mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> list[str]:
    reasons = why_not_cpu(grad, w) + _need_contiguous(grad, score_grad)
    if grad.dtype != w.dtype:
        reasons.append(f"needs grad and w of one dtype, got {grad.dtype} and {w.dtype}")
    if score_grad is not None:
        reasons += why_not_cpu(score_grad, dtypes=(torch.float32,))
    return reasons


@kernel("mask_gradient_", "native", _why_not_mask_gradient_)
def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> None:
    """All `[...]`: score_grad += grad * w with the dense gradient, then grad is zeroed where mask is False."""
    w, mask = w.contiguous(), mask.contiguous()
    score = 0 if score_grad is None else score_grad.data_ptr()
    require_c().mask_gradient(
        grad.data_ptr(), w.data_ptr(), DTYPE_CODES[grad.dtype], mask.data_ptr(), score, grad.numel()
    )


def _why_not_masked_adamw_(
    p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, mask: Tensor | None, *rest: object
) -> list[str]:
    reasons = why_not_cpu(p, grad) + why_not_cpu(exp_avg, exp_avg_sq, dtypes=(torch.float32,))
    if grad.dtype != p.dtype:
        reasons.append(f"needs p and grad of one dtype, got {p.dtype} and {grad.dtype}")
    return reasons + _need_contiguous(p, exp_avg, exp_avg_sq)


@kernel("masked_adamw_", "native", _why_not_masked_adamw_)
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
    """All `[...]`: one AdamW step in float32 (decoupled decay); p and moments exactly 0 where masked."""
    grad = grad.contiguous()
    mask = mask if mask is None else mask.contiguous()
    require_c().masked_adamw(
        p.data_ptr(),
        grad.data_ptr(),
        DTYPE_CODES[p.dtype],
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        0 if mask is None else mask.data_ptr(),
        p.numel(),
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    )
