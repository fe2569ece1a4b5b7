"""Products with sparse weights through the compiled core: activation(x W^T + bias) + residual.

The canonical ops pack a structure on first sight and remember it as long as its index tensors live.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._registry import kernel
from ..activations import ACTIVATION_CODES, activate
from ..packing import VALUE_CODES, Kind, Packed, Plan, with_values
from ..tensor_state import Cached, cached_by
from ._inputs import DTYPE_CODES, rows_of, why_not_cpu
from .packing import gather_values, nm_structure_of, structure_of

__all__ = ["DTYPES", "linear", "why_not_linear"]

DTYPES = frozenset(DTYPE_CODES)  # of x


def _why_not_packed(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    activation: str,
) -> list[str]:
    reasons = why_not_cpu(x, bias, residual)
    if values.dtype not in VALUE_CODES:
        reasons.append(f"needs packed values in float32, bfloat16 or int8, got {values.dtype}")
    if plan[0] not in list(Kind):
        reasons.append("needs a form packed for the CPU, got one for a GPU")
    return reasons


@kernel("packed_linear", "native", _why_not_packed)
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
    """x: `[..., K]`; a packed weight `[N_out, K]`; residual `[..., N_out]`; returns `[..., N_out]` in x's dtype."""
    return linear(x, Packed(Plan(*plan), index, offsets, offsets, values, scale), bias, residual, activation)


def _why_not_trained(x: Tensor, values: Tensor, bias: Tensor | None, *rest: object) -> list[str]:
    return why_not_cpu(x, values, bias)


@kernel("trained_linear", "native", _why_not_trained)
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
    """x: `[..., K]`; canonical values of the packed structure of `[N_out, K]`; returns x W^T + bias, `[..., N_out]`."""
    packed = gather_values(values, perm, torch.float32)
    return packed_linear(x, packed, index, offsets, None, bias, None, plan, "none")


def _why_not_inferred(
    x: Tensor, values: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, bias: Tensor | None, *rest: object
) -> list[str]:
    return why_not_cpu(x, values, bias)


@kernel("inferred_linear", "native", _why_not_inferred)
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
    """x: `[..., K]`; canonical values of a packed structure; returns `[..., N_out]`. What is made of the values is kept
    with the structure, and made again when they have changed.
    """
    kept: Cached[Packed] = cached_by(("inferred", dtype), (perm,), Cached)
    empty = perm.new_empty(0, dtype=dtype)
    stored = values.numel() if plan[0] == Kind.QUADS else None  # the caller has held it against the structure
    structure = Packed(Plan(*plan), index, offsets, perm, empty, stored=stored)
    packed = kept.of((values,), lambda: with_values(structure, values, gather_values))
    if not dense:
        return linear(x, packed, bias, residual, activation)
    unpacked: Cached[Tensor] = cached_by(("inferred dense", dtype, x.dtype), (perm,), Cached)
    weight = unpacked.of((values,), lambda: packed.to_dense().to(x.dtype))
    y = activate(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    return y if residual is None else y + residual


def linear(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The direct call: no dispatcher, no autograd. x: `[..., K]` on the CPU; norm: weight `[N_out]`, bias `[N_out]` and
    eps of a LayerNorm over the result; returns `[..., N_out]` in x's dtype.
    """
    rows, stride = packed.plan.rows, packed.plan.columns
    dtype, lead = x.dtype, x.shape[:-1]
    if dtype is not torch.float32 or not x.is_contiguous():
        x = rows_of(x, stride)
        stride = x.stride(0)
    y = torch.empty((*lead, rows), dtype=torch.float32)
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    add = None if residual is None else rows_of(residual, rows)
    run = packed.weight.linear
    if norm is not None:
        gain, shift = (t.to(torch.float32).contiguous() for t in norm[:2])
        run = partial(packed.weight.linear_norm, gain.data_ptr(), shift.data_ptr(), norm[2])
    run(
        0 if bias is None else bias.data_ptr(),
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        ACTIVATION_CODES[activation],
        x.data_ptr(),
        stride,
        lead.numel(),
        y.data_ptr(),
    )
    return y if dtype is torch.float32 else y.to(dtype)


def why_not_linear(x: Tensor, packed: Packed) -> list[str]:
    """Reasons why :func:`linear` cannot run; empty where it can."""
    return why_not_cpu(x)


def _why_not_canonical(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, *rest: object) -> list[str]:
    bias = rest[0] if rest and isinstance(rest[0], Tensor) else None
    reasons = why_not_cpu(x, values, bias)
    if _native.C is not None and col.numel() >= 2**31 - 2**12:
        reasons.append(f"needs fewer than 2^31 kept entries, got {col.numel()}")
    return reasons


def _canonical(
    x: Tensor,
    rows: int,
    blocksize: tuple[int, int],
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    transpose: bool = False,
    k: int = 0,
) -> Tensor:
    shape = (rows, k if transpose else x.shape[-1])
    tokens = x.numel() // max(1, x.shape[-1])
    packed = with_values(structure_of(shape, blocksize, crow, col, tokens, transpose), values, gather_values)
    return linear(x, packed, bias, None, activation)


@kernel("csr_linear", "native", _why_not_canonical)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`; returns `[..., N_out]`."""
    rows = crow_indices.numel() - 1
    return _canonical(x, rows, (1, 1), crow_indices, col_indices, values, bias, activation)


@kernel("bsr_linear", "native", _why_not_canonical)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; bsr of `[N_out, K]`, values `[nblocks, r, c]`; returns `[..., N_out]`."""
    _, r, c = values.shape
    rows = (crow_indices.numel() - 1) * r
    return _canonical(x, rows, (r, c), crow_indices, col_indices, values, bias, activation)


@kernel("csr_linear_dx", "native", _why_not_canonical)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; values `[nnz]` or `[nblocks, r, c]`; returns dY W, `[..., k]`."""
    blocksize = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
    rows = (crow_indices.numel() - 1) * blocksize[0]
    return _canonical(dy, rows, blocksize, crow_indices, col_indices, values, None, "none", True, k)


@kernel("nm_linear", "native", lambda x, values, indices, n, m, bias, activation: why_not_cpu(x, values, bias))
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; nm weight `[N_out, K / m * n]`; returns `[..., N_out]`."""
    crow, col = nm_structure_of(indices, n, m)
    return _canonical(x, indices.shape[0], (1, 1), crow, col, values, bias, activation)


@kernel("nm_linear_dx", "native", lambda dy, values, indices, n, m, k: why_not_cpu(dy, values))
def nm_linear_dx(dy: Tensor, values: Tensor, indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """dy: `[..., N_out]`; an nm weight of `[N_out, k]`; returns dY W, `[..., k]`."""
    crow, col = nm_structure_of(indices, n, m)
    return _canonical(dy, indices.shape[0], (1, 1), crow, col, values.flatten(), None, "none", True, k)
