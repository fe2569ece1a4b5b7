"""Chunks of hidden states, kept in memory or spilled to a folder, one file a chunk."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["ChunkStore"]


class ChunkStore:
    """A list of objects of tensors. With a folder every entry is a file and only the entry in use is in memory.

    The files live in a fresh folder of their own under spill and disappear with `close()`.
    """

    def __init__(self, spill: str | os.PathLike[str] | None = None) -> None:
        self._items: list[Any] = []
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
        else:
            torch.save(value, self._folder / f"{index}.pt")

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self._items):
            raise IndexError(index)
        if self._folder is None:
            return self._items[index]
        return torch.load(self._folder / f"{index}.pt", weights_only=True)

    def copy(self, spill: str | os.PathLike[str] | None = None) -> ChunkStore:
        """The same entries in a new store; tensors in memory are shared, since nothing writes into them."""
        other = ChunkStore(spill)
        for i in range(len(self)):
            other.append(self[i])
        return other

    def nbytes(self) -> int:
        """Bytes of hidden states in memory; 0 when spilled."""
        return 0 if self._folder else sum(t.numel() * t.element_size() for t in self._items if isinstance(t, Tensor))

    def close(self) -> None:
        self._items.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
