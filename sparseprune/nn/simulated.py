"""Linears that compute, in plain torch, what a SparseLinear with rounded values and activations will: to train under
that rounding, and to see what it costs before anything is sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..packing import ACTIVATION_DTYPES, VALUE_DTYPES, why_not_quads
from ..reference.int8 import round_tokens, round_values
from .filters import own_forward, take_slow_path_
from .replace import replace_
from .stand_in import StandIn, put_back_

__all__ = ["SimulatedLinear", "check_dtypes", "in_float32", "rounded_input", "rounded_values", "simulate_", "simulated",
           "why_not_simulated"]  # fmt: skip


def check_dtypes(owner: str, value_dtype: str, activations: str) -> None:
    """ValueError unless values can be held so, and activations taken so beside them."""
    if value_dtype not in VALUE_DTYPES:
        raise ValueError(f"{owner}: value_dtype expected one of {tuple(VALUE_DTYPES)}, got {value_dtype!r}")
    if activations not in ACTIVATION_DTYPES or (activations == "int8" and value_dtype != "int8"):
        raise ValueError(
            f"{owner}: activations expected one of {ACTIVATION_DTYPES}, 'int8' with value_dtype='int8', got "
            f"{activations!r} with {value_dtype!r}"
        )


class _Straight(torch.autograd.Function):
    """The rounded values forward, the gradient of the exact ones as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def rounded_values(values: Tensor, row: Tensor, rows: int, value_dtype: str, activations: str) -> Tensor:
    """values: float32 `[..., c]`, neighbours of one output each; row: int64 `[...]`, which; the values as kernels with
    ``value_dtype`` and ``activations`` see them, with a straight-through gradient.
    """
    if value_dtype == "float32":
        return values
    exact = values.detach()
    if value_dtype == "int8":
        return _Straight.apply(values, round_values(exact, row, rows, activations == "int8"))
    return _Straight.apply(values, exact.to(VALUE_DTYPES[value_dtype]).to(values.dtype))


def rounded_input(x: Tensor, activations: str) -> Tensor:
    """x: float32 `[..., K]`; as products with ``activations`` see it, with a straight-through gradient."""
    if activations == "float32":
        return x
    whole, scale = round_tokens(x.detach())
    return _Straight.apply(x, whole * scale)


def in_float32(input: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The product of the input in float32, whatever autocast says: the steps of 8 bits are finer than those of
    bfloat16. Returns the dtype that ``F.linear`` would.
    """
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    with torch.autocast(kind, enabled=False):
        return product(input.float()).to(dtype)


class SimulatedLinear(StandIn):
    """``original``'s function, rounded as the kernels round."""

    def __init__(self, original: nn.Linear, value_dtype: str, activations: str) -> None:
        super().__init__(original)
        self.__dict__["_with"] = (value_dtype, activations)

    def forward(self, input: Tensor) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`."""

        def product(x: Tensor) -> Tensor:
            value_dtype, activations = self.__dict__["_with"]
            rows = torch.arange(self.out_features, device=self.weight.device)
            weight = rounded_values(self.weight.float(), rows, self.out_features, value_dtype, activations)
            bias = None if self.bias is None else self.bias.float()
            return F.linear(rounded_input(x, activations), weight, bias)

        return in_float32(input, product)


def why_not_simulated(layer: nn.Module, activations: str) -> str | None:
    """Why a layer stays exact; None where its rounding can be simulated."""
    if isinstance(layer, nn.Linear) and (own := own_forward(layer)) is not None:
        return own
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}"
    reason = why_not_quads((layer.out_features, layer.in_features)) if activations == "int8" else None
    return None if reason is None else f"activations='int8' {reason}"


def simulate_(model: nn.Module, names: Iterable[str], value_dtype: str, activations: str) -> dict[str, str]:
    """Puts a :class:`SimulatedLinear` in the place of each of these Linears, under every name it has; returns name ->
    why one stays exact.
    """
    left: dict[str, str] = {}
    replacements: dict[int, nn.Module] = {}
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, SimulatedLinear):
            continue
        why = "the model is itself the Linear" if not name else why_not_simulated(layer, activations)
        if why is not None:
            left[name] = why
            continue
        assert isinstance(layer, nn.Linear)
        replacements[id(layer)] = SimulatedLinear(layer, value_dtype, activations)
    replace_(model, replacements)
    if replacements:
        take_slow_path_(model)
    return left


@contextmanager
def simulated(
    model: nn.Module, names: Iterable[str], value_dtype: str = "int8", activations: str = "int8"
) -> Iterator[nn.Module]:
    """The model with these Linears rounded as the kernels round, inside the block."""
    try:
        simulate_(model, names, value_dtype, activations)
        yield model
    finally:
        put_back_(model, SimulatedLinear)
