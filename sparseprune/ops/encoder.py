"""A stack of encoder layers as one op; the steps are data (:mod:`sparseprune.encoder_program`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..encoder_program import Program, result_features
from ._library import define

__all__ = ["encoder"]


def _fake(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> Tensor:
    return x.new_empty((*x.shape[:2], result_features(plan)))


define(
    "encoder(Tensor x, Tensor? mask, Tensor[] tensors, Tensor[] tables, int[] plan, float[] scalars) -> Tensor",
    "encoder",
    _fake,
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
    tracked = (x, *tensors, *tables)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tracked):
        raise RuntimeError("encoder has no gradient; run the layers, or use torch.no_grad()")
    if x.dim() != 3 or x.shape[-1] != program.buffers[0]:
        raise ValueError(f"encoder: x expected [B, S, {program.buffers[0]}], got {list(x.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(f"encoder: mask expected bool {list(x.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
    return torch.ops.sparseprune.encoder(x, mask, list(tensors), list(tables), *program.encode())
