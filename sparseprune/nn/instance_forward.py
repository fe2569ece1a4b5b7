"""InstanceForward: a ``forward`` in the ``__dict__`` of one instance, past that of its class."""

from __future__ import annotations

import inspect
import sys
from functools import update_wrapper
from typing import Any, Self

from torch import nn

__all__ = ["InstanceForward", "is_replaced"]


class InstanceForward:
    """``forward`` of the instance ``owner``, called as that of its class is.

    What copies an instance's ``__dict__`` (copy.copy, the replicas of nn.DataParallel) takes it along, still bound to
    ``owner``; and torch calls an instance's forward without the instance. :meth:`called_on` finds it nevertheless: a
    copy then loses this forward and runs its class's own on its own modules.
    """

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        update_wrapper(self, type(owner).forward, updated=())
        signature = inspect.signature(type(owner).forward)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        self.__code__ = inspect.unwrap(type(owner).forward).__code__  # torch.export asks a forward for it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """The forward of this class that is the module's, and not of another one that it was copied from."""
        found = vars(module).get("forward")
        return found if isinstance(found, cls) and found.owner is module else None

    def called_on(self) -> nn.Module:
        """The module that the caller's caller calls: ``owner``, or a copy of it. To be asked in ``__call__`` itself,
        outside compiled graphs. A copy is not found where its ``forward`` is called past its ``__call__``, and where it
        is compiled or exported before it was called: use copy.deepcopy there.
        """
        module = sys._getframe(2).f_locals.get("self")  # of nn.Module.__call__
        if module is self.owner or not isinstance(module, nn.Module) or vars(module).get("forward") is not self:
            return self.owner
        return module

    def run_copy(self, copy: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a copy of the owner gives, by its class's forward, as from now on at once."""
        vars(copy).pop("forward", None)  # another thread may have been first
        return type(copy).forward(copy, *args, **kwargs)


def is_replaced(module: nn.Module, by: type[InstanceForward] = InstanceForward) -> bool:
    """Whether another than one of ``by`` stands in the place of the forward of the module's class. One of ours that is
    bound to another instance, of which this one is a copy, stands for nothing.
    """
    found = vars(module).get("forward")
    if found is None or (isinstance(found, InstanceForward) and found.owner is not module):
        return False
    return not isinstance(found, by)
