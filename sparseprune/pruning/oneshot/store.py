"""What waits outside of memory where a folder is given: chunks of hidden states, one file a chunk; matrices of which
some rows are read and written at a time; what a training step keeps for its backward pass.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["ChunkStore", "Shelf", "Shelved", "SpilledMatrix", "no_holes", "release"]


def release() -> None:
    """Gives freed pages back to the system where glibc would keep them in its heap, for the memory that is stated."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


# Parameters and values of glibc's mallopt: blocks from this size on are mapped one by one, and leave with their tensor.
_TRIM, _MAP = -1, -3
MAPPED = 2**20
MOST = 2**25  # what glibc's own adjustment, which a call ends for good, reaches at the most


@contextmanager
def no_holes() -> Iterator[None]:
    """Keeps glibc's heap free of the holes that large tensors leave in it, which would count as memory in use: they
    take as much again as the tensors of a forward pass. The cost is fresh pages for each. It holds for the whole
    process, so it is for the caller to ask for.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    try:
        mallopt(_MAP, MAPPED)
        mallopt(_TRIM, MAPPED)
        yield
    finally:
        mallopt(_MAP, MOST)
        mallopt(_TRIM, 2 * MOST)


def _nameless(folder: str | os.PathLike[str]) -> BinaryIO:
    """A file in the folder that is gone when it is closed, and with the process however that ends."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryFile(dir=folder)


def _bytes(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor of the CPU."""
    return value.detach().view(-1).view(torch.uint8).numpy().data


def _fill(value: Tensor, file: BinaryIO, name: str) -> None:
    """Reads a contiguous tensor of the CPU from where file stands."""
    room = _bytes(value)
    if (read := file.readinto(room)) != room.nbytes:  # type: ignore[attr-defined]
        raise OSError(f"{name}: expected {room.nbytes} bytes, got {read}; is the disk full?")


class SpilledMatrix:
    """A float32 matrix `[N, K]` in a nameless file of the folder, or in memory without one.

    matrix[rows] is a copy of these rows, on the matrix's device, that the caller may write into; matrix[rows] = values
    keeps them. The file is gone with `close()`, and with the process however it ends.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, folder: str | os.PathLike[str] | None) -> None:
        self.shape = torch.Size(shape)
        self.device = device
        self._file: BinaryIO | None = None
        self._values: Tensor | None = None
        if folder is None:
            self._values = torch.empty(self.shape, device=device)
        else:
            self._file = _nameless(folder)

    @classmethod
    def of(cls, matrix: Tensor, folder: str | os.PathLike[str] | None) -> SpilledMatrix:
        """Without a folder the matrix is taken over as it is."""
        if folder is None:
            found = cls((0, 0), matrix.device, None)
            found.shape, found._values = matrix.shape, matrix
            return found
        found = cls(matrix.shape, matrix.device, folder)
        found[:] = matrix
        return found

    def __getitem__(self, rows: slice) -> Tensor:
        if self._values is not None:
            return self._values[rows].clone(memory_format=torch.contiguous_format)
        assert self._file is not None
        start, stop, _ = rows.indices(self.shape[0])
        value = torch.empty(stop - start, self.shape[1])
        self._file.seek(4 * start * self.shape[1])
        _fill(value, self._file, f"rows {start} to {stop} of a matrix in a temporary file")
        return value.to(self.device)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        if self._values is not None:
            self._values[rows] = values
            return
        assert self._file is not None
        self._file.seek(4 * rows.indices(self.shape[0])[0] * self.shape[1])
        self._file.write(_bytes(values.cpu().contiguous()))

    def opened(self) -> Tensor:
        """The matrix itself, to be changed in place: of a file a mapping, which is memory only as long as the tensor
        lives.
        """
        if self._values is not None:
            return self._values
        assert self._file is not None
        self._file.flush()
        mapping = mmap.mmap(self._file.fileno(), 4 * self.shape.numel())
        return torch.frombuffer(mapping, dtype=torch.float32).view(self.shape).to(self.device)

    def close(self) -> None:
        self._values = None
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Shelved:
    """Where a shelf has a tensor; order: its dimensions from the longest stride to the shortest."""

    shelf: Shelf
    begin: int
    shape: torch.Size
    order: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return self.shelf.get(self)


class Shelf:
    """Tensors of the CPU in one nameless file of the folder: those of one training step, after which `clear()` lets the
    next step's take their place. The file is gone with `close()`, and with the process however it ends.
    """

    LEAST = 2**18  # bytes: what is smaller stays in memory

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._file = _nameless(folder)
        self._end = 0

    def put(self, value: Tensor) -> Tensor | Shelved:
        """A place that gives the same values with the same strides back; value itself where it is small, or where its
        elements do not fill a stretch of memory once each.
        """
        size = value.numel() * value.element_size()
        strides = value.stride()
        order = tuple(sorted(range(value.dim()), key=lambda d: -strides[d]))
        dense = value.detach().permute(order)
        if size < self.LEAST or not dense.is_contiguous():
            return value
        place = Shelved(self, self._end, value.shape, order, value.dtype)
        self._file.seek(self._end)
        self._file.write(_bytes(dense))
        self._end += size
        return place

    def get(self, place: Shelved) -> Tensor:
        dense = torch.empty([place.shape[d] for d in place.order], dtype=place.dtype)
        self._file.seek(place.begin)
        _fill(dense, self._file, "what a training step put into a temporary file")
        back = sorted(range(len(place.order)), key=place.order.__getitem__)
        return dense.permute(back)

    def clear(self) -> None:
        self._end = 0

    def close(self) -> None:
        self._file.close()


class ChunkStore:
    """A list of tensors or of nested objects of tensors. With a folder every entry is a file and only the entry in use
    is in memory.

    The files live in a fresh folder of their own under spill and disappear with `close()`.
    """

    def __init__(self, spill: str | os.PathLike[str] | None = None) -> None:
        self._items: list[Any] = []  # with a folder: dtype, shape and device of a tensor, None for another object
        self._folder: Path | None = None
        if spill is not None:
            Path(spill).mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(dir=spill, prefix="hidden."))

    def __len__(self) -> int:
        return len(self._items)

    def append(self, value: Any) -> None:
        self._items.append(None)
        self[len(self._items) - 1] = value

    def __setitem__(self, index: int, value: Any) -> None:
        if self._folder is None:
            self._items[index] = value
            return
        path = self._folder / str(index)
        if isinstance(value, Tensor):  # plain bytes: every entry is read and written again for every block
            path.write_bytes(_bytes(value.cpu().contiguous()))
            self._items[index] = value.dtype, value.shape, value.device
        else:
            torch.save(value, path)
            self._items[index] = None

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self._items):
            raise IndexError(index)
        if self._folder is None:
            return self._items[index]
        path = self._folder / str(index)
        if self._items[index] is None:
            return torch.load(path, weights_only=True)
        dtype, shape, device = self._items[index]
        value = torch.empty(shape, dtype=dtype)
        with open(path, "rb") as file:
            _fill(value, file, f"{path}: hidden states")
        return value.to(device)

    def copy(self, spill: str | os.PathLike[str] | None = None) -> ChunkStore:
        """The same entries in a new store; tensors in memory are shared, since nothing writes into them."""
        other = ChunkStore(spill)
        with ExitStack() as undo:
            undo.callback(other.close)  # a full disk
            for i in range(len(self)):
                other.append(self[i])
            undo.pop_all()
        return other

    def close(self) -> None:
        self._items.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
