"""Values between canonical and packed order through the compiled core, and structures packed on first sight."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ..packing import VALUE_CODES, Packed, nm_as_csr, pack_structure
from ..tensor_state import cached_by
from ._inputs import why_not_cpu

__all__ = ["gather_values", "nm_structure_of", "raise_outside", "structure_of"]


def structure_of(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    crow_indices: Tensor,
    col_indices: Tensor,
    tokens: int,
    transpose: bool = False,
) -> Packed:
    """:func:`pack_structure`, made once for these index tensors."""
    tuned = 1 if tokens == 1 else 8 if tokens <= 8 else 32 if tokens <= 32 else 128
    key = ("structure", shape, blocksize, tuned, transpose)
    return cached_by(
        key,
        (crow_indices, col_indices),
        lambda: pack_structure(shape, blocksize, crow_indices, col_indices, tuned, transpose),
    )


def nm_structure_of(indices: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """:func:`nm_as_csr`, made once for this index tensor."""
    return cached_by(("nm", n, m), (indices,), lambda: nm_as_csr(indices, n, m))


def _why_not_gather(values: Tensor, perm: Tensor, dtype: torch.dtype) -> list[str]:
    reasons = why_not_cpu(values)
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"writes float32 or bfloat16, not {dtype}")
    return reasons


@kernel("gather_values", "native", _why_not_gather)
def gather_values(values: Tensor, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """values: any shape, canonical order; perm int32 `[packed]`, -1 where no value is; returns `[packed]`. ValueError
    where perm points outside of values.
    """
    flat = values.to(torch.float32).contiguous()
    packed = torch.empty(perm.numel(), dtype=dtype)
    outside = require_c().gather_values(
        flat.data_ptr(), flat.numel(), perm.data_ptr(), perm.numel(), packed.data_ptr(), VALUE_CODES[dtype]
    )
    raise_outside("gather_values", outside, flat.numel())
    return packed


def raise_outside(op: str, outside: int, size: int) -> None:
    """ValueError where places of a permutation lay outside of the canonical values."""
    if outside:
        raise ValueError(
            f"{op}: perm expected -1 or places in [0, {size}), got {outside} others; pack the layout that these values "
            "belong to"
        )
