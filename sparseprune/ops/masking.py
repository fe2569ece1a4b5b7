"""Masking ops: weights and gradients held to their mask, one pass over memory each."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_mask, define

__all__ = ["apply_mask_", "mask_gradient_", "masked_adamw_", "masked_copy", "threshold_mask"]


define("apply_mask_(Tensor(a!) w, Tensor mask) -> ()", "apply_mask_", lambda w, mask: None, mutates=(0,))
define("masked_copy(Tensor w, Tensor mask) -> Tensor", "masked_copy", lambda w, mask: w.new_empty(w.shape))
define(
    "threshold_mask(Tensor w, Tensor threshold) -> (Tensor, Tensor, Tensor)",
    "threshold_mask",
    lambda w, threshold: (
        w.new_empty(w.shape, dtype=torch.bool),
        w.new_empty(w.shape),
        w.new_empty((), dtype=torch.int64),
    ),
)
define(
    "mask_gradient_(Tensor(a!) grad, Tensor w, Tensor mask, Tensor(b!)? score_grad) -> ()",
    "mask_gradient_",
    lambda grad, w, mask, score_grad: None,
    mutates=(0, 3),
)
define(
    "masked_adamw_(Tensor(a!) p, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor? mask, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay) -> ()",
    "masked_adamw_",
    lambda *args: None,
    mutates=(0, 2, 3),
)


def _check_like(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape or tensor.device != like.device:
        raise ValueError(
            f"{op}: {name} expected shape {list(like.shape)} on {like.device}, "
            f"got {list(tensor.shape)} on {tensor.device}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} expected a floating dtype, got {tensor.dtype}")


def apply_mask_(w: Tensor, mask: Tensor) -> Tensor:
    """w: `[...]`, any floating dtype; mask: bool `[...]`, True = kept. Zeroes w in place where mask is False and
    returns w.

    Zeroes inf and NaN too. Raises ValueError on a mask of another dtype, shape or device. Not recorded by autograd, as
    a write under ``no_grad``; yet autograd sees it: w's version counter rises.
    """
    check_mask("apply_mask_", w, mask)
    torch.ops.sparseprune.apply_mask_(w.detach(), mask)
    return w


def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w: `[...]`, any floating dtype; mask: bool `[...]`; returns a copy of w with zeros where mask is False,
    contiguous.
    """
    check_mask("masked_copy", w, mask)
    return torch.ops.sparseprune.masked_copy(w.detach(), mask)


def threshold_mask(w: Tensor, threshold: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; threshold: a number or 0-dim, rounded to w's dtype; returns (mask, masked copy, count), one pass over
    w.

    mask: bool `[...]`, ``|w| >= threshold``; masked copy: w with zeros elsewhere; count: the number of True, int64
    0-dim. With the threshold from :func:`kth_magnitude` the count exceeds k by the ties left in; :func:`magnitude_mask`
    cuts them. Raises ValueError on NaN.
    """
    if not w.is_floating_point():
        raise ValueError(f"threshold_mask: w expected a floating dtype, got {w.dtype}")
    limit = threshold.detach() if isinstance(threshold, Tensor) else torch.tensor(threshold, dtype=torch.float64)
    if limit.dim():
        raise ValueError(
            f"threshold_mask: threshold expected a number or a 0-dim tensor, got shape {list(limit.shape)}"
        )
    return torch.ops.sparseprune.threshold_mask(w.detach(), limit.to(device=w.device, dtype=w.dtype))


def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None = None) -> Tensor:
    """grad, w: `[...]`; mask: bool `[...]`; score_grad: `[...]` float32 (or grad's dtype) or None. Returns grad.

    One pass: ``score_grad += grad * w`` with the dense gradient (the straight-through gradient of the mask's scores),
    then grad is zeroed in place where mask is False.
    """
    check_mask("mask_gradient_", grad, mask)
    _check_like("mask_gradient_", "w", w, grad)
    if score_grad is not None:
        _check_like("mask_gradient_", "score_grad", score_grad, grad)
        score_grad = score_grad.detach()
    torch.ops.sparseprune.mask_gradient_(grad.detach(), w.detach(), mask, score_grad)
    return grad


def masked_adamw_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    step: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """p, grad, exp_avg, exp_avg_sq: `[...]`; mask: bool `[...]` or None. One AdamW step in place, one pass over memory.

    step counts from 1. Decoupled weight decay (Loshchilov and Hutter 2019), computed in the moments' dtype, which may
    be wider than p's. Where mask is False p and both moments become exactly 0, whatever the gradient holds there.
    """
    if mask is not None:
        check_mask("masked_adamw_", p, mask)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _check_like("masked_adamw_", name, tensor, p)
    if step < 1:
        raise ValueError(f"masked_adamw_: step expected to be at least 1, got {step}")
    torch.ops.sparseprune.masked_adamw_(
        p.detach(),
        grad.detach(),
        exp_avg.detach(),
        exp_avg_sq.detach(),
        mask,
        step,
        lr,
        beta1,
        beta2,
        eps,
        weight_decay,
    )
