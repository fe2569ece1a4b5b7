"""Sampled products: what the kept entries of a weight have for a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, widest

__all__ = ["sddmm"]

_OPS = torch.ops.sparseprune


def _fake_sddmm(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor, r: int, c: int) -> Tensor:
    return x.new_empty((col.shape[0], r, c), dtype=widest(x, dy))


define(
    "sddmm(Tensor x, Tensor dy, Tensor crow_indices, Tensor col_indices, int r, int c) -> Tensor", "sddmm", _fake_sddmm,
    gradient=True,
)  # fmt: skip


define(
    "packed_sddmm(Tensor x, Tensor dy, Tensor index, Tensor offsets, Tensor perm, int[] plan, int n_values) -> Tensor",
    "packed_sddmm",
    lambda x, dy, index, offsets, perm, plan, n_values: x.new_empty((n_values,), dtype=widest(x, dy)),
    gradient=True,
)

define(
    "nm_sddmm(Tensor x, Tensor dy, Tensor indices, int n, int m) -> Tensor",
    "nm_sddmm",
    lambda x, dy, indices, n, m: x.new_empty(indices.shape, dtype=widest(x, dy)),
    gradient=True,
)


def sddmm(
    x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, blocksize: tuple[int, int] | None = None
) -> Tensor:
    """Sampled dense-dense product: the gradient of the kept weights only.

    x: `[..., K]`; dy: `[..., N_out]`; returns `[nnz]`, or `[nblocks, r, c]` with blocksize: sum over tokens of
    dy[n, o] x[n, k] at the kept entries, in float32 or wider. Not differentiable itself.
    """
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"sddmm: x and dy expected the same tokens, got {list(x.shape)} and {list(dy.shape)}")
    r, c = blocksize or (1, 1)
    if dy.shape[-1] != (crow_indices.shape[0] - 1) * r:
        raise ValueError(f"sddmm: dy expected {(crow_indices.shape[0] - 1) * r} features, got {dy.shape[-1]}")
    blocks = _OPS.sddmm(x, dy, crow_indices, col_indices, r, c)
    return blocks.flatten() if blocksize is None else blocks
