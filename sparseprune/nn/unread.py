"""Tensors that stand in for values which nobody has computed: they may be handed on, and not read."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Read", "Unread", "check_read", "unread"]

_ASKED = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad")
) | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}  # fmt: skip


class Read(Exception):
    """What was only to be handed on was read, by the function of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"{name}: what it reads was never computed, for the modules around it ran as one; expected it to be handed "
            "on alone; sparsify_(model, fuse=False, engine='layers') computes all of it"
        )
        self.name = name


class Unread(Tensor):
    """An alias of another tensor that answers for its shape, dtype and device. Everything else raises :class:`Read`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise Read(getattr(func, "__name__", repr(func)))


def unread(tensor: Tensor) -> Unread:
    """The stand-in of a tensor, without a copy."""
    return tensor.as_subclass(Unread)


def check_read(result: Any, view: nn.Module, owner: nn.Module) -> None:
    """Raises :class:`Read` where a forward on ``view``, at first what ``owner`` is, gave a stand-in or noted one."""
    noted = [value for name, value in vars(view).items() if vars(owner).get(name) is not value]
    if _holds(result) or _holds(noted):
        raise Read("return")


def _holds(value: Any) -> bool:
    """Whether there is a stand-in in a value, its items, its entries or its fields, however deep."""
    left, seen = [value], dict[int, Any]()  # parts may hold the whole, as a node its parent
    while left:
        part = left.pop()
        if type(part) is Unread:
            return True
        if isinstance(part, Tensor) or id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, (list, tuple)):
            left.extend(part)
        elif isinstance(part, dict):
            left.extend(part.values())
        elif is_dataclass(part) and not isinstance(part, type):
            left.extend(getattr(part, field.name, None) for field in fields(part))
    return False
