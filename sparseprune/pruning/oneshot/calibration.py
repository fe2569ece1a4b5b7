"""Calibration data: what is accepted, how it is cut into chunks, and what is refused before a weight is touched."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import Batch, token_embedding, unlabelled
from ..intake import calibration_data

__all__ = ["calibration_batches"]

def _forward_names(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _rows(data: Tensor, chunk_tokens: int) -> Iterator[Tensor]:
    per_row = data.shape[1] if data.dim() > 1 and not data.is_floating_point() else 1
    if data.is_floating_point() and data.dim() > 2:
        per_row = data.shape[1:-1].numel()
    step = max(1, chunk_tokens // max(1, per_row))
    yield from data.split(step)


def _batch(item: Any, names: set[str], model: nn.Module) -> Batch:
    item = unlabelled(item, "calibration", model)
    if isinstance(item, Mapping):
        if not isinstance(_ids(item), Tensor):
            got = ", ".join(f"{key}: {type(value).__name__}" for key, value in item.items())
            raise ValueError(
                f"calibration: a batch dict expected tensors, got {{{got}}}; of a datasets.Dataset take "
                'DataLoader(dataset.with_format("torch"), batch_size=8), with all rows of one length'
            )
        return Batch(item)
    if not isinstance(item, Tensor):
        raise ValueError(
            "calibration: expected batches that are a tensor, a dict of tensors or (inputs, targets), got "
            f"{type(item).__name__}; {_remedy(item)}"
        )
    if "input_ids" in names and not item.is_floating_point():
        return Batch({"input_ids": item})
    return Batch(item)


def _ids(kwargs: Mapping[str, Any]) -> Any:
    """The ids among a dict's entries, or its first tensor."""
    return kwargs.get("input_ids", next((v for v in kwargs.values() if isinstance(v, Tensor) and v.dim()), None))


def _real(batch: Batch) -> int:
    """How many positions a Linear will see."""
    if batch.positions is not None:
        return int(batch.positions.sum())
    return _count(_ids(batch.kwargs) if batch.kwargs else batch.args[0])


def _remedy(data: Any) -> str:
    if isinstance(data, (str, bytes)):
        return "tokenise text first"
    if hasattr(data, "__array__"):
        return "torch.from_numpy makes a tensor of an array"
    return "torch.tensor makes a tensor of numbers, of token ids one [N, S] of integers"


def _check_ids(ids: Tensor, model: nn.Module, rows: int | None, named: bool) -> None:
    """ValueError unless these are token ids that the embedding knows; where the model names its input_ids, `[B, S]`, or
    `[B, C, S]` of multiple choice.
    """
    dims = 3 if "MultipleChoice" in type(model).__name__ else 2
    wrong = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if wrong or (named and ids.dim() != dims):
        raise ValueError(
            f"calibration: token ids expected integers [B, {'C, ' if dims == 3 else ''}S], got {ids.dtype} "
            f'{list(ids.shape)}; use ids.long(), a batch axis, or {{"inputs_embeds": ...}} for features'
        )
    if rows is None or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= rows:
        raise ValueError(
            f"calibration: token ids reach from {low} to {high} but the model's vocabulary has {rows} entries; "
            "tokenise with this model's own tokenizer"
        )


def _count(inputs: Tensor) -> int:
    """Positions a Linear will see: ids one each, features all but the last axis."""
    return inputs.shape[:-1].numel() if inputs.is_floating_point() else inputs.numel()


def _embedding_rows(model: nn.Module) -> int | None:
    embeddings = (module for module in model.modules() if isinstance(module, nn.Embedding))
    found = token_embedding(model) or next(embeddings, None)
    return None if found is None else found.num_embeddings


def calibration_batches(data: Any, model: nn.Module, needed: int, chunk_tokens: int = 512) -> list[Batch]:
    """data: integer `[N, S]` token ids, float `[N, ..., K]` features, or an iterable of batches (tensor, dict of
    tensors, (inputs, targets)), or rows as in :mod:`..intake`; one tensor is cut into chunks of about chunk_tokens
    positions, an iterable keeps its batches. Labels are left out; a model whose forward makes its decoder's inputs of
    them is given those.

    needed: the least number of positions the criterion can work with. Raises ValueError on data that are missing,
    empty, too short, not finite, hold ids outside the model's embedding, or a mask where it would be lost.
    """
    if data is None:
        raise ValueError("calibration: this criterion needs data=: token ids [N, S] or an iterable of batches")
    data = calibration_data(data, model, None, "calibration")
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
    elif isinstance(data, (str, bytes)) or hasattr(data, "__array__") or not isinstance(data, Iterable):
        raise ValueError(
            f"calibration: expected tensors or an iterable of batches, got {type(data).__name__}; {_remedy(data)}"
        )
    else:
        items = data
    made = [_batch(item, names, model) for item in items]
    counts = [_real(batch) for batch in made]
    batches = [batch for batch, count in zip(made, counts) if count]
    total = sum(counts)
    if total == 0:
        raise ValueError(
            f"calibration: data is empty; give at least {needed} positions (an iterator that was read before has "
            "nothing left: pass a list)"
        )
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
        if ids is None and batch.args and ("input_ids" in names or not batch.args[0].is_floating_point()):
            ids = batch.args[0]
        if isinstance(ids, Tensor) and ("input_ids" in names or rows is not None):
            _check_ids(ids, model, rows, "input_ids" in names)
    return batches
