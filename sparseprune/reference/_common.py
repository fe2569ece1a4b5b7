"""What functions of several families share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["always", "reject_nan"]


def always(*args: object) -> list[str]:
    """No reason against it: the reference can run everything."""
    return []


def reject_nan(op: str, *tensors: Tensor) -> None:
    """ValueError where one of them holds a NaN."""
    if any(bool(torch.isnan(t).any()) for t in tensors):
        raise ValueError(
            f"{op}: NaN among the values, and NaN has no rank; find its source, or use torch.nan_to_num first"
        )
