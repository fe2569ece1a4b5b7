"""StandIn: a Linear put in the place of another while it is trained, which computes the same layer in another way."""

from __future__ import annotations

from torch import nn

from .filters import take_fast_path_
from .linear import SparseLinear
from .replace import replace_

__all__ = ["StandIn", "put_back_"]


class StandIn(nn.Linear):
    """``original``'s Parameters, under the same names, and its mode; :func:`~sparseprune.nn.replace.replace_` hands on
    its hooks. Subclasses have the forward.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original.in_features, original.out_features, original.bias is not None, device="meta")
        self.weight = original.weight
        self.register_parameter("bias", original.bias)
        self.__dict__["_of"] = original  # outside the module's own registers: neither saved nor moved
        self.train(original.training)

    @property
    def original(self) -> nn.Linear:
        """The Linear it stands in for, with the Parameters and the mode of now."""
        original: nn.Linear = self.__dict__["_of"]
        original.weight = self.weight
        original.register_parameter("bias", self.bias)
        return original.train(self.training)


def put_back_(model: nn.Module, kind: type[StandIn] = StandIn) -> None:
    """Puts back every Linear that has a stand-in of this kind, with the Parameters and hooks of now."""
    replacements: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, kind):
            replacements[id(layer)] = layer.original
    replace_(model, replacements)
    if replacements and not any(isinstance(layer, SparseLinear) for layer in model.modules()):
        take_fast_path_(model)
