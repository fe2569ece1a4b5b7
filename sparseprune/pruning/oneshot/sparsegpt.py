"""SparseGPT: the optimal-brain-surgeon sweep over columns (Frantar and Alistarh, 2023, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import Pattern, choose

__all__ = ["damp_", "factor_", "inverse_factor", "sparsegpt", "sweep"]


def damp_(hessian: Tensor, damping: float) -> Tensor:
    """hessian `[K, K]` plus damping * mean(diagonal) on the diagonal, in place; inputs that are always zero get a
    diagonal of 1.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean()
    diagonal += damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal[dead] = torch.ones_like(mean)
    return hessian


def factor_(matrix: Tensor, *, upper: bool = False) -> bool:
    """Cholesky factor of a symmetric matrix `[K, K]`, in place; False, and the matrix lost, where it is not positive
    definite.

    Given column by column (the transpose of a contiguous one) LAPACK works on it without a copy.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, info))
    return int(info) == 0


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor U `[K, K]` of the damped inverse, U^T U = H^-1.

    A matrix that is not positive definite in float32 is tried again with ten times the damping, up to 1.0; then
    ValueError.
    """
    while True:
        upper = damp_(hessian.clone(memory_format=torch.contiguous_format), damping).t()
        if factor_(upper):
            torch.cholesky_inverse(upper, out=upper)
            if factor_(upper, upper=True):
                return upper
        if damping >= 1.0:
            raise ValueError(
                "sparsegpt: the Hessian is not positive definite even with damping 1.0; give more calibration data"
            )
        damping = min(1.0, max(damping, 1e-3) * 10)


def sparsegpt(
    weights: list[Tensor],
    hessian: Tensor,
    keeps: list[int],
    pattern: Pattern,
    *,
    scope: str = "layer",
    damping: float = 0.01,
    blocksize: int = 128,
) -> list[tuple[Tensor, Tensor]]:
    """weights: `[N_i, K]` that read one input with hessian `[K, K]`; keeps: units of the pattern to keep in each.

    Returns (weight float32 `[N_i, K]`, mask bool `[N_i, K]`) for each. Within every blocksize columns the mask is
    chosen by w^2 / U_jj^2, the share of kept units following the layer's density to the unit; the error of each
    removed column is carried to the columns right of it.
    """
    solved, mask = sweep(weights, hessian, keeps, pattern, scope=scope, damping=damping, blocksize=blocksize)
    sizes = [w.shape[0] for w in weights]
    return list(zip(solved.split(sizes), mask.split(sizes)))


def sweep(
    weights: list[Tensor],
    hessian: Tensor,
    keeps: list[int],
    pattern: Pattern,
    *,
    scope: str,
    damping: float,
    blocksize: int,
) -> tuple[Tensor, Tensor]:
    """`sparsegpt` with the layers below each other: weight float32 `[sum N_i, K]` and its mask."""
    sizes = [w.shape[0] for w in weights]
    w = torch.cat([v.detach().float() for v in weights])
    columns = w.shape[1]
    upper = inverse_factor(hessian, damping)
    mask = torch.ones_like(w, dtype=torch.bool)
    step = max(pattern.width, blocksize // pattern.width * pattern.width)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block = w[:, start:stop].clone()
        factor = upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        error = torch.zeros_like(block)
        kept = mask[:, start:stop]
        if pattern.kind != "nm":
            scores = (block / diagonal).square_()
            offset = 0
            for size, keep in zip(sizes, keeps):
                share = keep * stop // columns - keep * start // columns
                kept[offset : offset + size] = choose(scores[offset : offset + size], pattern, share, scope)
                offset += size
        for j in range(stop - start):
            if pattern.kind == "nm" and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                kept[:, group] = choose((block[:, group] / diagonal[group]).square_(), pattern, 0, scope)
            column = block[:, j]
            gone = torch.where(kept[:, j], 0.0, column) / diagonal[j]
            block[:, j:].addr_(gone, factor[j, j:], alpha=-1.0)
            error[:, j] = gone
        w[:, start:stop] = block.masked_fill_(~kept, 0.0)
        if stop < columns:
            w[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1.0)
    return w, mask
