"""A stack of decoder layers through the compiled core: one call, one parallel region, new tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from ..decoder_program import MOST_ROWS
from ._bound import BoundProgram
from ._inputs import rows_of, why_not_cpu
from .encoder import cache_numbers, why_not_cache

__all__ = ["BoundDecoder", "decoder", "mask_numbers", "table_numbers"]


def mask_numbers(mask: Tensor) -> tuple[int, ...]:
    """The same of a mask, bool `[B, T, keys]`, whose last stride is 1."""
    batch, token, _ = mask.stride()
    return mask.data_ptr(), batch, token, mask.shape[2]


def table_numbers(cos: Tensor, sin: Tensor) -> tuple[int, ...]:
    """The same of rotary tables, float32 `[B or 1, T, features]`, whose last stride is 1. ValueError where cos and sin
    lie differently: both are read with the strides of cos.
    """
    if cos.shape != sin.shape or any(n > 1 and a != b for n, a, b in zip(cos.shape, cos.stride(), sin.stride())):
        expected, got = (f"{list(t.shape)} with strides {t.stride()}" for t in (cos, sin))
        raise ValueError(f"decoder: sin expected as cos, {expected}, got {got}; make both contiguous, of one shape")
    batch, token, _ = cos.stride()
    return cos.data_ptr(), sin.data_ptr(), 0 if cos.shape[0] == 1 else batch, token, cos.shape[2]


class BoundDecoder(BoundProgram):
    """A program of decoder layers."""

    op, core = "decoder", "DecoderProgram"

    def __call__(
        self, x: Tensor, cache: list[int], room: int, past: int, masks: list[int], tables: list[int]
    ) -> Tensor:
        """x: float32 `[B, T, D]`; cache, masks, tables: the numbers of :func:`cache_numbers`, :func:`mask_numbers` and
        :func:`table_numbers`, one after the other; room: places of the cache; returns `[B, T, features]`. The caller
        has seen to it that they fit x.
        """
        batch, tokens, width = x.shape
        rows = x if x.is_contiguous() else rows_of(x, width)
        y = torch.empty((batch, tokens, self.features), dtype=torch.float32)
        stride = width if rows is x else rows.stride(0)
        self.program.run(rows.data_ptr(), stride, batch, tokens, past, cache, room, masks, tables, y.data_ptr())
        return y


def _why_not(
    x: Tensor, keys: list[Tensor], values: list[Tensor], past: int, masks: list[Tensor], tables: list[Tensor],
    tensors: list[Tensor], plan: list[int], scalars: list[float],
) -> list[str]:  # fmt: skip
    reasons = why_not_cpu(x)
    if any(tensor.device.type != "cpu" for tensor in (*tensors, *keys, *values)):
        reasons.append("needs its weights and its cache on the CPU")
    if x.shape[:2].numel() > MOST_ROWS:
        reasons.append(f"takes up to {MOST_ROWS} tokens, got {x.shape[:2].numel()}")
    return reasons + why_not_cache(keys, values)


@kernel("decoder", "native", _why_not)
def decoder(
    x: Tensor, keys: list[Tensor], values: list[Tensor], past: int, masks: list[Tensor], tables: list[Tensor],
    tensors: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    """x: `[B, T, D]`; keys, values: `[B, kv heads, room, depth]` of each layer, written at [past, past + T); returns
    `[B, T, features of the result]`.
    """
    cache = [n for k, v in zip(keys, values) for n in cache_numbers(k, v)]
    room = min((t.shape[2] for t in (*keys, *values)), default=past + x.shape[1])
    held = [mask.contiguous() for mask in masks], [table.to(torch.float32).contiguous() for table in tables]
    seen = [n for mask in held[0] for n in mask_numbers(mask.expand(x.shape[0], *mask.shape[1:]))]
    turns = [n for cos, sin in zip(held[1][::2], held[1][1::2]) for n in table_numbers(cos, sin)]
    bound = BoundDecoder(tensors, plan, scalars)
    return bound(x.to(torch.float32), cache, room, past, seen, turns).to(x.dtype)
