"""Dense weights held in fewer bits than they are multiplied in, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ._common import always


@kernel("rounded_linear", "reference", always)
def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """x: `[..., K]`; weight bfloat16, or int8 with a scale `[N]`, `[N, K]`; bias `[N]`; returns x W^T * scale + bias
    `[..., N]` in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    held = weight.to(wide) if scale is None else weight.to(wide) * scale.to(wide).unsqueeze(1)
    return F.linear(x.to(wide), held, None if bias is None else bias.to(wide)).to(x.dtype)
