"""Models in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating"]


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in eval mode, and each of their modules back in the mode it was in: one may have been frozen in eval
    while the rest trains.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # parents first; through train(), to which some modules add
            if module.training != training:
                module.train(training)
        for module, training in modes.items():  # a parent that came late took along a child it shares
            module.training = training
