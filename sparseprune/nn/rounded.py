"""RoundedLinear: a dense ``nn.Linear`` that answers calls of few rows from a copy of its weight in fewer bits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import native
from ..packing import scale_of
from ..tensor_state import Cached
from .direct import why_not_native

__all__ = ["ROUNDED_DTYPES", "Copy", "RoundedLinear", "rounded_copy"]

ROUNDED_DTYPES = ("bfloat16", "int8")


class Copy(NamedTuple):
    """A weight `[N, K]` in bfloat16, or in int8 with a scale float32 `[N]`."""

    values: Tensor
    scale: Tensor | None


class RoundedLinear(nn.Linear):
    """y = x W^T + bias; inference with up to ``rows`` rows of x reads W rounded to ``value_dtype``, "bfloat16", half
    the bytes, or "int8" with a scale an output, a quarter.

    x: `[..., K]`; weight: float32 `[N, K]`, the very Parameter of the Linear it was made from, so that a tied embedding
    stays tied and exact; returns `[..., N]`. More rows, gradients, other dtypes, autocast and compiled calls use the
    exact weight. The copy is made at the first call that wants it, follows the weight as a :class:`SparseLinear`
    follows its values, is never saved, and comes on top of the weight. Freeze the weight for speed; a write
    to all of a frozen one through ``.data`` is seen, as peft's where it merges an adapter, after one to some of it call
    :meth:`repack`.
    """

    rows: int
    value_dtype: str

    @classmethod
    def from_linear(cls, linear: nn.Linear, rows: int, value_dtype: str = "bfloat16") -> RoundedLinear:
        """Shares weight and bias with linear. ValueError where rows is below 1 and on another dtype."""
        if rows < 1:
            raise ValueError(f"RoundedLinear: rows expected at least 1, got {rows}")
        if value_dtype not in ROUNDED_DTYPES:
            raise ValueError(f"RoundedLinear: value_dtype expected one of {ROUNDED_DTYPES}, got {value_dtype!r}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.rows = linear.weight, linear.bias, rows
        layer.value_dtype = value_dtype
        layer._copy = Cached()
        return layer.train(linear.training)

    _copy: Cached[Copy]

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if self.why_exact(input) is None:
            values, scale = self._rounded(weight)
            return native.rounded.rounded_linear(input, values, bias, scale)
        if torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
            self._copy.drop()  # a step may follow that a weight frozen by then does not show
        return F.linear(input, weight, bias)

    def why_exact(self, input: Tensor) -> str | None:
        """None where a call takes the copy now, else why it takes the exact weight."""
        weight = self.weight
        if not (input.dtype is torch.float32 is weight.dtype):
            return f"needs float32, got {input.dtype} and a weight in {weight.dtype}"
        if self.training:
            return "the layer is in training mode"
        if torch.compiler.is_compiling():  # which a question about the rows would hold to their number
            return "the call is being compiled or exported"
        if not 0 < input.shape[:-1].numel() <= self.rows or not weight.numel():
            return f"the copy serves 1 to {self.rows} rows, got {list(input.shape)}"
        if input.shape[-1:] != weight.shape[1:]:
            return f"x expected [..., {weight.shape[1]}], got {list(input.shape)}"
        return why_not_native(input, weight, self.bias)

    def _rounded(self, weight: Tensor) -> Copy:
        def make() -> Copy:
            return rounded_copy(weight.detach(), self.value_dtype)

        found = self._copy.of((weight,), make)
        if not weight.requires_grad and not self._agrees(weight, found):
            self._copy.drop()
            found = self._copy.of((weight,), make)
        return found

    def _agrees(self, weight: Tensor, copy: Copy) -> bool:
        if copy.scale is None:
            return torch.equal(_some(weight).to(torch.bfloat16), _some(copy.values))
        scale = copy.scale[:: max(1, weight.shape[0] // 8)]
        return torch.equal(_in_steps(_some(weight), scale), _some(copy.values))

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that shares weight and bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def repack(self) -> None:
        """Drops the copy: needed after a write to a frozen weight that leaves the version counter alone, through
        ``weight.data`` or NumPy.
        """
        self._copy.drop()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.value_dtype} up to {self.rows} rows"

    def _apply(self, fn: Any, recurse: bool = True) -> RoundedLinear:
        super()._apply(fn, recurse)
        self.repack()
        return self


def _some(weight: Tensor) -> Tensor:
    """About 64 entries of `[N, K]`, from all over it: what goes through ``.data`` past a frozen weight's version, as an
    adapter that is merged, changes them all.
    """
    return weight.detach()[:: max(1, weight.shape[0] // 8), :: max(1, weight.shape[1] // 8)]


def rounded_copy(weight: Tensor, value_dtype: str) -> Copy:
    """weight: `[N, K]`, rounded to the nearest; int8 in steps of a 127th of the largest of each output. An output
    with a NaN is NaN, as it is with the exact weight.
    """
    if value_dtype == "bfloat16":
        return Copy(weight.to(torch.bfloat16).contiguous(), None)
    scale = scale_of(weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0]))
    return Copy(_in_steps(weight, scale), scale)


def _in_steps(weight: Tensor, scale: Tensor) -> Tensor:
    steps = (weight.detach() / scale.unsqueeze(1)).round().clamp(-127, 127)
    return steps.nan_to_num(0.0).to(torch.int8).contiguous()  # where the scale has the NaN
