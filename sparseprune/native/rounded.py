"""Dense weights held in fewer bits than they are multiplied in, through the compiled core."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ..packing import VALUE_CODES
from ._inputs import rows_of, why_not_cpu

__all__ = ["rounded_linear"]


def _why_not_rounded(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> list[str]:
    reasons = why_not_cpu(x, bias, scale) + why_not_cpu(weight, dtypes=(torch.bfloat16, torch.int8))
    return reasons if weight.is_contiguous() and weight.numel() else [*reasons, "needs a contiguous weight, not empty"]


@kernel("rounded_linear", "native", _why_not_rounded)
def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """x: `[..., K]`; weight bfloat16, or int8 with a scale float32 `[N]`, `[N, K]`, contiguous; bias `[N]`; returns
    x W^T * scale + bias `[..., N]` in x's dtype.
    """
    rows, columns = weight.shape
    flat = rows_of(x, columns)
    shift = None if bias is None else bias.to(torch.float32).contiguous()
    y = torch.empty((*x.shape[:-1], rows), dtype=torch.float32)
    require_c().rounded_linear(
        weight.data_ptr(),
        VALUE_CODES[weight.dtype],
        0 if scale is None else scale.data_ptr(),
        rows,
        columns,
        flat.data_ptr(),
        flat.stride(0),
        flat.shape[0],
        0 if shift is None else shift.data_ptr(),
        y.data_ptr(),
    )
    return y.to(x.dtype)
