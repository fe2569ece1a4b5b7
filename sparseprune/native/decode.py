"""What a step of a language model does beside its sparse weights, through the compiled core: RMSNorm, and dense
weights in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ._checks import why_not_cpu
from .matmul import rows_of

__all__ = ["rms_norm", "rounded_linear"]


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


def _why_not_rounded(x: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    reasons = why_not_cpu(x, bias) + why_not_cpu(weight, dtypes=(torch.bfloat16,))
    return reasons if weight.is_contiguous() and weight.numel() else [*reasons, "needs a contiguous weight, not empty"]


@kernel("rounded_linear", "native", _why_not_rounded)
def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; weight bfloat16 `[N, K]`, contiguous; bias `[N]`; returns x W^T + bias `[..., N]` in x's dtype."""
    rows, columns = weight.shape
    flat = rows_of(x, columns)
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    require_c().rounded_linear(
        weight.data_ptr(),
        rows,
        columns,
        flat.data_ptr(),
        flat.stride(0),
        flat.shape[0],
        0 if shift is None else shift.data_ptr(),
        y.data_ptr(),
    )
    return y.to(x.dtype)
