"""SparseGPT: the optimal-brain-surgeon sweep over columns (Frantar and Alistarh, 2023, algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..granularity import NM, InWeight
from .choosing import choose, choose_rows, spread

__all__ = ["damp_", "factor_", "in_float32", "inverse_factor", "sparsegpt_", "sweep_"]

# The diagonal of inputs that are always zero, as a share of its mean: far below any damping, within float32.
DEAD = 1e-12


@contextmanager
def in_float32(weight: Tensor) -> Iterator[Tensor]:
    """weight `[N, K]` as a contiguous float32 tensor to change in place: its own memory where it is one, else a copy
    that is written back at the end.
    """
    values = weight.detach()
    work = values.float().contiguous()
    yield work
    if work.data_ptr() != values.data_ptr():
        values.copy_(work)


def damp_(hessian: Tensor, damping: float) -> Tensor:
    """hessian `[K, K]` plus damping * mean(diagonal) on the diagonal, in place; inputs that are always zero get DEAD *
    mean(diagonal).

    Their weights then go before those of all other inputs, the smallest first. The authors set them to zero, which is
    the same until no others are left to go; those that stay keep their values here.
    """
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    diagonal += damping * mean
    diagonal[dead] = DEAD * mean
    return hessian


def factor_(matrix: Tensor, *, upper: bool = False) -> bool:
    """Cholesky factor of a symmetric matrix `[K, K]`, in place; False, and the matrix lost, where it is not positive
    definite.

    Given column by column (the transpose of a contiguous one) LAPACK works on it without a copy.
    """
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, upper=upper, out=(matrix, info))
    return int(info) == 0


def inverse_factor(hessian: Callable[[], Tensor], damping: float) -> Tensor:
    """Upper Cholesky factor U `[K, K]` of the damped inverse, U^T U = H^-1.

    hessian: gives H `[K, K]`, contiguous, in memory that becomes the factor. A matrix that is not positive definite in
    float32 is fetched and tried again with ten times the damping, up to 1.0; then ValueError.
    """
    while True:
        upper = damp_(hessian(), damping).t()
        if factor_(upper):
            torch.cholesky_inverse(upper, out=upper)
            if factor_(upper, upper=True):
                return upper
        del upper
        if damping >= 1.0:
            raise ValueError(
                "sparsegpt: the Hessian is not positive definite even with damping 1.0; give more calibration data"
            )
        damping = min(1.0, max(damping, 1e-3) * 10)


def sparsegpt_(
    weights: list[Tensor],
    hessian: Callable[[], Tensor],
    keeps: list[int],
    pattern: InWeight,
    *,
    scope: str = "layer",
    damping: float = 0.01,
    blocksize: int = 128,
) -> Iterator[Tensor]:
    """weights: `[N_i, K]` that read one input, of any floating dtype, pruned in place; hessian: as for
    `inverse_factor`; keeps: units of the pattern to keep in each.

    Yields the mask bool `[N_i, K]` of each, once it is pruned. Beside the weights it holds one matrix `[K, K]`, one
    mask and some columns; of weights that are not float32, a float32 copy of one.
    """
    upper = inverse_factor(hessian, damping)
    for weight, keep in zip(weights, keeps):
        with in_float32(weight) as values:
            mask = sweep_(values, upper, keep, pattern, scope=scope, blocksize=blocksize)
        yield mask


def sweep_(weight: Tensor, upper: Tensor, keep: int, pattern: InWeight, *, scope: str, blocksize: int) -> Tensor:
    """weight float32 `[N, K]`, pruned in place; upper: `inverse_factor` `[K, K]`; returns the mask bool `[N, K]`.

    Within every blocksize columns the mask is chosen by w^2 / U_jj^2, the share of kept units following the layer's
    density to the unit, or that of each row where scope is "row"; the error of each removed column is carried to the
    columns right of it.
    """
    columns = weight.shape[1]
    in_rows = spread(keep, len(weight) // pattern.blocksize[0]) if scope == "row" else []
    mask = torch.ones_like(weight, dtype=torch.bool)
    step = max(pattern.width, blocksize // pattern.width * pattern.width)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        block = weight[:, start:stop].clone()
        factor = upper[start:stop, start:stop]
        diagonal = factor.diagonal()
        kept = mask[:, start:stop]
        if scope == "row" and not isinstance(pattern, NM):
            counts = [_between(start, stop, columns, n, i, len(in_rows)) for i, n in enumerate(in_rows)]
            kept.copy_(choose_rows((block / diagonal).square_(), pattern, counts))
        elif not isinstance(pattern, NM):
            kept.copy_(choose((block / diagonal).square_(), pattern, _between(start, stop, columns, keep), scope))
        error = torch.zeros_like(block)
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                kept[:, group] = choose((block[:, group] / diagonal[group]).square_(), pattern, 0, scope)
            column = block[:, j]
            gone = torch.where(kept[:, j], 0.0, column) / diagonal[j]
            block[:, j:].addr_(gone, factor[j, j:], alpha=-1.0)
            error[:, j] = gone
        weight[:, start:stop] = block.masked_fill_(~kept, 0.0)
        del block
        if stop < columns:
            weight[:, stop:].addmm_(error, upper[start:stop, stop:], alpha=-1.0)
    return mask


def _between(start: int, stop: int, columns: int, keep: int, row: int = 0, rows: int = 1) -> int:
    """How many of keep units fall to the columns from start to stop: in all exactly keep. Each row rounds at another
    column, so that few units of each do not all come to lie in the same ones.
    """
    ahead = row * columns // rows
    return (keep * stop + ahead) // columns - (keep * start + ahead) // columns
