"""Noise on what a model reads: on its input embeddings, or on floating inputs where it has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.batches import LabelledBatch

__all__ = ["noisy"]


@contextmanager
def noisy(model: nn.Module, share: float, seed: int) -> Iterator[Callable[[LabelledBatch], LabelledBatch]]:
    """Inside, the first call of the model's input embedding gives its rows plus normal noise of ``share`` times their
    standard deviation; the callable adds it to the floating inputs of a batch where the model has no embedding. Equal
    shapes and seeds get equal noise. share 0: nothing happens.
    """
    if not share:
        yield lambda batch: batch
        return
    generator = torch.Generator().manual_seed(seed)

    def add(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x + share * x.detach().float().std().to(x.dtype) * noise

    embedding = _embedding(model)
    if embedding is None:
        yield lambda batch: dataclasses.replace(batch, inputs=_changed(batch.inputs, add))
        return
    done = False

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal done
        if done:
            return output
        done = True
        return add(output)

    handle = embedding.register_forward_hook(hook)
    try:
        yield lambda batch: batch
    finally:
        handle.remove()


def _embedding(model: nn.Module) -> nn.Module | None:
    """What transformers calls the input embeddings, else the first ``nn.Embedding``."""
    named = getattr(model, "get_input_embeddings", None)
    found = named() if callable(named) else None
    return found if found is not None else next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)


def _changed(inputs: Any, add: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return add(inputs) if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: _changed(value, add) for key, value in inputs.items()}
    if isinstance(inputs, tuple | list):
        return type(inputs)(_changed(value, add) for value in inputs)
    return inputs
