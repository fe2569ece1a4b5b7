"""LayerNorm with the residual before it, and RMSNorm, through the compiled core."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ._inputs import rows_of, why_not_cpu

__all__ = ["add_layer_norm", "rms_norm"]


def _why_not_add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> list[str]:
    return why_not_cpu(x, residual, weight, bias)


@kernel("add_layer_norm", "native", _why_not_add_layer_norm)
def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype."""
    width = x.shape[-1]
    flat, add = rows_of(x, width), None if residual is None else rows_of(residual, width)
    gain, shift = weight.to(torch.float32).contiguous(), bias.to(torch.float32).contiguous()
    y = torch.empty(flat.shape[0], width)
    require_c().add_layer_norm(
        flat.data_ptr(),
        flat.stride(0),
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        gain.data_ptr(),
        shift.data_ptr(),
        eps,
        flat.shape[0],
        width,
        y.data_ptr(),
    )
    return y.to(x.dtype).view(x.shape)


@kernel("rms_norm", "native", lambda x, weight, eps: why_not_cpu(x, weight))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: `[..., D]`; weight `[D]`; returns x / sqrt(mean(x^2) + eps) * weight in the wider of the two dtypes."""
    width = x.shape[-1]
    rows = x if x.dtype is torch.float32 and x.is_contiguous() else rows_of(x, width)
    gain = weight if weight.dtype is torch.float32 and weight.is_contiguous() else weight.float().contiguous()
    y = torch.empty(x.shape, dtype=torch.float32)
    count = x.shape[:-1].numel()
    stride = width if rows is x else rows.stride(0)
    require_c().rms_norm(rows.data_ptr(), stride, gain.data_ptr(), eps, count, width, y.data_ptr())
    return y if x.dtype is weight.dtype is torch.float32 else y.to(torch.promote_types(x.dtype, weight.dtype))
