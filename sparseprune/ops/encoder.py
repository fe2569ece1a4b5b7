"""A stack of layers over whole sequences as one op, of encoders and, with a cache, of decoders that get a prompt; the
steps are data (:mod:`sparseprune.encoder_program`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..encoder_program import Keep, Program, result_features
from ._library import define

__all__ = ["encoder", "prompt"]


def _fake(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> Tensor:
    return x.new_empty((*x.shape[:2], result_features(plan)))


define(
    "encoder(Tensor x, Tensor? mask, Tensor[] tensors, Tensor[] tables, int[] plan, float[] scalars) -> Tensor",
    "encoder",
    _fake,
)


def _fake_prompt(
    x: Tensor, mask: Tensor | None, keys: list[Tensor], values: list[Tensor], tensors: list[Tensor],
    tables: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:2], result_features(plan)))


define(
    "prompt(Tensor x, Tensor? mask, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] tensors, Tensor[] tables, "
    "int[] plan, float[] scalars) -> Tensor",
    "prompt",
    _fake_prompt,
    mutates=(2, 3),
)


def encoder(
    x: Tensor,
    mask: Tensor | None,
    program: Program,
    tensors: Sequence[Tensor],
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """x: `[B, S, D]`, D the features of the program's buffer 0; mask: bool `[B, S]`, True where a token is real, None:
    all are; tensors: packed weights (index int16, offsets int32, values) and float32 vectors that the program's steps
    name by place; tables: rotary cos and sin `[S, depth]`, attention biases `[heads, S keys, S queries]`.

    Returns `[B, S, features of the result]` in x's dtype; rows under the mask are zero, and cost nothing. A token's
    place is its index in its row of x. For inference: RuntimeError where a gradient would be needed. ValueError on
    shapes that do not fit.
    """
    _check("encoder", x, mask, program, (x, *tensors, *tables))
    return torch.ops.sparseprune.encoder(x, mask, list(tensors), list(tables), *program.encode())


def prompt(
    x: Tensor,
    mask: Tensor | None,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    program: Program,
    tensors: Sequence[Tensor],
    tables: Sequence[Tensor] = (),
) -> Tensor:
    """As :func:`encoder`, of a program whose steps keep keys and values. keys, values: float32 `[B, kv heads, S or
    more, depth]` of each layer's cache, which is empty before: written at [0, S) where a token is real; or neither, and
    nothing is kept. tables: rotary cos and sin `[B, S, features]` where the program says that each sequence has its
    own.
    """
    _check("prompt", x, mask, program, (x, *keys, *values, *tensors, *tables))
    if len(keys) != len(values):
        raise ValueError(f"prompt: expected as many keys as values, got {len(keys)} and {len(values)}")
    for step in program.steps:
        if not isinstance(step, Keep) or not keys:
            continue
        if step.cache >= len(keys):
            raise ValueError(f"prompt: keys expected of more than {step.cache} layers, got {len(keys)}")
        for name, t in (("keys", keys[step.cache]), ("values", values[step.cache])):
            fits = t.dim() == 4 and (*t.shape[:2], t.shape[3]) == (x.shape[0], step.heads, step.depth)
            if not fits or t.shape[2] < x.shape[1] or t.dtype != torch.float32:
                room = f"[{x.shape[0]}, {step.heads}, {x.shape[1]} or more, {step.depth}]"
                raise ValueError(f"prompt: {name} expected float32 {room}, got {t.dtype} {list(t.shape)}")
    return torch.ops.sparseprune.prompt(
        x, mask, list(keys), list(values), list(tensors), list(tables), *program.encode()
    )


def _check(op: str, x: Tensor, mask: Tensor | None, program: Program, tracked: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
        raise RuntimeError(f"{op} has no gradient; run the layers, or use torch.no_grad()")
    if x.dim() != 3 or x.shape[-1] != program.buffers[0]:
        raise ValueError(f"{op}: x expected [B, S, {program.buffers[0]}], got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(f"{op}: mask expected bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
