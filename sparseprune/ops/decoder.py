"""A stack of decoder layers as one op; the steps are data (:mod:`sparseprune.decoder_program`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..decoder_program import Attention, Program, result_features
from ._library import define

__all__ = ["decoder"]


def _fake(
    x: Tensor, keys: list[Tensor], values: list[Tensor], past: int, masks: list[Tensor], tables: list[Tensor],
    tensors: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:2], result_features(plan)))


define(
    "decoder(Tensor x, Tensor(a!)[] keys, Tensor(b!)[] values, int past, Tensor[] masks, Tensor[] tables, "
    "Tensor[] tensors, int[] plan, float[] scalars) -> Tensor",
    "decoder",
    _fake,
    mutates=(1, 2),
)


def decoder(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    past: int,
    program: Program,
    tensors: Sequence[Tensor],
    masks: Sequence[Tensor] = (),
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """x: `[B, T, D]`, D the features of the program's buffer 0, the new tokens; keys, values: float32 `[B, kv heads,
    room, depth]` of each layer's cache, of which [0, past) is there and [past, past + T) is written; masks: bool `[B or
    1, T, keys]`, True where a token sees a key, which may be a later one; tables: float32 cos and sin `[B or 1, T,
    features]`, both of one shape, one pair after the other; tensors: packed weights and float32 vectors that the
    program's steps name by place.

    Returns `[B, T, features of the result]` in x's dtype; a token that sees no key gets zeros of attention. For
    inference: RuntimeError where a gradient would be needed. ValueError on shapes that do not fit.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *keys, *values, *tensors, *tables)):
        raise RuntimeError("decoder has no gradient; run the layers, or use torch.no_grad()")
    if x.dim() != 3 or x.shape[-1] != program.buffers[0]:
        raise ValueError(f"decoder: x expected [B, T, {program.buffers[0]}], got {list(x.shape)}")
    batch, tokens = x.shape[:2]
    if past < 0 or len(keys) != len(values):
        got = f"{past}, {len(keys)} and {len(values)}"
        raise ValueError(f"decoder: expected past >= 0 and as many keys as values, got {got}")
    for step in program.steps:
        if isinstance(step, Attention):
            _check_attention(step, batch, tokens, keys, values, past, masks, tables)
    return torch.ops.sparseprune.decoder(
        x, list(keys), list(values), past, list(masks), list(tables), list(tensors), *program.encode()
    )


def _check_attention(
    step: Attention, batch: int, tokens: int, keys: Sequence[Tensor], values: Sequence[Tensor], past: int,
    masks: Sequence[Tensor], tables: Sequence[Tensor],
) -> None:  # fmt: skip
    if step.cache >= len(keys):
        raise ValueError(f"decoder: keys expected of more than {step.cache} layers, got {len(keys)}")
    for name, t in (("keys", keys[step.cache]), ("values", values[step.cache])):
        fits = t.dim() == 4 and (*t.shape[:2], t.shape[3]) == (batch, step.kv_heads, step.depth)
        if not fits or t.shape[2] < past + tokens or t.dtype != torch.float32:
            raise ValueError(
                f"decoder: {name} expected float32 [{batch}, {step.kv_heads}, {past + tokens} or more, {step.depth}], "
                f"got {t.dtype} {list(t.shape)}"
            )
    if step.mask >= 0:
        if step.mask >= len(masks):
            raise ValueError(f"decoder: masks expected more than {step.mask}, got {len(masks)}")
        mask = masks[step.mask]
        room = min(keys[step.cache].shape[2], values[step.cache].shape[2])
        fits = mask.dim() == 3 and mask.shape[0] in (1, batch) and mask.shape[1] == tokens
        if mask.dtype != torch.bool or not fits or not past + tokens <= mask.shape[2] <= room:
            raise ValueError(
                f"decoder: mask expected bool [{batch} or 1, {tokens}, {past + tokens} to {room}], got {mask.dtype} "
                f"{list(mask.shape)}"
            )
    if step.turned:
        pair = tables[2 * step.table : 2 * step.table + 2]
        for table in pair:
            fits = table.dim() == 3 and table.shape[0] in (1, batch) and table.shape[1] == tokens
            if not fits or table.shape[2] < step.turned:
                raise ValueError(
                    f"decoder: tables expected [{batch} or 1, {tokens}, {step.turned} or more], got {list(table.shape)}"
                )
        if len(pair) != 2:
            raise ValueError(f"decoder: tables expected cos and sin at {2 * step.table}, got {len(tables)} tables")
        if pair[0].shape != pair[1].shape:
            got = " and ".join(str(list(table.shape)) for table in pair)
            raise ValueError(f"decoder: tables expected cos and sin of one shape, got {got}")
