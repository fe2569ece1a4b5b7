"""Floor 2: the canonical sparse layouts of a weight `[N_out, K]`: csr, bsr and nm, as frozen dataclasses of plain
tensors.

A layout is what a checkpoint holds and what the public ops take. What a kernel reads is packed from it
(``ops.pack``) and never saved. Kept entries are the non-zero ones; a bsr block is kept whole when any of its
entries is non-zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

__all__ = ["BSR", "COLUMN_BLOCKS", "CSR", "FILE_BLOCKS", "NM", "NM_PATTERNS", "Layout", "from_dense"]

#: Blocks (r, c) that CPU kernels are fast with, and so the candidates of sparsify_: columns of outputs, widest first.
COLUMN_BLOCKS = ((16, 1), (8, 1), (4, 1))
#: Blocks that a file may be smallest with: those, and the squares that GPUs like.
FILE_BLOCKS = ((64, 64), (32, 32), (16, 16), (16, 1), (8, 1), (4, 4), (4, 1))
#: The usual N:M, the one most hardware knows leading.
NM_PATTERNS = ((2, 4), (4, 8), (1, 4))


def _fail(layout: str, what: str, expected: object, got: object, remedy: str = "") -> None:
    raise ValueError(f"{layout}: {what} expected {expected}, got {got}" + (f"; {remedy}" if remedy else ""))


def _check_dense(layout: str, weight: Tensor) -> Tensor:
    if weight.dim() != 2:
        _fail(layout, "weight", "a matrix [N_out, K]", f"shape {list(weight.shape)}")
    if not weight.is_floating_point():
        _fail(layout, "weight", "a floating dtype", weight.dtype)
    return weight.detach()


def _check_compressed(layout: str, rows: int, columns: int, crow: Tensor, col: Tensor) -> None:
    """The invariants of (crow_indices, col_indices): what a kernel relies on to stay inside its buffers."""
    for name, tensor in (("crow_indices", crow), ("col_indices", col)):
        if tensor.dtype != torch.int32:
            _fail(layout, name, "dtype torch.int32", tensor.dtype, f"use {name}.int()")
        if tensor.dim() != 1:
            _fail(layout, name, "one dimension", tensor.dim())
    if crow.numel() != rows + 1:
        _fail(layout, "crow_indices", f"{rows + 1} entries for {rows} rows", crow.numel())
    if int(crow[0]) != 0 or int(crow[-1]) != col.numel():
        _fail(layout, "crow_indices", f"from 0 to {col.numel()}", f"from {int(crow[0])} to {int(crow[-1])}")
    if bool((crow[1:] < crow[:-1]).any()):
        _fail(layout, "crow_indices", "a sequence that never falls", "one that falls")
    if col.numel() == 0:
        return
    low, high = int(col.min()), int(col.max())
    if low < 0 or high >= columns:
        _fail(layout, "col_indices", f"values in [0, {columns})", f"values in [{low}, {high}]")
    rising = col[1:] > col[:-1]
    first_of_row = torch.zeros(col.numel() + 1, dtype=torch.bool, device=col.device)
    first_of_row[crow.long()] = True
    if not bool((rising | first_of_row[1:-1]).all()):
        _fail(layout, "col_indices", "columns rising within each row", "a repeated or falling column")


@dataclass(frozen=True)
class CSR:
    """Unstructured: row i keeps ``values[crow_indices[i]:crow_indices[i + 1]]`` at ``col_indices`` of the same range.

    shape (N_out, K); crow_indices int32 `[N_out + 1]`; col_indices int32 `[nnz]`, rising within a row; values `[nnz]`::

        [[0, 5, 0],      crow_indices [0, 1, 3]
         [7, 0, 9]]      col_indices  [1, 0, 2]   values [5, 7, 9]
    """

    shape: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    layout: ClassVar[str] = "csr"

    @classmethod
    def from_dense(cls, weight: Tensor, kept: Tensor | None = None) -> CSR:
        """weight: `[N_out, K]`, floating; every non-zero entry is kept (NaN counts as one), or what ``kept``, bool of
        the same shape, says.
        """
        weight = _check_dense("csr", weight)
        kept = weight != 0 if kept is None else kept
        counts = kept.sum(1)
        crow = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = counts.cumsum(0)
        col = kept.nonzero()[:, 1].to(torch.int32)
        return cls((weight.shape[0], weight.shape[1]), crow, col, weight[kept])

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "values": self.values}

    def rows(self) -> Tensor:
        """int64 `[nnz]`: the row of each entry."""
        counts = (self.crow_indices[1:] - self.crow_indices[:-1]).long()
        return torch.repeat_interleave(torch.arange(self.shape[0], device=counts.device), counts, output_size=self.nnz)

    def to_dense(self) -> Tensor:
        """`[N_out, K]`; bit-identical at the kept entries, 0 elsewhere."""
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        flat = flat.index_put((self.rows() * self.shape[1] + self.col_indices.long(),), self.values)
        return flat.view(self.shape)

    def validate_structure(self) -> None:
        """:meth:`validate`, the values apart."""
        _check_compressed("csr", *self.shape, self.crow_indices, self.col_indices)

    def validate(self) -> None:
        """ValueError unless every invariant holds that a kernel relies on."""
        self.validate_structure()
        if self.values.shape != self.col_indices.shape:
            _fail("csr", "values", f"shape {list(self.col_indices.shape)}", list(self.values.shape))


@dataclass(frozen=True)
class BSR:
    """Blocks of r outputs by c inputs, kept or dropped whole.

    shape (N_out, K); blocksize (r, c), dividing the shape; crow_indices int32 `[N_out / r + 1]`; col_indices int32
    `[nblocks]` (block columns, rising within a block row); values `[nblocks, r, c]`, with zeros stored inside a kept
    block::

        blocksize (2, 1)     [[0, 5, 0],      crow_indices [0, 2]
                              [7, 0, 0]]      col_indices  [0, 1]   values [[[0], [7]], [[5], [0]]]
    """

    shape: tuple[int, int]
    blocksize: tuple[int, int]
    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    layout: ClassVar[str] = "bsr"

    @classmethod
    def from_dense(cls, weight: Tensor, blocksize: tuple[int, int], kept: Tensor | None = None) -> BSR:
        """weight: `[N_out, K]`, floating; kept: bool of the same shape, by default the non-zeros: a block with one of
        them is kept. ValueError unless blocksize divides the shape.
        """
        weight = _check_dense("bsr", weight)
        (rows, columns), (r, c) = weight.shape, blocksize
        if r < 1 or c < 1 or rows % r or columns % c:
            _fail("bsr", "blocksize", f"a divisor of {[rows, columns]}", (r, c), "pad the layer or use layout='csr'")
        blocks = weight.reshape(rows // r, r, columns // c, c).transpose(1, 2)
        kept = weight != 0 if kept is None else kept
        kept = kept.reshape(rows // r, r, columns // c, c).transpose(1, 2).flatten(2).any(2)
        crow = torch.zeros(rows // r + 1, dtype=torch.int32, device=weight.device)
        crow[1:] = kept.sum(1).cumsum(0)
        return cls((rows, columns), (r, c), crow, kept.nonzero()[:, 1].to(torch.int32), blocks[kept].contiguous())

    @property
    def nnz(self) -> int:
        """Stored entries, the zeros inside kept blocks included."""
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"crow_indices": self.crow_indices, "col_indices": self.col_indices, "values": self.values}

    def rows(self) -> Tensor:
        """int64 `[nblocks]`: the block row of each block."""
        counts = (self.crow_indices[1:] - self.crow_indices[:-1]).long()
        rows = torch.arange(counts.numel(), device=counts.device)
        return torch.repeat_interleave(rows, counts, output_size=self.col_indices.numel())

    def to_dense(self) -> Tensor:
        """`[N_out, K]`; bit-identical at the stored entries, 0 elsewhere."""
        (rows, columns), (r, c) = self.shape, self.blocksize
        blocks = self.values.new_zeros((rows // r) * (columns // c), r, c)
        blocks = blocks.index_put((self.rows() * (columns // c) + self.col_indices.long(),), self.values)
        return blocks.view(rows // r, columns // c, r, c).transpose(1, 2).reshape(rows, columns)

    def validate_structure(self) -> None:
        """:meth:`validate`, the values apart."""
        (rows, columns), (r, c) = self.shape, self.blocksize
        if r < 1 or c < 1 or rows % r or columns % c:
            _fail("bsr", "blocksize", f"a divisor of {[rows, columns]}", (r, c))
        _check_compressed("bsr", rows // r, columns // c, self.crow_indices, self.col_indices)

    def validate(self) -> None:
        """ValueError unless every invariant holds that a kernel relies on."""
        self.validate_structure()
        expected = [self.col_indices.numel(), *self.blocksize]
        if list(self.values.shape) != expected:
            _fail("bsr", "values", f"shape {expected}", list(self.values.shape))


@dataclass(frozen=True)
class NM:
    """At most n of every m consecutive inputs are kept, in each row.

    shape (N_out, K), m dividing K; values `[N_out, K / m * n]`; indices uint8 of the same shape: the place of each
    value within its group of m, rising within the group. A group with fewer than n non-zeros stores zeros at its
    lowest free places::

        2:4     [[0, 5, 0, 7]]      indices [[1, 3]]   values [[5, 7]]
    """

    shape: tuple[int, int]
    n: int
    m: int
    values: Tensor
    indices: Tensor
    layout: ClassVar[str] = "nm"

    @classmethod
    def from_dense(cls, weight: Tensor, n: int, m: int, kept: Tensor | None = None) -> NM:
        """weight: `[N_out, K]`, floating; kept: bool of the same shape, by default the non-zeros. ValueError where m
        does not divide K or a group keeps more than n.
        """
        weight = _check_dense("nm", weight)
        rows, columns = weight.shape
        if not 1 <= n <= m <= 256:
            _fail("nm", "n and m", "1 <= n <= m <= 256", (n, m))
        if columns % m:
            _fail("nm", "in_features", f"a multiple of m = {m}", columns, "pad the layer or use layout='csr'")
        groups = weight.reshape(rows, columns // m, m)
        kept = (weight != 0 if kept is None else kept).reshape(groups.shape)
        most = int(kept.sum(2).max()) if groups.numel() else 0
        if most > n:
            _fail("nm", f"non-zeros in each group of {m}", f"at most {n}", most, "prune with NM(n, m) first")
        # a stable sort puts the non-zeros first, then the lowest free places
        order = (~kept).to(torch.uint8).argsort(dim=2, stable=True)[:, :, :n].sort(dim=2).values
        values = groups.gather(2, order)
        return cls((rows, columns), n, m, values.flatten(1), order.to(torch.uint8).flatten(1))

    @property
    def nnz(self) -> int:
        """Stored entries: N_out * K * n / m."""
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "indices": self.indices}

    def columns(self) -> Tensor:
        """int64 `[N_out, K / m * n]`: the input of each stored value."""
        kept = self.indices.shape[1]
        group = torch.arange(kept, device=self.indices.device) // self.n
        return group * self.m + self.indices.long()

    def to_dense(self) -> Tensor:
        """`[N_out, K]`; bit-identical at the stored entries, 0 elsewhere."""
        return self.values.new_zeros(self.shape).scatter(1, self.columns(), self.values)

    def validate_structure(self) -> None:
        """:meth:`validate`, the values apart."""
        rows, columns = self.shape
        if not 1 <= self.n <= self.m <= 256:
            _fail("nm", "n and m", "1 <= n <= m <= 256", (self.n, self.m))
        if columns % self.m:
            _fail("nm", "in_features", f"a multiple of m = {self.m}", columns)
        expected = [rows, columns // self.m * self.n]
        if list(self.indices.shape) != expected:
            _fail("nm", "indices", f"shape {expected}", list(self.indices.shape))
        if self.indices.dtype != torch.uint8:
            _fail("nm", "indices", "dtype torch.uint8", self.indices.dtype)
        if self.indices.numel() == 0:
            return
        if int(self.indices.max()) >= self.m:
            _fail("nm", "indices", f"values in [0, {self.m})", int(self.indices.max()))
        groups = self.indices.reshape(rows, -1, self.n).int()
        if bool((groups[:, :, 1:] <= groups[:, :, :-1]).any()):
            _fail("nm", "indices", "places rising within each group", "a repeated or falling place")

    def validate(self) -> None:
        """ValueError unless every invariant holds that a kernel relies on."""
        self.validate_structure()
        if self.values.shape != self.indices.shape:
            _fail("nm", "values", f"shape {list(self.indices.shape)}", list(self.values.shape))


Layout: TypeAlias = CSR | BSR | NM


def from_dense(
    weight: Tensor,
    layout: str,
    blocksize: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
    kept: Tensor | None = None,
) -> Layout:
    """weight: `[N_out, K]`; layout "csr" | "bsr" (needs blocksize) | "nm" (needs nm = (n, m)); kept: bool `[N_out, K]`,
    by default the non-zeros. ValueError otherwise.
    """
    if layout == "csr":
        return CSR.from_dense(weight, kept)
    if layout == "bsr":
        if blocksize is None:
            raise ValueError("from_dense: layout 'bsr' expected blocksize=(r, c), got None; (16, 1) suits a CPU")
        return BSR.from_dense(weight, blocksize, kept)
    if layout == "nm":
        if nm is None:
            raise ValueError("from_dense: layout 'nm' expected nm=(n, m), got None; use nm=(2, 4)")
        return NM.from_dense(weight, *nm, kept)
    raise ValueError(f"from_dense: layout expected 'csr', 'bsr' or 'nm', got {layout!r}")
