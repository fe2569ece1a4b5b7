"""RoundedLinear: a dense ``nn.Linear`` that answers calls of few rows from a copy of its weight in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import native
from .linear import runs_direct

__all__ = ["RoundedLinear"]


class RoundedLinear(nn.Linear):
    """y = x W^T + bias; inference with up to ``rows`` rows of x reads W rounded to bfloat16, half the bytes.

    x: `[..., K]`; weight: float32 `[N, K]`, the very Parameter of the Linear it was made from, so that a tied embedding
    stays tied and exact; returns `[..., N]`. More rows, gradients, other dtypes, autocast and compiled calls use the
    exact weight. The copy is made at the first call that wants it, follows in-place writes by the version counter, is
    never saved, and takes half as many bytes as the weight; after a write through ``.data`` call :meth:`repack`.
    """

    rows: int

    @classmethod
    def from_linear(cls, linear: nn.Linear, rows: int) -> RoundedLinear:
        """Shares weight and bias with linear. ValueError where rows is below 1."""
        if rows < 1:
            raise ValueError(f"RoundedLinear: rows expected at least 1, got {rows}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        layer.weight, layer.bias, layer.rows = linear.weight, linear.bias, rows
        layer._copy = None
        return layer.train(linear.training)

    _copy: tuple[tuple[int, int], Tensor] | None

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        if (
            input.dtype is torch.float32 is weight.dtype
            and not self.training
            and 0 < input.shape[:-1].numel() <= self.rows
            and input.shape[-1:] == weight.shape[1:]
            and runs_direct(input, weight, bias)
        ):
            return native.decode.rounded_linear(input, self._rounded(weight), bias)
        return F.linear(input, weight, bias)

    def _rounded(self, weight: Tensor) -> Tensor:
        stamp = weight.data_ptr(), -1 if weight.is_inference() else weight._version
        found = self._copy
        if found is None or found[0] != stamp:
            found = self._copy = stamp, weight.detach().to(torch.bfloat16)
        return found[1]

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` that shares weight and bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def repack(self) -> None:
        """Drops the copy: needed after a write through ``weight.data``, which leaves the version counter alone."""
        self._copy = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bfloat16 up to {self.rows} rows"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copy": None}

    def _apply(self, fn: Any, recurse: bool = True) -> RoundedLinear:
        super()._apply(fn, recurse)
        self.repack()
        return self
