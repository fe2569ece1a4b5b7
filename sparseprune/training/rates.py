"""The learning rate of a training that prunes, where none is given."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .config import DistillConfig

__all__ = ["SMALLEST", "rate_for", "rate_of", "with_rate"]

#: For pretrained models of which nothing is known.
SMALLEST = 3e-5
_LARGEST = 1e-3  # and that of models that are not from transformers
_MEASURED = 384, 4e-4  # hidden size and rate; docs/lab/gan.md


def rate_for(hidden_size: int) -> float:
    """4e-4 for a hidden size of 384, which is measured, and by its inverse square from there, between 3e-5 and 1e-3."""
    size, rate = _MEASURED
    return min(_LARGEST, max(SMALLEST, rate * (size / hidden_size) ** 2))


def rate_of(model: nn.Module) -> float:
    """By the hidden size that a model of transformers has in its configuration; 1e-3 for any other model."""
    size = getattr(getattr(model, "config", None), "hidden_size", None)
    return rate_for(size) if isinstance(size, int) and size > 0 else _LARGEST


def with_rate(config: DistillConfig, model: nn.Module) -> tuple[DistillConfig, float]:
    """The configuration with its learning rate for this model, and that rate."""
    rate = rate_of(model) if config.lr is None else config.lr
    return replace(config, lr=rate), rate
