"""Products with sparse weights, in plain torch: y = activation(x W^T + bias)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..activations import activate
from ..packing import Kind, Plan, quantise, to_dense
from ._common import always
from .int8 import rounded_product
from .packing import gather_values
from .sddmm import nm_columns, over_tokens


def dense_linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x: `[..., K]`, w `[N_out, K]` of any floating dtypes; sums in float32 or wider; returns x's dtype."""
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    if x.device.type == "cuda" and x.dtype == w.dtype and x.dtype in (torch.float16, torch.bfloat16):
        y = F.linear(x, w).to(wide)  # whose tensor cores sum in float32, and have no such speed in float32
        y = y if bias is None else y + bias
    else:
        y = F.linear(x.to(wide), w.to(wide), None if bias is None else bias.to(wide))
    return activate(y, activation).to(x.dtype)


def csr_to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """values `[nnz]` or blocks `[nblocks, r, c]`; returns `[N_out, k]`."""
    if values.dim() == 1:
        return csr_to_dense(crow_indices, col_indices, values[:, None, None], k)
    _, r, c = values.shape
    rows, columns = crow_indices.numel() - 1, k // c
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), counts, output_size=values.shape[0])
    blocks = values.new_zeros(rows * columns, r, c).index_put((row * columns + col_indices.long(),), values)
    return blocks.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)


@kernel("csr_linear", "reference", always)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`; bias `[N_out]`; returns activation(x W^T + bias) `[..., N_out]`."""
    return dense_linear(x, csr_to_dense(crow_indices, col_indices, values, x.shape[-1]), bias, activation)


@kernel("bsr_linear", "reference", always)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; bsr of `[N_out, K]`, values `[nblocks, r, c]`; bias `[N_out]`; returns `[..., N_out]`."""
    return dense_linear(x, csr_to_dense(crow_indices, col_indices, values, x.shape[-1]), bias, activation)


@kernel("nm_linear", "reference", always)
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values, indices (uint8) `[N_out, K / m * n]`; bias `[N_out]`; returns `[..., N_out]`."""
    w = values.new_zeros(values.shape[0], x.shape[-1]).scatter(1, nm_columns(indices, n, m), values)
    return dense_linear(x, w, bias, activation)


@kernel("csr_linear_dx", "reference", always)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; values `[nnz]` or blocks `[nblocks, r, c]`; returns dX = dY W, `[..., k]`."""
    w = csr_to_dense(crow_indices, col_indices, values, k)
    return dense_linear(dy, w.t(), None, "none")


@kernel("nm_linear_dx", "reference", always)
def nm_linear_dx(dy: Tensor, values: Tensor, indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """dy: `[..., N_out]`; an N:M weight of `[N_out, k]`; returns dX = dY W, `[..., k]`."""
    w = values.new_zeros(values.shape[0], k).scatter(1, nm_columns(indices, n, m), values)
    return dense_linear(dy, w.t(), None, "none")


@kernel("masked_linear", "reference", always)
def masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; w, mask (bool) `[N_out, K]`; bias `[N_out]`; returns `[..., N_out]`."""
    return dense_linear(x, w.masked_fill(~mask, 0), bias, "none")


@kernel("masked_linear_dx", "reference", always)
def masked_linear_dx(dy: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`; w, mask (bool) `[N_out, K]`; returns dy times the kept weights, `[..., K]`, in dy's dtype."""
    return dense_linear(dy, w.masked_fill(~mask, 0).t(), None, "none")


@kernel("masked_linear_dw", "reference", always)
def masked_linear_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`, x: `[..., K]`; returns `[N_out, K]` float32 or wider: dy x summed over tokens where kept."""
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    return over_tokens(x, dy, wide).masked_fill(~mask, 0)


@kernel("packed_linear", "reference", always)
def packed_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    """x: `[..., K]`; a packed weight `[N_out, K]`; residual `[..., N_out]`; returns activation(x W^T + bias) +
    residual.
    """
    named = Plan(*plan)
    if named.kind in (Kind.QUADS, Kind.BITMASK8):
        assert scale is not None
        y = rounded_product(x, index, offsets, values, scale, named)
        y = activate(y if bias is None else y + bias.float(), activation)
        return (y if residual is None else y + residual.float()).to(x.dtype)
    w = to_dense(index, offsets, values, scale, plan)
    wide = torch.promote_types(x.dtype, w.dtype)
    y = activate(F.linear(x.to(wide), w.to(wide), None if bias is None else bias.to(wide)), activation)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


@kernel("trained_linear", "reference", always)
def trained_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    perm: Tensor,
    plan: Sequence[int],
    t_index: Tensor,
    t_offsets: Tensor,
    t_perm: Tensor,
    t_plan: Sequence[int],
) -> Tensor:
    """x: `[..., K]`; canonical values of the packed structure of `[N_out, K]`; t_*: that of its transpose, for the
    backward.
    """
    packed = gather_values(values, perm, torch.promote_types(values.dtype, torch.float32))
    return packed_linear(x, packed, index, offsets, None, bias, None, plan, "none")


@kernel("inferred_linear", "reference", always)
def inferred_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    perm: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    dtype: torch.dtype,
    dense: bool,
    activation: str,
) -> Tensor:
    """x: `[..., K]`; canonical values of a packed structure, held in dtype (int8: with a scale a row); ``dense``: they
    are unpacked to multiply. Returns activation(x W^T + bias) + residual.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    if dtype == torch.int8:
        exact = gather_values(values, perm, wide)
        packed, scale = quantise(exact, index, offsets, plan)
    else:
        packed, scale = gather_values(values, perm, wide if dtype == torch.float32 else dtype), None
    return packed_linear(x, packed, index, offsets, scale, bias, residual, plan, activation)
