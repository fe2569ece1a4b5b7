"""What the kernels need of a sparse structure beside its own indices: made once, on the device, and remembered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device_memory import remembered
from ..packing import nm_as_csr

__all__ = ["Csr", "csr_of", "edges_of", "entries_of_blocks", "made_of_blocks", "nm_entries", "transposed"]


@dataclass(frozen=True)
class Csr:
    """A csr structure whose values are others' values: crow int32 `[rows + 1]`; col int32 `[nnz]`, rising within a
    row; place int32 `[nnz]`: where in the canonical values, flattened, each entry's value lies; None: in order.
    """

    crow: Tensor
    col: Tensor
    place: Tensor | None = None

    def values(self, canonical: Tensor, dtype: torch.dtype) -> Tensor:
        """canonical: any shape; returns `[nnz]` of dtype in this structure's order."""
        flat = canonical.detach().reshape(-1)
        return (flat if self.place is None else flat[self.place]).to(dtype)


def rows_of(crow: Tensor, entries: int) -> Tensor:
    """int32 `[entries]`: the row of each entry."""
    counts = crow[1:] - crow[:-1]
    rows = torch.arange(crow.numel() - 1, device=crow.device, dtype=torch.int32)
    return torch.repeat_interleave(rows, counts, output_size=entries)


def _known(made: Any, what: str) -> Any:
    if made is None:
        raise RuntimeError(
            f"{what}: expected to be made before a CUDA graph is recorded, got a first call while recording; run the "
            "call once before"
        )
    return made


def transposed(crow: Tensor, col: Tensor, columns: int, place: Tensor | None = None) -> Csr:
    """The structure of W^T for the csr structure of W `[N_out, columns]`."""

    def make() -> Csr:
        order = torch.sort(col, stable=True).indices
        edges = torch.arange(columns + 1, device=col.device, dtype=torch.int32)
        crow_t = torch.searchsorted(col[order], edges, out_int32=True)
        where = order.to(torch.int32) if place is None else place[order]
        return Csr(crow_t, rows_of(crow, col.numel())[order], where)

    return _known(remembered(f"transposed {columns}", (crow, col), make), "the structure of the transpose")


def edges_of(crow: Tensor, col: Tensor, columns: int, tile: int) -> Tensor:
    """int32 `[N_out * ceil(columns / tile) + 1]`: where the entries of each row and tile of columns begin."""

    def make() -> Tensor:
        across = -(-columns // tile)
        key = rows_of(crow, col.numel()).long() * across + col // tile
        bounds = torch.arange((crow.numel() - 1) * across + 1, device=col.device)
        return torch.searchsorted(key, bounds, out_int32=True)

    return _known(remembered(f"edges {columns} {tile}", (crow, col), make), "the edges of the tiles")


def entries_of_blocks(crow: Tensor, col: Tensor, blocksize: tuple[int, int]) -> Csr:
    """Blocks r x c, entry by entry: a block's stored zeros are entries, too."""
    kind = f"blocks {blocksize[0]}x{blocksize[1]}"
    found = remembered(kind, (crow, col), lambda: made_of_blocks(crow, col, blocksize))
    return _known(found, "the entries of the blocks")


def made_of_blocks(crow: Tensor, col: Tensor, blocksize: tuple[int, int]) -> Csr:
    """:func:`entries_of_blocks`, made now and not remembered."""
    r, c = blocksize
    blocks, device = col.numel(), col.device
    per_row = (crow[1:] - crow[:-1]).repeat_interleave(r) * c
    crow_e = torch.zeros(per_row.numel() + 1, dtype=torch.int32, device=device)
    crow_e[1:] = per_row.cumsum(0)
    # A row's entries are those of its blocks in turn, so an entry's place follows from its row, block and column.
    band = rows_of(crow, blocks)
    first = crow_e[band.long().view(-1, 1) * r + torch.arange(r, device=device)]  # of the row, [blocks, r]
    within = (torch.arange(blocks, device=device, dtype=torch.int32) - crow[band.long()]) * c
    at = (first + within.view(-1, 1)).unsqueeze(2) + torch.arange(c, device=device, dtype=torch.int32)
    at = at.reshape(-1).long()
    column = (col.view(-1, 1, 1) * c + torch.arange(c, device=device, dtype=torch.int32)).expand(-1, r, -1)
    col_e = torch.empty(blocks * r * c, dtype=torch.int32, device=device)
    col_e[at] = column.reshape(-1)
    place = torch.empty_like(col_e)
    place[at] = torch.arange(at.numel(), device=device, dtype=torch.int32)
    return Csr(crow_e, col_e, place)


def csr_of(crow: Tensor, col: Tensor, blocksize: tuple[int, int]) -> Csr:
    """The structure entry by entry, of blocks `(r, c)` or, with `(1, 1)`, of csr as it is."""
    return Csr(crow, col) if blocksize == (1, 1) else entries_of_blocks(crow, col, blocksize)


def nm_entries(indices: Tensor, n: int, m: int) -> Csr:
    """The csr structure of an N:M weight; its values are in order."""
    def make() -> Csr:  # asks the device nothing, so that a CUDA graph may hold it
        return Csr(*nm_as_csr(indices, n, m))

    found = remembered(f"nm {n}:{m}", (indices,), make)
    return make() if found is None else found
