"""Batches of similar length in an order that depends only on seed and epoch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..pruning.rows import IGNORED, in_batches, share_of
from .augment import Augment

__all__ = ["TokenLoader"]


class TokenLoader:
    """Yields dicts of int64: ``input_ids [B, T]``, ``attention_mask [B, T]``, ``labels [B]``, cut to the longest row.
    Labels of tokens, a list for each sequence and as long, give ``labels [B, T]`` with -100 for padding.

    Examples are shuffled, sorted by length within groups of 32 batches, cut into batches, and the batches shuffled
    again. The order and the augmentation of an epoch are functions of ``(seed, epoch)`` and of nothing else, so a run
    that resumes at batch b of epoch e reads the same data. With ``shuffle=False`` the order is by length for ever.

    rank, world: for data-parallel training, this process's number and that of all. Batches of ``world * batch_size``
    are cut as one process would, and each process gets every ``world``-th example of them; one that does not divide
    repeats its first examples, so that all processes get as many.
    """

    def __init__(
        self, sequences: Sequence[list[int]], labels: Sequence[int] | Sequence[list[int]], batch_size: int = 32,
        shuffle: bool = False, seed: int = 0, augment: Augment | None = None, pad_id: int = 0, mask_id: int = 3,
        protect: Collection[int] = (), types: Sequence[list[int]] | None = None, rank: int = 0, world: int = 1,
    ):  # fmt: skip
        if not sequences:
            raise ValueError("TokenLoader: expected at least one example, got none")
        if len(sequences) != len(labels):
            raise ValueError(f"TokenLoader: expected one label a sequence, got {len(labels)} for {len(sequences)}")
        if batch_size < 1:
            raise ValueError(f"TokenLoader: batch_size expected >= 1, got {batch_size}")
        if any(len(ids) == 0 for ids in sequences):
            raise ValueError("TokenLoader: expected sequences of one token or more, got an empty one")
        for kind in {type(token) for ids in sequences for token in ids}:
            if not issubclass(kind, Integral):
                raise ValueError(
                    f"TokenLoader: expected each sequence as a flat list of whole numbers, got {kind.__name__} in one; "
                    "give the ids that a tokenizer returns for one text, tensors by .tolist()"
                )
        self.sequences, self.types = list(sequences), types
        self.labels: list[Any] = list(labels)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.augment, self.pad_id, self.mask_id, self.protect = augment, pad_id, mask_id, frozenset(protect)
        self._token_labels = isinstance(labels[0], list)
        if self._token_labels and any(len(ids) != len(own) for ids, own in zip(sequences, self.labels)):
            raise ValueError("TokenLoader: expected token labels as long as their sequences, got another length")
        if types is not None and [len(ids) for ids in sequences] != [len(own) for own in types]:
            raise ValueError(
                "TokenLoader: expected token types as long as their sequences, got another length; give the "
                "token_type_ids that the tokenizer returns beside the ids, cut as these are"
            )
        if augment is not None and augment.active and (types is not None or self._token_labels):
            what = "token labels" if self._token_labels else "token types"
            raise ValueError(f"TokenLoader: augmentation would misalign the {what}; leave one of them out")
        if not 0 <= rank < world:
            raise ValueError(f"TokenLoader: expected 0 <= rank < world, got rank {rank!r}, world {world!r}")
        self.rank, self.world = rank, world
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self.sequences) // (self.batch_size * self.world))

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; each iteration raises it by one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        for number, chosen in enumerate(self.batches(epoch)):
            yield self._batch(chosen, epoch, number)

    def batches(self, epoch: int) -> list[list[int]]:
        """The example indices of each of this process's batches of one epoch."""
        lengths = [len(ids) for ids in self.sequences]
        joint = in_batches(lengths, self.batch_size * self.world, self._generator(epoch, 0) if self.shuffle else None)
        return [share_of(chosen, self.rank, self.world) for chosen in joint]

    def _generator(self, epoch: int, number: int) -> torch.Generator:
        seed = (self.seed * 1_000_003 + epoch) * 1_000_003 + number
        return torch.Generator().manual_seed(seed % 2**63)  # torch takes no more

    def collate(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """One batch of the examples with these indices, without augmentation."""
        return self._pad([self.sequences[i] for i in chosen], chosen)

    def _batch(self, chosen: list[int], epoch: int, number: int) -> dict[str, Tensor]:
        rows = [self.sequences[i] for i in chosen]
        if self.augment is not None and self.augment.active:
            generator = self._generator(epoch, number * self.world + self.rank + 1)
            rows = [self.augment(ids, self.mask_id, generator, self.protect) for ids in rows]
        return self._pad(rows, chosen)

    def _pad(self, rows: Sequence[list[int]], chosen: Sequence[int]) -> dict[str, Tensor]:
        width = max(map(len, rows))
        batch = {
            "input_ids": torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in rows]),
            "labels": torch.tensor([self._label(i, width) for i in chosen]),
        }
        if self.types is not None:
            batch["token_type_ids"] = torch.tensor([self.types[i] + [0] * (width - len(self.types[i])) for i in chosen])
        return batch

    def _label(self, i: int, width: int) -> Any:
        own: Any = self.labels[i]
        return own + [IGNORED] * (width - len(own)) if self._token_labels else own
