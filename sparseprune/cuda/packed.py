"""Weights of which only what the GPU kernels read is held: packed once, multiplied by ``packed_linear``.

:mod:`sparseprune.packing.gpu` has the kinds. A call for which a form has no kernel (deltas for more than 8 tokens,
strips in float32) unpacks it for the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel, kernels_of
from ..activations import activate
from ..packing import STRIP_COLUMNS, STRIP_ROWS, GpuKind, Packed, Plan, delta_entries, nm_as_csr, to_dense
from ._environment import why_not_cuda
from .deltas import DELTA_TOKENS, Deltas, deltas_linear, pack_deltas
from .linear import HALVES, better_by_triton, csr_as_it_is, wants_strips, why_not_size
from .strips import Bitmap, Strips, bitmap_of, filled, strips_linear
from .structures import Csr, made_of_blocks

__all__ = ["pack_blocks", "pack_entries", "pack_nm", "packed_linear"]


def pack_entries(structure: Csr, columns: int, canonical: Tensor, tokens: int) -> Packed:
    """A weight `[rows, columns]` whose canonical values the structure takes, as products of so many tokens read it. The
    values as they are, in their dtype.
    """
    rows, entries, dtype = structure.crow.numel() - 1, structure.col.numel(), canonical.dtype

    def made(kind: GpuKind, sizes: tuple[int, int, int], index: Tensor, offsets: Tensor, values: Tensor) -> Packed:
        height, k_block, row_block = sizes
        plan = Plan(int(kind), rows, columns, height, k_block, row_block)
        return Packed(plan, index, offsets, offsets.new_empty(0), values, stored=entries)

    if entries and wants_strips(tokens, entries, rows, columns, dtype):
        bitmap = bitmap_of((rows, columns), structure.crow, structure.col)
        strips = filled(bitmap, structure, canonical, dtype)
        sizes = bitmap.most, STRIP_COLUMNS, STRIP_ROWS
        return made(GpuKind.STRIPS, sizes, bitmap.words, bitmap.starts, strips.values)
    if entries and tokens <= DELTA_TOKENS:
        deltas = pack_deltas(structure, columns)
        if deltas.pay(entries):
            values = deltas.filled(canonical, dtype)
            return made(GpuKind.DELTAS, (entries, columns, rows), deltas.deltas, deltas.starts, values)
    values = structure.values(canonical, dtype)
    return made(GpuKind.ENTRIES, (1, 1, rows), structure.col, structure.crow, values)


def pack_blocks(crow: Tensor, col: Tensor, values: Tensor, columns: int, tokens: int) -> Packed:
    """Blocks `[nblocks, r, c]`: as they are where Triton's kernel takes them, else entry by entry."""
    _, r, c = values.shape
    probe = values.new_empty(min(tokens, 128), columns)
    if better_by_triton("bsr_linear", probe, crow, col, values, None, "none"):
        rows = (crow.numel() - 1) * r
        plan = Plan(int(GpuKind.BLOCKS), rows, columns, r, c, rows)
        return Packed(plan, col, crow, crow.new_empty(0), values, stored=values.numel())
    return pack_entries(made_of_blocks(crow, col, (r, c)), columns, values, tokens)


def pack_nm(values: Tensor, indices: Tensor, n: int, m: int, tokens: int) -> Packed:
    """An N:M weight, entry by entry; 2:4, too, whose compressed form is torch's own."""
    columns = indices.shape[1] // n * m
    return pack_entries(Csr(*nm_as_csr(indices, n, m)), columns, values, tokens)


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
    if plan[0] not in list(GpuKind):
        return [f"needs a form packed for a GPU, got one for the CPU on {index.device}"]
    reasons = why_not_cuda(x, values, bias) + why_not_size(x, values.numel())
    for name, tensor in (("index", index), ("offsets", offsets), ("residual", residual)):
        if tensor is not None and tensor.device != x.device:
            reasons.append(f"needs {name} on {x.device}, got {tensor.device}")
    return reasons


@kernel("packed_linear", "cuda", _why_not_packed)
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
    """x: `[..., K]`; a weight `[N_out, K]` of a GPU kind; residual `[..., N_out]`; returns `[..., N_out]` in x's dtype,
    the values multiplied in it.
    """
    y = _product(x, values, index, offsets, bias, Plan(*plan), activation)
    return y if residual is None else (y + residual).to(x.dtype)


def _product(
    x: Tensor, values: Tensor, index: Tensor, offsets: Tensor, bias: Tensor | None, plan: Plan, activation: str
) -> Tensor:
    shape = plan.rows, plan.columns
    if plan.kind == GpuKind.BLOCKS:
        arguments = x, offsets, index, values, bias, activation
        return next(k for k in kernels_of("bsr_linear") if not k.why_not(*arguments)).run(*arguments)
    if plan.kind == GpuKind.STRIPS:
        if x.dtype in HALVES:
            strips = Strips(Bitmap(shape, index, offsets, plan.height), values.to(x.dtype))
            return strips_linear(x, strips, bias, activation)
        weight = to_dense(index, offsets, values, None, plan).to(x.dtype)
        return activate(F.linear(x, weight, None if bias is None else bias.to(x.dtype)), activation)
    if plan.kind == GpuKind.DELTAS:
        if x.shape[:-1].numel() <= DELTA_TOKENS:
            deltas = Deltas(shape, offsets, index, index.new_empty(0))
            return deltas_linear(x, deltas, values.to(x.dtype), bias, activation)
        offsets, index, at = delta_entries(index, offsets, plan)
        values = values[at]
    return csr_as_it_is(x, offsets, index, values.to(x.dtype), bias, activation)
