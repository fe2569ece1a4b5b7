"""Sampled products through the compiled core: the gradient of a sparse weight at its kept entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ..packing import Kind, Plan
from ._inputs import rows_of, why_not_cpu
from .packing import nm_structure_of, raise_outside, structure_of

__all__ = ["nm_sddmm", "packed_sddmm", "sddmm"]


def _why_not_packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> list[str]:
    reasons = why_not_cpu(x, dy)
    if Plan(*plan).kind != Kind.GROUPS:
        reasons.append("a bitmask serves inference only; pack with tokens > 8 to train")
    return reasons


@kernel("packed_sddmm", "native", _why_not_packed_sddmm)
def packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[n_values]` in canonical order, the gradient of the kept values."""
    sizes = Plan(*plan)
    flat, grad_y = rows_of(x, sizes.columns), rows_of(dy, sizes.rows)
    grad, canonical = torch.empty(perm.numel()), torch.empty(n_values)
    core = require_c()
    core.sddmm(
        sizes,
        index.data_ptr(),
        offsets.data_ptr(),
        flat.data_ptr(),
        flat.stride(0),
        grad_y.data_ptr(),
        grad_y.stride(0),
        flat.shape[0],
        grad.data_ptr(),
    )
    outside = core.scatter_values(
        grad.data_ptr(), perm.data_ptr(), perm.numel(), canonical.data_ptr(), canonical.numel()
    )
    raise_outside("packed_sddmm", outside, n_values)
    return canonical


@kernel("sddmm", "native", lambda x, dy, crow, col, r, c: why_not_cpu(x, dy))
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[nblocks, r, c]`: sum over tokens of dy[n, o] x[n, k], kept blocks
    only.
    """
    shape = (dy.shape[-1], x.shape[-1])
    packed = structure_of(shape, (r, c), crow_indices, col_indices, 128)
    n_values = col_indices.numel() * r * c
    flat = packed_sddmm(x, dy, packed.index, packed.offsets, packed.perm, packed.plan, n_values)
    return flat.view(-1, r, c)


@kernel("nm_sddmm", "native", lambda x, dy, indices, n, m: why_not_cpu(x, dy))
def nm_sddmm(x: Tensor, dy: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[N_out, K / m * n]`: dy x summed over tokens at the kept entries."""
    return sddmm(x, dy, *nm_structure_of(indices, n, m), 1, 1).view(indices.shape)
