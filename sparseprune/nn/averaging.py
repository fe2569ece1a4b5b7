"""torch's AveragedModel over sparse layers: with ``use_buffers=True`` it averages every buffer, indices too, and an
exponential average makes many an integer one less. Its update leaves them to the model's own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .linear import SparseLinear

__all__ = ["guard_averaging"]


def guard_averaging() -> None:
    """Makes ``AveragedModel.update_parameters`` leave the indices of a SparseLinear what they are in the model, and
    raise ValueError where they are others than at the update before: values of two structures have no average.
    """
    AveragedModel.update_parameters = _leaving_indices(AveragedModel.update_parameters)  # type: ignore[method-assign]


def _leaving_indices(update: Any) -> Any:
    @functools.wraps(update)
    def checked(self: AveragedModel, model: nn.Module) -> None:
        indices = _indices(self.module, model)
        if indices and self.n_averaged > 0:
            for name, mine, theirs in indices:
                if not torch.equal(mine, theirs.to(mine.device)):
                    raise ValueError(
                        f"AveragedModel: {name} expected the structure of the update before, got another, whose values "
                        "belong to other places; make a new AveragedModel, or average the dense model, with masks "
                        "(MaskedLinear) where weights come and go, and call sparsify_ after it"
                    )
        update(self, model)
        for _, mine, theirs in indices:
            mine.detach().copy_(theirs)

    return checked


def _indices(averaged: nn.Module, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
    """(name, that of the averaged model, that of the model) of each tensor that says where values lie."""
    mine = [(name, m) for name, m in averaged.named_modules() if isinstance(m, SparseLinear)]
    theirs = [m for m in model.modules() if isinstance(m, SparseLinear)]
    return [
        (f"{name}.{index}".lstrip("."), one._buffers[index], other._buffers[index])  # type: ignore[misc]
        for (name, one), other in zip(mine, theirs)
        for index in one.canonical_names
        if one._buffers.get(index) is not None and other._buffers.get(index) is not None
    ]
