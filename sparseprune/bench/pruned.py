"""Weights as pruning leaves them: the operands of the benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layouts

__all__ = ["layout_of", "prune_like"]


def prune_like(w: Tensor, structure: str, sparsity: float) -> Tensor:
    """w: `[N, K]` -> a copy with its smallest magnitudes set to 0; exactly ``round(sparsity * units)`` elements or
    blocks go.

    ``structure``: ``element``, ``RxC`` (blocks by the sum of their magnitudes) or ``N:M`` (N kept of each M along K;
    it fixes its own sparsity, another is a ValueError).
    """
    rows, columns = w.shape
    if structure == "element":
        return w * _keep(w.abs(), sparsity)
    if ":" in structure:
        n, m = (int(part) for part in structure.split(":"))
        if abs(sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(f"structure {structure} expected sparsity {1 - n / m}, got {sparsity}")
        groups = w.view(rows, columns // m, m)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.abs().topk(n, 2).indices, True)
        return (groups * kept).view(rows, columns)
    r, c = (int(part) for part in structure.split("x"))
    blocks = w.view(rows // r, r, columns // c, c)
    kept = _keep(blocks.abs().sum((1, 3)), sparsity)
    return (blocks * kept[:, None, :, None]).view(rows, columns)


def _keep(scores: Tensor, sparsity: float) -> Tensor:
    flat = scores.flatten()
    count = flat.numel() - round(sparsity * flat.numel())
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count).indices] = True
    return mask.view(scores.shape)


def layout_of(w: Tensor, structure: str) -> layouts.Layout:
    """The layout that suits a weight pruned by :func:`prune_like` with this structure."""
    if structure == "element":
        return layouts.from_dense(w, "csr")
    if ":" in structure:
        n, m = (int(part) for part in structure.split(":"))
        return layouts.from_dense(w, "nm", nm=(n, m))
    r, c = (int(part) for part in structure.split("x"))
    return layouts.from_dense(w, "bsr", blocksize=(r, c))
