"""StandIn: a Linear put in the place of another while it is trained, which computes the same layer in another way."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .filters import take_fast_path_
from .linear import SparseLinear
from .replace import replace_

__all__ = ["StandIn", "put_back_"]


# What would run the original in the stand-in's place.
_LEFT = frozenset({"forward", "_compiled_call_impl"})
# A stand-in's own: the Linear it stands for, and what its subclass computes with.
_OWN = frozenset({"_of", "_with"})


class StandIn(nn.Linear):
    """All that ``original`` has, Parameters, buffers, hooks and attributes, under the same names, but for the forward,
    which subclasses have. The registers are shared: what is put into one is in both. What a subclass computes with is
    in ``_with``, outside the module's own registers: neither saved nor moved.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        vars(self).update({name: value for name, value in vars(original).items() if name not in _LEFT})
        self.__dict__["_of"] = original

    @property
    def original(self) -> nn.Linear:
        """The Linear it stands in for, with the Parameters, the mode and the attributes of now."""
        original: nn.Linear = self.__dict__["_of"]
        vars(original).update({name: value for name, value in vars(self).items() if name not in _OWN | _LEFT})
        return original


def put_back_(model: nn.Module, kind: type[StandIn] = StandIn, names: Collection[str] | None = None) -> None:
    """Puts back every Linear that has a stand-in of this kind, with the Parameters and hooks of now; names: only those
    of these fqns, None for all.
    """
    replacements: dict[int, nn.Module] = {}
    left = False
    for fqn, layer in model.named_modules():
        if isinstance(layer, kind) and (names is None or fqn in names):
            replacements[id(layer)] = layer.original
        else:
            left = left or isinstance(layer, SparseLinear | StandIn)
    replace_(model, replacements)
    if replacements and not left:
        take_fast_path_(model)
