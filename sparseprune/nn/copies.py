"""Copies of a user's model, and whether a model is one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["copy_of", "shared_with"]

_SHOWN = 5


def copy_of(model: nn.Module, who: str) -> nn.Module:
    """A deep copy of the model. ValueError, which names them with the remedy, where modules hold tensors that autograd
    has computed, which torch does not copy: weights under ``torch.nn.utils.weight_norm``, ``spectral_norm`` or
    ``prune``.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        found = list(_computed(model))
        if not found:
            raise
        more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        raise ValueError(
            f"{who}: expected a model that can be copied, got computed tensors in {'; '.join(found[:_SHOWN])}{more}"
        ) from error


def shared_with(other: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that are parameters of ``other`` too, or begin in the memory of one: after
    ``copy.copy(model)``, ``load_state_dict(..., assign=True)``, or of a module that is in both.
    """
    places = {place for parameter in other.parameters() if (place := _place(parameter)) is not None}
    return [name for name, tensor in tensors if _place(tensor) in places]


def _place(tensor: Tensor) -> tuple[object, int] | None:
    """Where a tensor's memory begins; None where it has none of its own."""
    if tensor.is_meta or not tensor.numel() or is_traceable_wrapper_subclass(tensor):
        return None
    return tensor.device, tensor.data_ptr()


def _computed(model: nn.Module) -> Iterator[str]:
    """What each module holds that cannot be copied, and what to do."""
    for fqn, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield f"{fqn or '(the model)'} ({type(module).__name__}): {name}, {_remedy(module, name)}"


def _remedy(module: nn.Module, name: str) -> str:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return f"of torch.nn.utils.prune: call torch.nn.utils.prune.remove(module, {name!r})"
        for kind, way in ((WeightNorm, "weight_norm"), (SpectralNorm, "spectral_norm")):
            if isinstance(hook, kind) and hook.name == name:
                return (
                    f"of torch.nn.utils.{way}: call torch.nn.utils.remove_{way}(module, {name!r}), or use "
                    f"torch.nn.utils.parametrizations.{way}"
                )
    return "which has a history of gradients: detach() it, or set it to None"
