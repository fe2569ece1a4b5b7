"""A stack of layers through the compiled core, whole sequences: one call, one parallel region, real tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._registry import kernel
from ._bound import BoundProgram
from ._inputs import rows_of, why_not_cpu

__all__ = ["BoundEncoder", "cache_numbers", "encoder", "prompt", "why_not_cache"]


def cache_numbers(keys: Tensor, values: Tensor) -> tuple[int, ...]:
    """What the core needs of a layer's keys and values `[B, kv heads, room, depth]`, a head's places one behind the
    other.
    """
    k, v = keys.stride(), values.stride()
    return keys.data_ptr(), values.data_ptr(), k[0], k[1], v[0], v[1]


class BoundEncoder(BoundProgram):
    """A program of encoder layers, or of decoder layers that get a prompt."""

    op, core = "encoder", "EncoderProgram"

    def __call__(
        self, x: Tensor, mask: Tensor | None, tables: Sequence[Tensor], cache: Sequence[int] = (), room: int = 0
    ) -> Tensor:
        """x: `[B, S, D]`; mask bool `[B, S]` or None; tables: float32, contiguous; cache: the numbers of
        :func:`cache_numbers` of each layer, one after the other, none: nothing is kept; room: its places; returns `[B,
        S, features]`. The caller has seen to it that the cache fits x.
        """
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
            list(cache),
            room,
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


def _why_not_prompt(
    x: Tensor, mask: Tensor | None, keys: list[Tensor], values: list[Tensor], tensors: list[Tensor],
    tables: list[Tensor], plan: list[int], scalars: list[float],
) -> list[str]:  # fmt: skip
    reasons = _why_not(x, mask, [*tensors, *keys, *values], tables, plan, scalars)
    return reasons + why_not_cache(keys, values)


def why_not_cache(keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[str]:
    """What about keys and values `[B, kv heads, room, depth]` the core cannot read or write."""
    if any(t.dtype != torch.float32 or t.stride(3) != 1 or t.stride(2) != t.shape[3] for t in (*keys, *values)):
        return ["needs keys and values in float32, a head's places one behind the other"]
    return []


@kernel("prompt", "native", _why_not_prompt)
def prompt(
    x: Tensor, mask: Tensor | None, keys: list[Tensor], values: list[Tensor], tensors: list[Tensor],
    tables: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    """x: `[B, S, D]`; mask bool `[B, S]`; keys, values: `[B, heads, S or more, depth]` of each layer, written where a
    token is real, or none; returns `[B, S, features of the result]`, zero under the mask.
    """
    cache = [n for k, v in zip(keys, values) for n in cache_numbers(k, v)]
    room = min((t.shape[2] for t in (*keys, *values)), default=0)
    held = [table.to(torch.float32).contiguous() for table in tables]
    return BoundEncoder(tensors, plan, scalars)(x, mask, held, cache, room)
