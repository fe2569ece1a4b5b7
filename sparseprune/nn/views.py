"""A model's Linears while its weights move: those that hide in other weights (:mod:`.matrices`) among them, with the
gradients and masks of the parameters that hold them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .expose import expose_linears_
from .instance_forward import is_replaced
from .matrices import shared_linears, unpack_

__all__ = ["LinearViews", "open_", "settle_", "trainable_twin"]


class LinearViews:
    """Conv1D, packed attention and a mixture's experts as Linears over the same memory, for a loop that trains the
    model as it is. Where nothing hides, the model itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self._of = model
        self._twin: nn.Module | None = None
        self._signature: Any = None
        self._owners: dict[int, nn.Parameter] = {}  # by id(parameter) of the twin, which keeps it

    def model(self) -> nn.Module:
        """The model with Linears in place of what hides; made anew where modules or memory have changed."""
        if self._twin is self._of or not isinstance(self._of, nn.Module):  # select_linears says what that is
            return self._of
        signature = (
            [id(module) for module in self._of.modules()],
            [(id(p), p.data_ptr(), p.requires_grad) for p in self._of.parameters() if not p.is_meta],
        )
        if self._twin is None or signature != self._signature:
            self._twin, self._signature = shared_linears(self._of), signature
            self._owners = {} if self._twin is self._of else _owners(self._of, self._twin)
        return self._twin

    def gradient(self, linear: nn.Linear) -> Tensor | None:
        """The gradient of a Linear's weight `[N, K]`, over the memory of the gradient that holds it; None without."""
        weight, owner = linear.weight, self.owner(linear)
        gradient = owner.grad
        if owner is weight or gradient is None:
            return gradient
        if gradient.stride() != owner.stride():  # laid out alike, so that a part of one is the part of the other
            owner.grad = torch.empty_strided(owner.size(), owner.stride(), dtype=gradient.dtype, device=gradient.device)
            gradient = owner.grad.copy_(gradient)
        return _part(gradient, weight, owner)

    def held_masks(self, masks: Mapping[nn.Linear, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Masks of Linears, bool `[N, K]`, as masks of the model's own parameters; what no Linear shows is kept."""
        found: dict[nn.Parameter, Tensor] = {}
        for linear, mask in masks.items():
            weight, owner = linear.weight, self.owner(linear)
            if owner is weight:
                found[owner] = mask
                continue
            if owner not in found:
                whole = torch.empty_strided(owner.size(), owner.stride(), dtype=torch.bool, device=owner.device)
                found[owner] = whole.fill_(True)
            _part(found[owner], weight, owner).copy_(mask)
        return found

    def owner(self, linear: nn.Linear) -> nn.Parameter:
        """The model's parameter whose memory the weight lies in."""
        weight: Any = linear.weight
        owner = weight if self._twin is self._of else self._owners.get(id(weight))
        if owner is None:
            raise RuntimeError("a weight's memory belongs to no parameter of the model; make the pruner anew")
        return owner

    def __getstate__(self) -> dict[str, Any]:
        return {"_of": self._of, "_twin": None, "_signature": None, "_owners": {}}


def _owners(model: nn.Module, twin: nn.Module) -> dict[int, nn.Parameter]:
    """id of each weight of the twin's Linears -> the model's parameter whose memory it lies in."""
    own = {id(parameter): parameter for parameter in model.parameters()}
    at: dict[int, list[nn.Parameter]] = {}
    for parameter in own.values():
        if not parameter.is_meta:
            at.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    found = {}
    for weight in (module.weight for module in twin.modules() if isinstance(module, nn.Linear)):
        if id(weight) in own:
            found[id(weight)] = own[id(weight)]
            continue
        for parameter in [] if weight.is_meta else at.get(weight.untyped_storage().data_ptr(), []):
            begin = parameter.storage_offset()
            if begin <= weight.storage_offset() < begin + max(1, parameter.numel()):
                found[id(weight)] = parameter
                break
    return found


def _part(whole: Tensor, weight: Tensor, owner: Tensor) -> Tensor:
    """Of a tensor laid out as ``owner`` the part that ``weight`` is of it."""
    offset = whole.storage_offset() + weight.storage_offset() - owner.storage_offset()
    return whole.as_strided(weight.size(), weight.stride(), offset)


def trainable_twin(model: nn.Module, who: str, pruned: bool = False) -> nn.Module:
    """:func:`~sparseprune.nn.matrices.shared_linears` for a loop that runs or trains the twin: what it learns is in the
    model's memory. ValueError where a module with hidden weights below it runs a forward that was put on it from
    outside, which would go on reading the model.
    """
    twin = shared_linears(model, pruned)
    if twin is model:
        return model
    held = dict(model.named_modules())
    for fqn, module in twin.named_modules():
        if is_replaced(module) and module is not held.get(fqn):
            raise ValueError(
                f"{who}: the forward of {fqn or 'the model'} was replaced from outside (by accelerate's device_map, "
                "say), expected its own; load the model without, or call expose_linears_(model) and "
                "sparseprune.nn.matrices.unpack_(model) first"
            )
    return twin


def open_(model: nn.Module, twin: nn.Module, names: Collection[str]) -> None:
    """Gives the model Linears of its own wherever the twin shows one of these names and the model hides it."""
    held = dict(model.named_modules())
    hidden = [fqn for fqn, module in twin.named_modules() if fqn in held and type(module) is not type(held[fqn])]
    opened = [fqn for fqn in hidden if any(name == fqn or name.startswith(f"{fqn}.") for name in names)]
    if opened:
        expose_linears_(model, opened)
        unpack_(model, opened, convolutions=False)


def settle_(model: nn.Module, twin: nn.Module, names: Collection[str]) -> nn.Module:
    """The model, with the twin's modules of these names (Linears that have become something else there); what hides
    them gets Linears of its own first.
    """
    if twin is model:
        return model
    open_(model, twin, names)
    for name in names:
        model.set_submodule(name, twin.get_submodule(name))
    return model
