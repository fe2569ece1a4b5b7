"""A stack of encoder layers through the compiled core: one call, one parallel region, real tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import kernel
from ._bound import BoundProgram
from ._inputs import rows_of, why_not_cpu

__all__ = ["BoundEncoder", "encoder"]


class BoundEncoder(BoundProgram):
    """A program of encoder layers."""

    op, core = "encoder", "EncoderProgram"

    def __call__(self, x: Tensor, mask: Tensor | None, tables: Sequence[Tensor]) -> Tensor:
        """x: `[B, S, D]`; mask bool `[B, S]` or None; tables: float32, contiguous; returns `[B, S, features]`."""
        batch, length, width = x.shape
        rows = x if x.dtype is torch.float32 and x.is_contiguous() else rows_of(x, width)
        y = torch.empty((batch, length, self.features), dtype=torch.float32)
        real = None if mask is None else mask.contiguous()
        self.program.run(
            rows.data_ptr(),
            width if rows is x else rows.stride(0),
            0 if real is None else real.data_ptr(),
            batch,
            length,
            [table.data_ptr() for table in tables],
            [table.numel() for table in tables],
            y.data_ptr(),
        )
        return y if x.dtype is torch.float32 else y.to(x.dtype)


def _why_not(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> list[str]:
    reasons = why_not_cpu(x)
    if any(tensor.device.type != "cpu" for tensor in tensors):
        reasons.append("needs its weights on the CPU")
    return reasons


@kernel("encoder", "native", _why_not)
def encoder(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> Tensor:
    """x: `[B, S, D]`; mask bool `[B, S]`; returns `[B, S, features of the result]`, zero under the mask."""
    return BoundEncoder(tensors, plan, scalars)(x, mask, [table.to(torch.float32).contiguous() for table in tables])
