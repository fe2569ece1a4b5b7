"""Masking ops: weights and gradients held to their mask, one pass over memory each."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import check_mask, define

__all__ = ["apply_mask_"]


define("apply_mask_(Tensor(a!) w, Tensor mask) -> ()", "apply_mask_", lambda w, mask: None, mutates=(0,))


def apply_mask_(w: Tensor, mask: Tensor) -> Tensor:
    """w: `[...]`, any floating dtype; mask: bool `[...]`, True = kept. Zeroes w in place where mask is False and returns w.

    Raises ValueError on a mask of another dtype, shape or device. Autograd sees the write: w's version counter rises.
    """
    check_mask("apply_mask_", w, mask)
    torch.ops.sparseprune.apply_mask_(w, mask)
    return w
