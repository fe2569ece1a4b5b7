"""What a step of a language model does beside its sparse weights, through the compiled core: RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ._checks import why_not_cpu
from .matmul import rows_of

__all__ = ["rms_norm"]


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
