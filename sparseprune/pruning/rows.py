"""Examples in a row each, cut into padded batches in an order that hangs on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["IGNORED", "Collate", "RowBatches", "in_batches", "labels_of", "listed", "share_of"]

#: The label of a token that counts for nothing.
IGNORED = -100
_GROUP = 32  # batches whose examples are sorted by length


def in_batches(lengths: Sequence[int], size: int, generator: torch.Generator | None) -> list[list[int]]:
    """The places of examples in each batch of ``size``: shuffled, sorted by length within groups of 32 batches, cut,
    and the batches shuffled again; without a generator by length alone.
    """
    if generator is None:
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        return [order[i : i + size] for i in range(0, len(order), size)]
    order = torch.randperm(len(lengths), generator=generator).tolist()
    found: list[list[int]] = []
    for start in range(0, len(order), _GROUP * size):
        part = sorted(order[start : start + _GROUP * size], key=lambda i: lengths[i])
        found += [part[i : i + size] for i in range(0, len(part), size)]
    return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]


def share_of(joint: Sequence[int], rank: int, world: int) -> list[int]:
    """Of a batch that ``world`` processes read together the places that one of them reads: every ``world``-th. Where
    they do not go round the first ones are read again, so that all processes get as many.
    """
    return [joint[(i * world + rank) % len(joint)] for i in range(-(-len(joint) // world))]


class Collate:
    """Pads what is of unlike length: ``input_ids`` with ``pad``, labels of tokens with -100, all else with 0.

    masks: whether the model takes an ``attention_mask``, which then goes with ids.
    """

    def __init__(self, pad: int, masks: bool, who: str) -> None:
        self.pad, self.masks, self.who = pad, masks, who

    def inputs(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Tensor]:
        made = {name: self.field(name, rows) for name, rows in columns.items()}
        if self.masks and "input_ids" in made and "attention_mask" not in made:
            width = made["input_ids"].shape[-1]
            lengths = torch.tensor([len(ids) for ids in columns["input_ids"]])
            made["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
        return made

    def field(self, name: str, rows: Sequence[Any]) -> Tensor:
        """rows: numbers, lists or arrays; returns them as one tensor `[B, ...]`, whole numbers as int64."""
        try:
            parts = [torch.as_tensor(row) for row in rows]
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.who}: {name} expected numbers, got {type(rows[0]).__name__} ({error})") from None
        parts = [p.float() if p.dtype == torch.float64 else p for p in parts]
        parts = [p if p.is_floating_point() or p.is_complex() else p.long() for p in parts]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1:
            features = name == "inputs" and parts[0].is_floating_point()  # a zero more would be one feature more
            if features or any(part.dim() != 1 for part in parts):
                shown = " and ".join(str(list(shape)) for shape in sorted(shapes)[:2])
                raise ValueError(f"{self.who}: {name} expected rows of one shape, got {shown}; make them alike")
            fill = {"input_ids": self.pad, "labels": IGNORED}.get(name, 0)
            width = max(len(part) for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - len(part)), value=fill) for part in parts]
        return torch.stack(parts)


class RowBatches:
    """inputs: columns by name, or rows of models that are called with one tensor; labels: one a row, or None. Yields
    dicts of tensors, ``labels`` among them, or ``(inputs, labels)``; without labels the inputs alone.

    rank, world: of processes that hold the same rows this one's number, and how many they are. Batches of
    ``world * size`` are cut as one process would, and each process reads its share of each (:func:`share_of`).
    """

    def __init__(
        self, inputs: dict[str, list[Any]] | list[Any], labels: list[Any] | None, collate: Collate, size: int,
        shuffle: bool = False, seed: int = 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        if size < 1:
            raise ValueError(f"{collate.who}: batch_size expected at least 1, got {size!r}")
        self.inputs, self.labels, self.collate = inputs, labels, collate
        self.batch_size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        ids = inputs.get("input_ids") if isinstance(inputs, dict) else None
        rows = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
        self._lengths = [len(row) for row in ids] if ids is not None else [0] * len(rows)
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self._lengths) // (self.batch_size * self.world))

    def set_epoch(self, epoch: int) -> None:
        """The epoch of the next iteration; each iteration raises it by one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        together = self.batch_size * self.world
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            order = in_batches(self._lengths, together, generator)
        else:
            places = range(len(self._lengths))
            order = [list(places[i : i + together]) for i in places[::together]]
        for chosen in order:
            yield self.batch(share_of(chosen, self.rank, self.world))

    def sample(self, count: int) -> Any:
        """``count`` rows, spread over all, as one batch."""
        size = len(self._lengths)
        return self.batch(sorted({i * size // count for i in range(count)}))

    def whole(self) -> Any:
        """All rows as one batch."""
        return self.batch(range(len(self._lengths)))

    def batch(self, chosen: Sequence[int]) -> Any:
        """The rows at these places."""
        labels = None if self.labels is None else self.collate.field("labels", [self.labels[i] for i in chosen])
        if isinstance(self.inputs, dict):
            columns = {name: [values[i] for i in chosen] for name, values in self.inputs.items()}
            made = self.collate.inputs(columns)
            return made if labels is None else {**made, "labels": labels}
        inputs = self.collate.field("inputs", [self.inputs[i] for i in chosen])
        return inputs if labels is None else (inputs, labels)


def listed(values: Any) -> list[Any]:
    """A column, whatever holds it, as a list; of a tensor its rows."""
    for way in ("to_pylist", "tolist"):
        if hasattr(values, way) and not isinstance(values, Tensor):
            return list(getattr(values, way)())
    return list(values)


def labels_of(values: Sequence[Any], config: Any, kind: str, who: str) -> list[Any]:
    """Labels as the loss takes them, of a model whose class is called ``kind``. Names become the numbers that
    ``config.label2id`` gives them. ValueError on one that is missing, has no number, or that a classifier of
    ``config.num_labels`` classes has no output for.
    """
    known = getattr(config, "label2id", None) or {}
    count = getattr(config, "num_labels", None) if "Classification" in kind else None
    made = []
    for number, value in enumerate(values):
        where = f"{who}: the label of row {number}"
        if isinstance(value, str):
            if value not in known:
                shown = f"of {', '.join(map(str, list(known)[:8]))}" if known else "a number, for the model names none"
                raise ValueError(
                    f"{where} expected one {shown}, got '{value}'; give numbers, or set the model's config.label2id"
                )
            value = known[value]
        elif hasattr(value, "tolist"):
            value = value.tolist()
        if value is None or type(value).__name__ == "NAType" or value != value:  # pandas' NA compares to nothing
            raise ValueError(f"{where} expected a number, got none; leave the row out")
        if isinstance(value, complex):
            raise ValueError(f"{where} expected a number, got {value!r}")
        if isinstance(value, float) and count and count > 1:
            if value.is_integer():  # a column that a table holds as float64
                value = int(value)
            else:
                raise ValueError(f"{where} expected a whole number, for the model has {count} classes, got {value:g}")
        value = int(value) if isinstance(value, bool) else value
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int) and each < 0 and each != IGNORED:
                raise ValueError(f"{where} expected >= 0, got {each}; a split without labels has -1: leave it out")
            if isinstance(each, int) and count and count > 1 and each >= count and not isinstance(value, list):
                raise ValueError(f"{where} expected less than {count}, the model's classes, got {each}")
        made.append(value)
    if "SequenceClassification" in kind and count != 1 and all(isinstance(v, list) and len(v) == 1 for v in made):
        raise ValueError(f"{who}: labels expected a number each, got lists of one, {made[0]}; take the number out")
    return made
