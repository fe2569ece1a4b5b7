"""Healing under hard masks: the pruned Linears compute on their sparse kernels, forward and backward, and as rounded as
inference will, while they stay what they are for optimiser, state dict and checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import _native, backends
from ..nn.filters import own_forward, take_slow_path_
from ..nn.linear import SparseLinear
from ..nn.replace import replace_
from ..nn.simulated import in_float32, rounded_input, rounded_values, simulate_
from ..nn.stand_in import StandIn
from ..packing import why_not_quads
from ..pruning.granularity import Block
from .gates import Gates

__all__ = ["DENSITY", "HealingLinear", "heal_sparse_", "why_not_sparse"]

#: Above this density, and below so many weights, the dense product, which needs no gather of the kept values, is as
#: fast (docs/lab/performance.md).
DENSITY = 0.2
_WEIGHTS = 1 << 15


class _Parts(NamedTuple):
    """The sparse structure; order: where in the flat weight each of its values is; row: of each value, or pair; quads:
    whether its values are rounded in their blocks.
    """

    sparse: SparseLinear
    order: Tensor
    row: Tensor
    quads: bool
    value_dtype: str
    activations: str


class HealingLinear(StandIn):
    """``original``'s function, with its Parameters, read through ``mask`` (bool `[N, K]`) by a :class:`SparseLinear`:
    the gradient of ``weight`` is 0 outside the mask. value_dtype, activations: what kernels of inference will round,
    which the forward pass rounds too.
    """

    def __init__(
        self, original: nn.Linear, mask: Tensor, blocksize: tuple[int, int] | None = None,
        value_dtype: str = "float32", activations: str = "float32",
    ) -> None:  # fmt: skip
        super().__init__(original)
        pattern = nn.Linear(original.in_features, original.out_features, False, device="meta")
        pattern.weight = nn.Parameter(mask.to(original.weight), requires_grad=False)
        sparse = SparseLinear.from_linear(pattern, "bsr" if blocksize else "csr", blocksize)
        places = torch.arange(mask.numel(), dtype=torch.float64, device=mask.device).view(mask.shape) + 1
        numbered = nn.Linear(original.in_features, original.out_features, False, device="meta")
        numbered.weight = nn.Parameter(places * mask, requires_grad=False)
        values = SparseLinear.from_linear(numbered, "bsr" if blocksize else "csr", blocksize).values
        order = (values.detach().reshape(-1) - 1).long()
        quads = blocksize is not None and sparse.values.shape[-1] % 2 == 0  # neighbours of one lie in one block
        if quads:
            row = order.view(sparse.values.shape)[..., 0] // self.in_features
        else:
            row = torch.arange(self.out_features, device=mask.device)
        # Made anew from the mask where it is wanted again.
        self.__dict__["_with"] = _Parts(sparse, order, row, quads, value_dtype, activations)

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`."""
        if self.__dict__["_with"].value_dtype == "float32":
            return self._product(input)
        return in_float32(input, self._product)

    def _product(self, x: Tensor) -> Tensor:
        sparse, order, row, quads, value_dtype, activations = self.__dict__["_with"]
        shape, rows = sparse.values.shape, self.out_features
        if quads or value_dtype == "float32":
            values = self.weight.reshape(-1).index_select(0, order).view(shape)
            if quads:
                values = rounded_values(values, row, rows, value_dtype, activations)
        else:
            whole = rounded_values(self.weight, row, rows, value_dtype, activations)
            values = whole.reshape(-1).index_select(0, order).view(shape)
        return sparse.trained(rounded_input(x, activations), values, self.bias)


def heal_sparse_(model: nn.Module, gates: Gates) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Puts a :class:`HealingLinear` wherever that pays, none with ``heal="dense"``; elsewhere, where the configuration
    rounds, Linears that simulate it. Returns (names, name -> why not, name -> why its rounding is not simulated).
    """
    config = gates.config
    made: list[str] = []
    left: dict[str, str] = {}
    replacements: dict[int, nn.Module] = {}
    for name, mask in gates.masks.items():
        layer = model.get_submodule(name)
        if isinstance(layer, HealingLinear):
            continue
        why = _why_not(layer, mask, gates)
        if why or not name:
            left[name] = why or "the model is itself the Linear"
            continue
        assert isinstance(layer, nn.Linear)
        kind = gates.free(name)
        blocks = (kind.r, kind.c) if isinstance(kind, Block) and kind.r * kind.c > 1 else None
        replacements[id(layer)] = HealingLinear(layer, mask, blocks, config.value_dtype, config.activations)
        made.append(name)
    replace_(model, replacements)
    exact = simulate_(model, left, config.value_dtype, config.activations) if config.rounds else {}
    if made:
        take_slow_path_(model)
    return made, left, exact


def why_not_sparse(layer: nn.Module, gates: Gates) -> str | None:
    """Why this layer of a student keeps its dense products, however little of it is kept; None where it need not."""
    if gates.config.heal == "dense":
        return "heal='dense' was asked for"
    if isinstance(layer, nn.Linear) and (own := own_forward(layer)) is not None:
        return own
    if not isinstance(layer, nn.Linear) or type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}"
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return "it has hooks"
    if gates.config.autocast != "none" and not (gates.frozen and gates.config.rounds):
        return "autocast computes in bfloat16"
    if _native.C is None or backends.forced_backend() not in (None, "native"):
        return "the compiled core does not run"
    if layer.weight.device.type != "cpu" or layer.weight.dtype != torch.float32:
        return f"expected float32 on the CPU, got {layer.weight.dtype} on {layer.weight.device}"
    if layer.weight.numel() < _WEIGHTS:
        return f"fewer than {_WEIGHTS} weights"
    return None


def _why_not(layer: nn.Module, mask: Tensor, gates: Gates) -> str | None:
    if (reason := why_not_sparse(layer, gates)) is not None:
        return reason
    rows, columns = mask.shape
    if gates.config.activations == "int8" and (reason := why_not_quads((rows, columns))):
        return f"activations='int8' {reason}"
    density = float(mask.sum()) / mask.numel()
    return None if 0 < density <= DENSITY else f"density {density:.2f}, expected at most {DENSITY}"
