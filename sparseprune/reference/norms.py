"""LayerNorm with the residual before it, and RMSNorm, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ._common import always


@kernel("add_layer_norm", "reference", always)
def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    return F.layer_norm(total, (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)


@kernel("rms_norm", "reference", always)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: `[..., D]`; weight `[D]`; returns x / sqrt(mean(x^2) + eps) * weight in the wider of the two dtypes."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide)).to(torch.promote_types(x.dtype, weight.dtype))
