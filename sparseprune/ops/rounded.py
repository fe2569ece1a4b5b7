"""Dense weights held in fewer bits than they are multiplied in."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_linear, define, needs_grad, output_for

__all__ = ["rounded_linear"]

_OPS = torch.ops.sparseprune


define(
    "rounded_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scale=None) -> Tensor",
    "rounded_linear",
    lambda x, weight, bias, scale=None: output_for(x, weight.shape[0]),
)


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x: `[..., K]`; weight bfloat16, or int8 with a scale float32 `[N_out]`, `[N_out, K]`, dense; bias `[N_out]`;
    returns x W^T * scale + bias, `[..., N_out]`, sums in float32: for few tokens, where reading the weight is what
    takes the time. For inference: RuntimeError where a gradient would be needed. ValueError on shapes that do not fit
    and on a weight of another dtype.
    """
    if needs_grad(x, weight, bias, scale):
        raise RuntimeError("rounded_linear has no gradient; use F.linear, or torch.no_grad()")
    dtype = torch.bfloat16 if scale is None else torch.int8
    if weight.dim() != 2 or weight.dtype != dtype:
        raise ValueError(f"rounded_linear: weight expected {dtype} [N, K], got {weight.dtype} {list(weight.shape)}")
    if scale is not None and (scale.dtype != torch.float32 or scale.shape != weight.shape[:1]):
        raise ValueError(
            f"rounded_linear: scale expected float32 [{weight.shape[0]}], got {scale.dtype} {list(scale.shape)}"
        )
    check_linear("rounded_linear", x, weight.shape[0], weight.shape[1], bias, "none")
    return _OPS.rounded_linear(x, weight.contiguous(), bias, None if scale is None else scale.contiguous())
