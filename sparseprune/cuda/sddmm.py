"""Sampled products on NVIDIA cards: the gradient of a sparse weight at its kept entries, no dense gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from ._environment import DTYPE_CODES, launching, multiprocessors, why_not_cuda
from ._tensors import aligned
from .linear import better_by_triton, why_not_size
from .strips import HALVES
from .structures import Csr, csr_of, edges_of, nm_entries

__all__ = ["nm_sddmm", "sampled", "sddmm"]

ROW_WARPS = 8  # rows a block of the float32 kernel


def sampled(x: Tensor, dy: Tensor, structure: Csr) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]` of one dtype; returns float32 `[nnz]`: dy x summed over tokens at the entries.

    16 bits: dense tiles on the tensor cores, of which the kept entries are written. float32: entry by entry.
    """
    rows, columns = structure.crow.numel() - 1, x.shape[-1]
    left, right = (t.detach().reshape(t.shape[:-1].numel(), t.shape[-1]) for t in (dy, x))
    tokens, entries = left.shape[0], structure.col.numel()
    if tokens == 0 or entries == 0:
        return torch.zeros(entries, dtype=torch.float32, device=x.device)
    out = torch.empty(entries, dtype=torch.float32, device=x.device)
    crow, col = structure.crow.contiguous(), structure.col.contiguous()
    if x.dtype in HALVES:
        left, right = aligned(left), aligned(right)
        with launching(x) as (cuda, stream):
            edges = edges_of(structure.crow, structure.col, columns, cuda.SDDMM_TILE)
            cuda.sddmm_tiles(
                left.data_ptr(), right.data_ptr(), edges.data_ptr(), col.data_ptr(), out.data_ptr(), tokens, rows,
                columns, DTYPE_CODES[x.dtype], rows % 8 == 0 and columns % 8 == 0, stream,
            )  # fmt: skip
        return out
    stride = -(-tokens // 4) * 4
    turned = [t.new_zeros(t.shape[1], stride) for t in (left, right)]
    turned[0][:, :tokens], turned[1][:, :tokens] = left.t(), right.t()
    blocks = -(-rows // ROW_WARPS)
    splits = max(1, min(8, 4 * multiprocessors(x) // blocks, entries // rows // 32 + 1))
    with launching(x) as (cuda, stream):
        cuda.sddmm_rows(
            turned[0].data_ptr(), turned[1].data_ptr(), stride, crow.data_ptr(), col.data_ptr(), out.data_ptr(), rows,
            splits, stream,
        )  # fmt: skip
    return out


def _why_not_sampled(x: Tensor, dy: Tensor, entries: int) -> list[str]:
    reasons = why_not_cuda(x, dy) + why_not_size(x, entries)
    if x.dtype != dy.dtype:
        reasons.append(f"needs x and dy of one dtype, got {x.dtype} and {dy.dtype}")
    return reasons


def _why_not_sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> list[str]:
    reasons = _why_not_sampled(x, dy, col_indices.numel() * r * c)
    if col_indices.device != x.device or crow_indices.device != x.device:
        reasons.append(f"needs indices on {x.device}, got {crow_indices.device} and {col_indices.device}")
    if col_indices.dtype != torch.int32 or crow_indices.dtype != torch.int32:
        reasons.append(f"needs int32 indices, got {crow_indices.dtype} and {col_indices.dtype}")
    if reasons or (r, c) == (1, 1):
        return reasons
    return better_by_triton("sddmm", x, dy, crow_indices, col_indices, r, c)


@kernel("sddmm", "cuda", _why_not_sddmm)
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns float32 `[nblocks, r, c]`: dy x summed over tokens at kept blocks."""
    structure = csr_of(crow_indices, col_indices, (r, c))
    found = sampled(x, dy, structure)
    if structure.place is not None:
        canonical = torch.empty_like(found)
        canonical[structure.place] = found
        found = canonical
    return found.view(col_indices.numel(), r, c)


def _why_not_nm_sddmm(x: Tensor, dy: Tensor, indices: Tensor, n: int, m: int) -> list[str]:
    reasons = _why_not_sampled(x, dy, indices.numel())
    if indices.device != x.device:
        reasons.append(f"needs indices on {x.device}, got {indices.device}")
    return reasons


@kernel("nm_sddmm", "cuda", _why_not_nm_sddmm)
def nm_sddmm(x: Tensor, dy: Tensor, indices: Tensor, n: int, m: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns float32 `[N_out, K / m * n]`: dy x summed over tokens at the kept
    entries.
    """
    return sampled(x, dy, nm_entries(indices, n, m)).view(indices.shape)
