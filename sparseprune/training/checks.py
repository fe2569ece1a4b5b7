"""What a trainer refuses before it begins, and the teacher it begins with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..nn.copies import copy_of, shared_with

__all__ = ["check_apart", "check_models", "teacher_of"]


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


def check_apart(who: str, model: nn.Module, teacher: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """ValueError on a teacher that would be trained or pruned along with the model. weights: fqn -> `[N, K]`, those
    that are pruned, frozen or not; what is frozen and not pruned the two may share.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = shared_with(teacher, [*trained, *weights.items()])
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{who}: teacher expected weights of its own, got the model's own memory in {', '.join(found[:5])}{more}, "
            "which would be trained and pruned along with it; pass copy.deepcopy(model), or load it without assign=True"
        )
