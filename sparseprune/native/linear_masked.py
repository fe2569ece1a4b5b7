"""The masked Linear through the compiled core: where the mask drops most of the weight, the sparse product of what it
keeps, whose structure is packed once a mask; else one masked copy and torch's dense product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ..tensor_state import cached_by
from ._inputs import why_not_cpu
from .linear import csr_linear, csr_linear_dx
from .masking import apply_mask_, masked_copy
from .sddmm import sddmm

__all__ = ["SPARSE_UP_TO", "masked_linear", "masked_linear_dw", "masked_linear_dx"]

#: Density of the mask up to which the sparse product is taken. There, forward and backward together run 1.2 to 2.1
#: times as fast as the dense products with a masked copy (128 and 512 tokens; 0.7 to 1.1 at 8), at 0.1 2.1 to 4.1
#: times (768x768 and 3072x768, two threads of an AMD EPYC, Zen 4, AVX-512).
SPARSE_UP_TO = 0.3


class Kept(NamedTuple):
    """What a mask keeps, as csr; place: int64 `[nnz]`, where in the flat weight. crow None: too much to be sparse."""

    crow: Tensor | None
    col: Tensor
    place: Tensor


def _kept(mask: Tensor) -> Kept:
    def make() -> Kept:
        (rows, columns), flags = mask.shape, mask.contiguous()
        crow = torch.empty(rows + 1, dtype=torch.int32)
        kept = require_c().count_kept(flags.data_ptr(), rows, columns, crow.data_ptr())
        if kept > min(SPARSE_UP_TO * mask.numel(), 2**31 - 1) or mask.numel() == 0:
            return Kept(None, torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int64))
        col, place = torch.empty(kept, dtype=torch.int32), torch.empty(kept, dtype=torch.int64)
        require_c().list_kept(flags.data_ptr(), rows, columns, crow.data_ptr(), col.data_ptr(), place.data_ptr())
        return Kept(crow, col, place)

    return cached_by(("mask",), (mask,), make)


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


@kernel("masked_linear", "native", lambda x, w, mask, bias: why_not_cpu(x, w, bias))
def masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; w, mask (bool) `[N_out, K]`; bias `[N_out]`; returns `[..., N_out]` in x's dtype."""
    crow, col, place = _kept(mask)
    if crow is not None:
        return csr_linear(x, crow, col, w.detach().flatten()[place], bias, "none")
    return F.linear(x.float(), masked_copy(w, mask).float(), _wide(bias)).to(x.dtype)


@kernel("masked_linear_dx", "native", lambda dy, w, mask: why_not_cpu(dy, w))
def masked_linear_dx(dy: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`; w, mask (bool) `[N_out, K]`; returns dy times the kept weights, `[..., K]`, in dy's dtype."""
    crow, col, place = _kept(mask)
    if crow is not None:
        return csr_linear_dx(dy, crow, col, w.detach().flatten()[place], w.shape[1])
    return F.linear(dy.float(), masked_copy(w, mask).float().t()).to(dy.dtype)


@kernel("masked_linear_dw", "native", lambda dy, x, mask: why_not_cpu(dy, x))
def masked_linear_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`, x: `[..., K]`; returns float32 `[N_out, K]`: dy x summed over tokens where kept, else 0."""
    crow, col, place = _kept(mask)
    if crow is not None:
        gradient = torch.zeros(mask.numel())
        gradient[place] = sddmm(x, dy, crow, col, 1, 1).flatten()
        return gradient.view(mask.shape)
    tokens = x.shape[:-1].numel()
    gradient = dy.reshape(tokens, dy.shape[-1]).float().t() @ x.reshape(tokens, x.shape[-1]).float()
    apply_mask_(gradient, mask)
    return gradient
