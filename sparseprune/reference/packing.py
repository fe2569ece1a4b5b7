"""Values between canonical and packed order, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from ._common import always


@kernel("gather_values", "reference", always)
def gather_values(values: Tensor, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """values: any shape, canonical order; perm int32 `[packed]`, -1 where a packed place holds no value; returns
    `[packed]`.
    """
    flat = values.flatten()
    if flat.numel() == 0 and not bool((perm >= 0).any()):
        return torch.zeros(perm.numel(), dtype=dtype, device=values.device)
    return torch.where(perm < 0, 0, flat[perm.clamp(min=0).long()]).to(dtype)
