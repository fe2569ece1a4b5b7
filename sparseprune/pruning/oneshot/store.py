"""Chunks of hidden states, kept in memory or spilled to a folder, one file a chunk."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChunkStore", "release"]


def release() -> None:
    """Gives freed pages back to the system where glibc would keep them in its heap, for the memory that is stated."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)



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
            value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
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
        room = value.view(-1).view(torch.uint8).numpy()
        with open(path, "rb") as file:
            if (read := file.readinto(room.data)) != room.size:
                raise OSError(f"{path}: expected {room.size} bytes of hidden states, got {read}; is the disk full?")
        return value.to(device)

    def copy(self, spill: str | os.PathLike[str] | None = None) -> ChunkStore:
        """The same entries in a new store; tensors in memory are shared, since nothing writes into them."""
        other = ChunkStore(spill)
        for i in range(len(self)):
            other.append(self[i])
        return other

    def close(self) -> None:
        self._items.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
