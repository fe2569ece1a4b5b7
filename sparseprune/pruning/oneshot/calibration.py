"""Calibration data: what is accepted, how it is cut into chunks, and what is refused before a weight is touched."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Batch", "calibration_batches", "digest"]

# Targets never reach the model: a loss inside the forward pass would only cost time.
_TARGETS = ("labels", "label", "label_ids", "start_positions", "end_positions")


@dataclass(frozen=True)
class Batch:
    """One chunk of calibration data, ready for ``model(*args, **kwargs)``.

    positions: bool `[B, S]` where the input is real, None when all of it is (no padding mask, or no sequence).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    positions: Tensor | None
    count: int

    def to(self, device: torch.device) -> Batch:
        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(
            tuple(move(a) for a in self.args),
            {k: move(v) for k, v in self.kwargs.items()},
            move(self.positions),
            self.count,
        )


def _forward_names(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _rows(data: Tensor, chunk_tokens: int) -> Iterator[Tensor]:
    per_row = data.shape[1] if data.dim() > 1 and not data.is_floating_point() else 1
    if data.is_floating_point() and data.dim() > 2:
        per_row = data.shape[1:-1].numel()
    step = max(1, chunk_tokens // max(1, per_row))
    yield from data.split(step)


def _batch(item: Any, names: set[str]) -> Batch:
    if isinstance(item, (tuple, list)) and len(item) >= 1:
        item = item[0]
    if isinstance(item, Mapping):
        kwargs = {k: v for k, v in item.items() if k not in _TARGETS}
        ids = kwargs.get("input_ids", next((v for v in kwargs.values() if isinstance(v, Tensor)), None))
        if not isinstance(ids, Tensor):
            raise ValueError(f"calibration: a batch dict must hold at least one tensor, got keys {sorted(item)}")
        mask = kwargs.get("attention_mask")
        positions = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if positions is not None and bool(positions.all()):
            positions = None
        real = int(positions.sum()) if positions is not None else _count(ids)
        return Batch((), kwargs, positions, real)
    if not isinstance(item, Tensor):
        raise ValueError(
            "calibration: expected batches that are a tensor, a dict of tensors or (inputs, targets), got "
            f"{type(item).__name__}"
        )
    if "input_ids" in names and not item.is_floating_point():
        return Batch((), {"input_ids": item}, None, _count(item))
    return Batch((item,), {}, None, _count(item))


def _count(inputs: Tensor) -> int:
    """Positions a Linear will see: ids one each, features all but the last axis."""
    return inputs.shape[:-1].numel() if inputs.is_floating_point() else inputs.numel()


def _embedding_rows(model: nn.Module) -> int | None:
    get = getattr(model, "get_input_embeddings", None)
    if callable(get):
        try:
            embedding = get()
        except NotImplementedError:
            embedding = None
        if isinstance(embedding, nn.Embedding):
            return embedding.num_embeddings
    first = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    return None if first is None else first.num_embeddings


def calibration_batches(data: Any, model: nn.Module, needed: int, chunk_tokens: int = 512) -> list[Batch]:
    """data: integer `[N, S]` token ids, float `[N, ..., K]` features, or an iterable of batches (tensor, dict of
    tensors, (inputs, targets)); one tensor is cut into chunks of about chunk_tokens positions, an iterable keeps its
    batches.

    needed: the least number of positions the criterion can work with. Raises ValueError on data that are missing,
    empty, too short, not finite, or hold ids outside the model's embedding.
    """
    if data is None:
        raise ValueError("calibration: this criterion needs data=: token ids [N, S] or an iterable of batches")
    names = _forward_names(model)
    items: Iterable[Any]
    if isinstance(data, Tensor):
        if data.numel() == 0 or data.dim() == 0:
            raise ValueError(f"calibration: data is empty, shape {list(data.shape)}; give at least {needed} positions")
        if not data.is_floating_point() and data.dim() == 1:
            data = data[None]
        items = _rows(data, chunk_tokens)
    elif isinstance(data, Mapping):
        items = [data]
    elif isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise ValueError(
            f"calibration: expected tensors or an iterable of batches, got {type(data).__name__}; tokenise text first"
        )
    else:
        items = data
    batches = [b for b in (_batch(item, names) for item in items) if b.count]
    total = sum(b.count for b in batches)
    if total == 0:
        raise ValueError(f"calibration: data is empty; give at least {needed} positions")
    if total < needed:
        raise ValueError(
            f"calibration: {total} positions are too few, this criterion needs at least {needed} for this model; "
            "give more or longer sequences, or lower min_tokens to accept the noise"
        )
    rows = _embedding_rows(model)
    for batch in batches:
        for value in (*batch.args, *batch.kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError("calibration: data holds NaN or infinite values")
        ids = batch.kwargs.get("input_ids")
        if ids is None and batch.args and not batch.args[0].is_floating_point():
            ids = batch.args[0]
        if ids is not None and rows is not None:
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= rows:
                raise ValueError(
                    f"calibration: token ids reach from {low} to {high} but the model's vocabulary has {rows} entries; "
                    "tokenise with this model's own tokenizer"
                )
    return batches


def digest(batches: list[Batch]) -> str:
    """sha256 over every tensor of the batches: a resumed run must see the same data."""
    sha = hashlib.sha256()
    for batch in batches:
        for name, value in [*enumerate(batch.args), *sorted(batch.kwargs.items())]:
            sha.update(f"{name}:".encode())
            if isinstance(value, Tensor):
                sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
                sha.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            else:
                sha.update(repr(value).encode())
    return sha.hexdigest()
