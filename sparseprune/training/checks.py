"""What a trainer refuses before it begins."""

from __future__ import annotations

from torch import nn

__all__ = ["check_models"]


def check_models(who: str, model: nn.Module, teacher: nn.Module | None) -> None:
    """ValueError on a wrapped model, one without parameters or one that is frozen, and a teacher that is the model."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"{who}: expected the bare model, got {type(model).__name__}; pass its .module, gradients are averaged by "
            "the pruner"
        )
    if teacher is model:
        raise ValueError(f"{who}: the teacher is the model itself; pass a copy, or None to have one made")
    if next(model.parameters(), None) is None:
        raise ValueError(f"{who}: the model has no parameters")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"{who}: no trainable weight in the student, expected weights with requires_grad, got a frozen model; call "
            "model.requires_grad_(True) first"
        )
