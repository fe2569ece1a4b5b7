"""Sampled products, in plain torch: the gradient of a sparse weight at its kept entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import kernel
from ..packing import flat_positions
from ._common import always


def over_tokens(x: Tensor, dy: Tensor, dtype: torch.dtype) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[N_out, K]` in dtype: dy x summed over tokens."""
    tokens = x.shape[:-1].numel()
    return dy.reshape(tokens, dy.shape[-1]).to(dtype).t() @ x.reshape(tokens, x.shape[-1]).to(dtype)


@kernel("sddmm", "reference", always)
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[nblocks, r, c]`: sum over tokens of dy[n, o] x[n, k] at the kept
    blocks.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    rows, columns = dy.shape[-1] // r, x.shape[-1] // c
    dw = over_tokens(x, dy, wide)
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=x.device), counts, output_size=col_indices.numel())
    return dw.view(rows, r, columns, c).transpose(1, 2)[row, col_indices.long()]


def nm_columns(indices: Tensor, n: int, m: int) -> Tensor:
    """int64 `[N_out, K / m * n]`: the column of each kept entry."""
    return torch.arange(indices.shape[1], device=indices.device) // n * m + indices.long()


@kernel("nm_sddmm", "reference", always)
def nm_sddmm(x: Tensor, dy: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[N_out, K / m * n]`: dy x summed over tokens at the kept entries."""
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    return over_tokens(x, dy, wide).gather(1, nm_columns(indices, n, m))


@kernel("packed_sddmm", "reference", always)
def packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[n_values]` in canonical order, the gradient of the values of a
    packed form.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    dw = over_tokens(x, dy, wide).flatten()
    positions = flat_positions(index, offsets, plan)
    out = torch.zeros(n_values, dtype=wide, device=x.device)
    out[perm[: positions.numel()].long()] = dw[positions]
    return out
