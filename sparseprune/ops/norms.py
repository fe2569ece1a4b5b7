"""LayerNorm with the residual before it, and RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ._library import define, in_forward_mode, needs_grad

__all__ = ["add_layer_norm", "rms_norm"]

_OPS = torch.ops.sparseprune


define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    "add_layer_norm",
    lambda x, residual, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype. For inference; where a
    derivative is needed it is composed from torch's own ops.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"add_layer_norm: weight and bias expected [{x.shape[-1]}], got {list(weight.shape)}")
    if needs_grad(x, residual, weight, bias) or in_forward_mode():
        total = x if residual is None else x + residual
        return torch.nn.functional.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return _OPS.add_layer_norm(x, residual, weight, bias, eps)


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm",
    lambda x, weight, eps: x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x: `[..., D]`; weight `[D]`; returns x / sqrt(mean(x^2) + eps) * weight in the wider of the two dtypes (Zhang and
    Sennrich, 2019). For inference; where a derivative is needed it is composed from torch's own ops. ValueError where
    the weight is not as long as x's last dimension, and on a scalar.
    """
    if x.dim() < 1:
        raise ValueError("rms_norm: x expected shape [..., D], got a scalar")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight expected [{x.shape[-1]}], got {list(weight.shape)}")
    if needs_grad(x, weight) or in_forward_mode():
        return reference.rms_norm(x, weight, eps)
    return _OPS.rms_norm(x, weight, eps)
