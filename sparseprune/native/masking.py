"""Masking through the compiled core: one pass over memory each."""

from __future__ import annotations

from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ._checks import why_not_cpu


def _why_not_apply_mask_(w: Tensor, mask: Tensor) -> list[str]:
    reasons = why_not_cpu(w)
    if not (w.is_contiguous() and mask.is_contiguous()):
        reasons.append("needs contiguous tensors")
    return reasons


@kernel("apply_mask_", "native", _why_not_apply_mask_)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`, contiguous. Zeroes w where mask is False."""
    require_c().apply_mask(w.data_ptr(), mask.data_ptr(), w.numel(), w.element_size())
