"""Activations, computed by the SparseLinear in front of them while their module's forward runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..direct import is_tracing, is_transformed
from ..instance_forward import InstanceForward
from ..linear import SparseLinear
from ..packed_only import PLAIN
from ..unread import Read, check_read, unread
from .hooks import hooked
from .patterns import epilogue_of

__all__ = ["FusedActivations", "fused_activations", "keep_attributes_"]


class FusedActivations(InstanceForward):
    """``forward`` of the instance ``owner``, in which SparseLinears apply the activations that follow them.

    The module keeps its class and its children, and whoever else calls one of those gets what it always gave: the
    class's own forward runs on a view of the module, in which a Linear is called with the activation behind it, and
    that activation hands its input on. ``fused``: name of a Linear -> (name of its activation, what that computes).
    Where a hook has come to watch one of them, another module stands there, or the forward does anything else with what
    comes before an activation than hand it to that, the class's forward runs on the module.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__(owner)
        self.fused: dict[str, tuple[str, str]] = {}
        self.read: set[bool] = set()  # whether in training: where its forward reads more than the activations' results

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "fused": self.fused}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["owner"])  # type: ignore[misc]
        self.fused = state["fused"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner
        if torch.compiler.is_compiling():
            return type(owner).forward(owner, *args, **kwargs)
        if (called := self.called_on()) is not owner:
            return self.run_copy(called, args, kwargs)
        if owner.training in self.read or is_tracing() or is_transformed():
            return type(owner).forward(owner, *args, **kwargs)
        try:
            return self._fused(owner, args, kwargs)
        except Read:  # of what comes before an activation: in this mode it will be again
            self.read.add(owner.training)
        return type(owner).forward(owner, *args, **kwargs)

    def _fused(self, owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        children = dict(owner._modules)
        watched = nn_module._has_any_global_hook()
        for first, (second, what) in self.fused.items():
            linear, activation = children.get(first), children.get(second)
            if watched or not isinstance(linear, SparseLinear) or type(linear) not in PLAIN or activation is None:
                continue
            if linear.activation != "none":
                continue
            if epilogue_of(activation) == what and not hooked(linear, activation):
                children[first] = then = _Then(linear, what)  # type: ignore[assignment]
                children[second] = _HandsOn(activation, then)  # type: ignore[assignment]
        view: Any = object.__new__(type(owner))
        vars(view).update(vars(owner))
        vars(view).pop("forward", None)
        vars(view)["_modules"] = children
        result = type(owner).forward(view, *args, **kwargs)
        check_read(result, view, owner)
        keep_attributes_(view, owner, "_modules")
        return result


def keep_attributes_(view: nn.Module, owner: nn.Module, *but: str) -> None:
    """What the forward that ran on ``view`` noted at its module is noted at ``owner``."""
    own = vars(owner)
    for name, value in vars(view).items():
        if own.get(name, own) is not value and name not in but:
            own[name] = value


class _Stands:
    """Stands where a module stood, for one call; attributes are the module's."""

    __slots__ = ("_module",)

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Then(_Stands):
    """The Linear with its activation. What it gives stands for what comes before the activation, which nobody has
    computed.
    """

    __slots__ = ("_given", "_what")

    def __init__(self, linear: SparseLinear, what: str) -> None:
        super().__init__(linear)
        self._what = what
        self._given: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._module(x, then=self._what)
        before = unread(y)
        self._given = before, y
        return before

    def result_of(self, before: Any) -> Tensor:
        if self._given is None or before is not self._given[0]:
            raise Read("an activation")
        return self._given[1]


class _HandsOn(_Stands):
    """The activation, which the Linear in front of it has applied."""

    __slots__ = ("_then",)

    def __init__(self, activation: nn.Module, then: _Then) -> None:
        super().__init__(activation)
        self._then = then

    def __call__(self, x: Tensor) -> Tensor:
        return self._then.result_of(x)


def fused_activations(module: nn.Module) -> FusedActivations | None:
    """The forward by which this module's Linears apply the activations that follow them, where it has one."""
    return FusedActivations.of(module)
