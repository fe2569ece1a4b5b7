"""Products while the masks still move: once little of a Linear is kept, its output and the gradient of its input are
computed from what is kept alone. The gradient of its weight stays dense, for it tells the scores what a weight that is
gone would change.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn.replace import replace_
from ..nn.stand_in import StandIn
from .gates import Gates
from .healing import DENSITY, why_not_sparse

__all__ = ["MovingLinear", "move_sparse_"]


class MovingLinear(StandIn):
    """``original``'s function, with its Parameters: ``weight`` holds zeros where the mask of this step is False, and
    its gradient is that of every weight, kept or not. A weight that is not the one of this step, or has been written
    since, is read whole: that of an evaluation or a callback between two steps, or one that ``functional_call`` lends.
    """

    def __init__(self, original: nn.Linear) -> None:
        super().__init__(original)
        self.__dict__["_with"] = None

    def follow_(self, mask: Tensor | None) -> None:
        """The mask of this step, bool `[N, K]`; None: too much is kept for sparse products to pay."""
        self.__dict__["_with"] = None if mask is None else (mask, self.weight, self.weight._version)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles are of the plain Linear: no step will tell them their mask."""
        return _itself, (self.original,)

    def __copy__(self) -> nn.Linear:
        return copy.copy(self.original)

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`."""
        weight, mask = self.weight, None
        step = None if torch.compiler.is_compiling() else self.__dict__["_with"]  # a graph outlives the step
        if step is not None and weight is step[1] and weight._version == step[2]:
            mask = step[0]
        if mask is None:
            return F.linear(input, weight, self.bias)
        return ops.masked_linear(input, weight, mask, self.bias, straight_through=True)


def _itself(layer: nn.Linear) -> nn.Linear:
    return layer


def move_sparse_(model: nn.Module, gates: Gates) -> None:
    """After the masks of a step are chosen: a :class:`MovingLinear` wherever that pays, and its mask to each."""
    made: dict[int, nn.Module] = {}
    for name, mask in gates.masks.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, MovingLinear) and (not name or why_not_sparse(layer, gates) is not None):
            continue
        assert isinstance(layer, nn.Linear)
        few = int(mask.count_nonzero()) <= DENSITY * mask.numel()  # a tenth of the time of mask.sum()
        if isinstance(layer, MovingLinear):
            layer.follow_(mask if few else None)
        elif few:
            made[id(layer)] = stand_in = MovingLinear(layer)
            stand_in.follow_(mask)
    if made:
        replace_(model, made)
