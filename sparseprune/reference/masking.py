"""Masks that are written through, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._registry import kernel
from ._common import always, reject_nan


@kernel("apply_mask_", "reference", always)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`. Zeroes w where mask is False."""
    w.masked_fill_(~mask, 0)


# Selection: exact order statistics and the masks they give.


@kernel("masked_copy", "reference", always)
def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w, mask (bool): `[...]`; returns w with zeros where mask is False, contiguous."""
    return torch.where(mask, w, torch.zeros((), dtype=w.dtype, device=w.device)).contiguous()


@kernel("threshold_mask", "reference", always)
def threshold_mask(w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; returns (bool |w| >= threshold, w where it is so and 0 elsewhere, the count as int64 0-dim)."""
    reject_nan("threshold_mask", w)
    mask = (w.abs() >= threshold).contiguous()
    return mask, masked_copy(w, mask), mask.sum()


@kernel("mask_gradient_", "reference", always)
def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> None:
    """All `[...]`: score_grad += grad * w with the dense gradient, then grad is zeroed where mask is False."""
    if score_grad is not None:
        score_grad.add_(grad.to(score_grad.dtype) * w.to(score_grad.dtype))
    grad.masked_fill_(~mask, 0)


@kernel("masked_adamw_", "reference", always)
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
    """All `[...]`: one AdamW step (decoupled decay), computed in the dtype of the moments; p and moments 0 where
    masked.
    """
    wide = exp_avg.dtype
    g, value = grad.to(wide), p.to(wide) * (1 - lr * weight_decay)
    if mask is not None:
        g = g.masked_fill(~mask, 0)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    value = value - exp_avg / denominator * (lr / (1 - beta1**step))
    if mask is not None:
        for tensor in (value, exp_avg, exp_avg_sq):
            tensor.masked_fill_(~mask, 0)
    p.copy_(value)
