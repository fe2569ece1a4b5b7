"""Texts as rows of a fixed width, for models that take no tokens: counts of hashed words or characters."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .vocabulary import in_parts

__all__ = ["RowLoader", "hashed_rows"]


def hashed_rows(texts: Sequence[Sequence[str] | str], width: int = 128) -> Tensor:
    """texts of N examples, each a text or a tuple of them; returns float32 `[N, width]`: counts of what hashes to each
    column, in unit rows.

    Counted are the words, and in runs without a space beyond ASCII (Chinese, Japanese) characters and their pairs. A
    text without any is a row of zeros.
    """
    if width < 1:
        raise ValueError(f"hashed_rows: width expected at least 1, got {width}")
    rows, columns = [], []
    for row, parts in enumerate(in_parts(texts, "hashed_rows")):
        for piece in _pieces(" ".join(parts).lower()):
            rows.append(row)
            columns.append(zlib.crc32(piece.encode()) % width)
    counts = torch.zeros(len(texts), width)
    counts.index_put_((torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)),
                      torch.ones(len(rows)), accumulate=True)  # fmt: skip
    return torch.nn.functional.normalize(counts)


def _pieces(text: str) -> Iterator[str]:
    for word in text.split():
        if word.isascii():
            yield word
        else:
            yield from word
            yield from (word[i : i + 2] for i in range(len(word) - 1))


class RowLoader:
    """Yields ``(x [B, K], y [B])`` of ``x [N, K]`` and ``y [N]``; the order of an epoch hangs on ``(seed, epoch)``
    alone. ``shuffle=False``: as they come.
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 32, shuffle: bool = False, seed: int = 0):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"RowLoader: expected a row for each label, at least one, got {len(x)} and {len(y)}")
        if batch_size < 1:
            raise ValueError(f"RowLoader: batch_size expected >= 1, got {batch_size}")
        self.x, self.y, self.batch_size, self.shuffle, self.seed = x, y, batch_size, shuffle, seed
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self.x) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; each iteration raises it by one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        order = torch.arange(len(self.x))
        if self.shuffle:
            seed = (self.seed * 1_000_003 + epoch) % 2**63  # torch takes no more
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(seed))
        for rows in order.split(self.batch_size):
            yield self.x[rows], self.y[rows]
