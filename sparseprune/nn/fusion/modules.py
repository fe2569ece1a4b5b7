"""What stands in a model where something was fused."""

from __future__ import annotations

import inspect
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ... import native, ops
from ..direct import runs_direct
from ..linear import SparseLinear
from ..packed_only import PLAIN
from .hooks import hooked

__all__ = ["EPS_NAMES", "FUSED", "FusedOutput", "FusedRMSNorm"]

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")  # of an RMSNorm


class FusedOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual), all of it by ``dense`` where there is no dropout to apply.

    x: `[..., K]`; residual: `[..., N]`; returns `[..., N]`. Holds the children of the block it replaces under their
    own names.
    """

    dense: SparseLinear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout
    original: nn.Module

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.train(original.training)
        for name, child in original.named_children():
            setattr(self, name, child)
        self.__dict__["original"] = original  # not a submodule: its children are ours already

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout
        if (
            (dropout.training and dropout.p > 0)
            or type(dense) not in PLAIN
            or type(norm) is not nn.LayerNorm
            or norm.weight is None
            or norm.bias is None
            or type(dropout) is not nn.Dropout
            or hooked(dense, norm, dropout)
            or nn_module._has_any_global_hook()
        ):
            return norm(dropout(dense(hidden_states)) + input_tensor)
        return dense(hidden_states, input_tensor, norm)


class FusedRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight in one pass. x: `[..., D]`; returns `[..., D]` in the wider dtype of the two.

    Holds the weight `[D]` of the module it replaces under its own name. That module's forward runs in ``dtypes`` (of x,
    of the weight) that are not among those in which both are known to give the same, and where the call has more than
    x; and in all once another of its attributes was set, which it may compute with.
    """

    weight: nn.Parameter
    original: nn.Module
    dtypes: frozenset[tuple[torch.dtype, torch.dtype]]

    def __init__(self, original: nn.Module, eps: float) -> None:
        super().__init__()
        self.train(original.training)
        self.weight = original.weight  # type: ignore[assignment]
        # Under the name that the original has for it, so that whoever changes it there changes it here.
        self._eps_name = next((name for name in EPS_NAMES if name in vars(original)), "eps")
        setattr(self, self._eps_name, eps)
        self.__dict__["original"] = original  # not a submodule: its weight is ours already
        self.dtypes = frozenset({(self.weight.dtype, self.weight.dtype)})
        self._argument = next(islice(inspect.signature(type(original).forward).parameters, 1, None), "x")
        self._eps_then = eps

    def __getattr__(self, name: str) -> Any:
        if name == "eps":
            return vars(self)[vars(self)["_eps_name"]]
        found = vars(vars(self)["original"]) if "original" in vars(self) else {}
        return found[name] if name in found else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        original = vars(self).get("original")
        if original is None or name in vars(self) or name not in vars(original):
            super().__setattr__(name, value)
        else:
            setattr(original, name, value)
            self.dtypes = frozenset()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weight, eps = self._parameters.get("weight"), vars(self)[self._eps_name]
        if weight is None:
            weight = self.weight  # of a replica, an attribute
        x = args[0] if len(args) == 1 else kwargs.get(self._argument)
        if len(args) + len(kwargs) != 1 or not isinstance(x, Tensor) or (x.dtype, weight.dtype) not in self.dtypes:
            view = self.unfused(weight)
            return type(view).forward(view, *args, **kwargs)
        if (
            runs_direct(x, weight)
            and x.dtype in native.linear.DTYPES
            and weight.dtype in native.linear.DTYPES
            and x.shape[-1:] == weight.shape
        ):
            return native.norms.rms_norm(x, weight, eps)
        return ops.rms_norm(x, weight, eps)

    def unfused(self, weight: Tensor) -> Any:
        """The module that this one replaces, as it would be now, with this weight."""
        view: Any = object.__new__(type(self.original))
        vars(view).update(vars(self.original), training=self.training, _parameters={"weight": weight})
        if self.eps != self._eps_then:  # else what the original has, which may be None
            vars(view)[self._eps_name] = self.eps
        return view

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


#: What :func:`fuse_` puts into a model and :func:`unfuse_` takes out.
FUSED = (FusedOutput, FusedRMSNorm)
