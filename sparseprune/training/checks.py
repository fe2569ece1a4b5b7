"""What a trainer refuses before it begins, and the teacher it begins with."""

from __future__ import annotations

import warnings

from torch import nn

from ..nn.copies import copy_of, shared_with
from .gates import Gates

__all__ = ["check_models", "check_weights", "teacher_of"]


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


def teacher_of(who: str, model: nn.Module, teacher: nn.Module | None) -> nn.Module:
    """The teacher in eval mode; where there is none a frozen copy of the model. One that is given stays as trainable as
    it was: it runs under no_grad, and may be trained on elsewhere. ValueError as for :func:`copy_of`.
    """
    return (copy_of(model, who).requires_grad_(False) if teacher is None else teacher).eval()


def check_weights(who: str, model: nn.Module, teacher: nn.Module, gates: Gates) -> None:
    """ValueError on a teacher that would be trained or pruned along with the model: what is frozen and not pruned the
    two may share. UserWarning on frozen weights where gradients are to say which stay.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = shared_with(teacher, [*trained, *gates.weights.items()])
    if found:
        raise ValueError(
            f"{who}: teacher expected weights of its own, got the model's own memory in {_shown(found)}, which would "
            "be trained and pruned along with it; pass copy.deepcopy(model), or load it without assign=True"
        )
    asks = gates.config.scored or (gates.criterion is not None and gates.criterion.needs_gradients)
    frozen = [name for name, weight in gates.weights.items() if asks and not weight.requires_grad]
    if frozen:
        warnings.warn(
            f"{who}: method {gates.config.method!r} learns from the gradients of weights which of them stay, got "
            f"frozen ones in {_shown(frozen)}, whose scores stay as they begin; set requires_grad, leave these layers "
            "out with filter_fn, or choose method='magnitude'",
            UserWarning,
            stacklevel=3,
        )


def _shown(names: list[str]) -> str:
    return ", ".join(name or "(the model)" for name in names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
