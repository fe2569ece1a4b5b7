"""From the structure of a canonical layout to a packed form: which kind, and its entries."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..tensor_state import place_of
from . import bitmask, groups
from .packed import Packed

__all__ = ["nm_as_csr", "pack_structure"]


def pack_structure(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    crow_indices: Tensor,
    col_indices: Tensor,
    tokens: int = 128,
    transpose: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """Packs the structure of a valid csr (blocksize (1, 1)) or bsr weight `[N_out, K]`; there are no values yet.

    tokens: the N it is tuned for (every N works); transpose: pack W^T `[K, N_out]`, for the gradient of x.
    """
    (rows, columns), (r, c) = shape, blocksize
    device = crow_indices.device
    if crow_indices.numel() != rows // r + 1 or rows % r or columns % c:
        raise ValueError(
            f"pack: crow_indices expected {rows // r + 1} entries for shape {list(shape)} and blocksize {blocksize}, "
            f"got {crow_indices.numel()}; the values decide the blocksize"
        )
    n_blocks = col_indices.numel()
    turned = ((columns, rows), (c, r)) if transpose else (shape, blocksize)
    height = groups.height_of(turned[1][0])
    density = n_blocks * r * c / max(1, rows * columns)
    masked = bitmask.wanted(height, tokens, density, dtype)
    if not masked and _native.C is not None and _in_memory(crow_indices) and _in_memory(col_indices):
        parts = groups.pack_canonical(
            turned[0], height, crow_indices, col_indices, blocksize, transpose, tokens, density
        )
        return Packed(*parts, torch.empty(0, dtype=dtype))
    if n_blocks and not 0 <= int(col_indices.min()) <= int(col_indices.max()) < columns // c:
        raise ValueError(f"pack: col_indices expected in [0, {columns // c}), got up to {int(col_indices.max())}")
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    block_row = torch.repeat_interleave(torch.arange(rows // r, device=device), counts, output_size=n_blocks)
    block_column = col_indices.long()
    if transpose:
        rows, columns, r, c = columns, rows, c, r
        block_row, block_column = block_column, block_row
    # one entry a (block, sub-group of rows, column): its group, its column and the places of its values
    sub = torch.arange(r // height, device=device).view(1, -1, 1)
    within = torch.arange(c, device=device).view(1, 1, -1)
    group = (block_row.view(-1, 1, 1) * (r // height) + sub).expand(-1, -1, c).reshape(-1)
    column = (block_column.view(-1, 1, 1) * c + within).expand(-1, r // height, -1).reshape(-1)
    row_step, column_step = (1, r) if transpose else (c, 1)
    first = torch.arange(n_blocks, device=device).view(-1, 1, 1) * (r * c)
    canonical = (first + sub * (height * row_step) + within * column_step).expand(n_blocks, r // height, c).reshape(-1)

    if masked:
        parts = bitmask.pack((rows, columns), group, column, canonical)
    else:
        parts = groups.pack((rows, columns), height, group, column, canonical, row_step, tokens, density)
    return Packed(*parts, torch.empty(0, dtype=dtype, device=device))


def _in_memory(indices: Tensor) -> bool:
    """Whether the compiled core can read them: not while they are traced, for then there are no bytes."""
    return indices.dtype == torch.int32 and indices.device.type == "cpu" and bool(place_of(indices))


def nm_as_csr(indices: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(crow_indices, col_indices) int32 of an nm weight; its values, flattened, are the csr's."""
    rows, kept = indices.shape
    crow = torch.arange(rows + 1, dtype=torch.int32, device=indices.device) * kept
    group = torch.arange(kept, dtype=torch.int32, device=indices.device) // n
    return crow, (group * m + indices.to(torch.int32)).flatten()
