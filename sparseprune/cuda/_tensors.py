"""How tensors are handed to a kernel: dense, aligned, by address."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["address", "aligned", "as_dtype"]


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, dense and 16-byte aligned; a view that begins elsewhere is copied."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def address(tensor: Tensor | None) -> int:
    """Where its memory begins; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def as_dtype(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in this dtype, dense, without its gradient."""
    return None if tensor is None else tensor.detach().to(dtype).contiguous()
