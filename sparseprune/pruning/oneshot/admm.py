"""Mask and weights of a layer found together, by the alternating direction method of multipliers on the layer's loss.

The loss of weights V `[N, K]` is tr((V - W) H (V - W)^T), H `[K, K]` the mean outer product of the inputs. ADMM splits
V from its sparse copy Z (Boza, 2024, "Fast and Effective Weight Update for Pruned Large Language Models"; Meng et al.,
2024, "ALPS"): V minimises the loss plus rho |V - Z + U|^2, Z is V + U projected onto the pattern, so that the mask is
chosen anew in every iteration, and U sums up V - Z. With rising rho the mask settles; conjugate gradients then find
the best weights on the settled mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .patterns import Pattern, choose
from .sparsegpt import damp_, factor_, sweep
from .store import release

__all__ = ["admm", "loss_change", "on_the_mask_"]

# (rho, iterations) for inputs scaled to unit second moment. On layers of a language model a constant rho leaves 10 to
# 15 % more loss, twice the iterations gain 2 %.
STAGES = ((0.1, 4), (0.2, 4), (0.4, 3), (0.8, 2), (1.6, 2))

# Rows are independent once the mask is chosen; so many numbers at a time keep the temporaries in the cache.
CHUNK = 2**18


def _rows(matrix: Tensor) -> Iterator[slice]:
    step = max(1, CHUNK // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, start + step)


def loss_change(new: Tensor, old: Tensor, pull: Tensor, hessian: Tensor) -> float:
    """The layer loss of new less that of old, all `[N, K]`; pull `[N, K]` is target @ hessian."""
    total = 0.0
    for rows in _rows(new):
        slope = torch.addmm(pull[rows], new[rows] + old[rows], hessian, beta=-2)
        total += float((slope * (new[rows] - old[rows])).sum())
    return total


def on_the_mask_(weight: Tensor, pull: Tensor, hessian: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Lowers the layer loss over weights that are zero outside mask, by conjugate gradients on all rows at once.

    weight (zero outside mask; changed in place and returned), pull = target @ hessian, mask `[N, K]`; hessian
    `[K, K]` positive definite, best with a constant diagonal. Each iteration lowers the loss of every row that is not
    at its minimum.
    """
    tiny = torch.finfo(weight.dtype).tiny
    for rows in _rows(weight):
        kept, part = mask[rows], weight[rows]
        residual = torch.addmm(pull[rows], part, hessian, alpha=-1).mul_(kept)
        direction = residual.clone()
        square = residual.square().sum(1, keepdim=True)
        for _ in range(iterations):
            image = (direction @ hessian).mul_(kept)
            step = square / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
            part.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1)
            fresh = residual.square().sum(1, keepdim=True)
            direction.mul_(fresh / square.clamp_min(tiny)).add_(residual)
            square = fresh
    return weight


def admm(
    weights: list[Tensor],
    hessian: Tensor,
    keeps: list[int],
    pattern: Pattern,
    *,
    scope: str = "layer",
    damping: float = 0.01,
    blocksize: int = 128,
    polish: int = 8,
    overwrite: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """weights: `[N_i, K]` that read one input with hessian `[K, K]`; keeps: units of the pattern to keep in each.

    polish: conjugate-gradient iterations at the end; overwrite: hessian may be used as workspace. Returns (weight
    float32 `[N_i, K]`, mask bool `[N_i, K]`) for each. It starts from `sparsegpt` and never returns a layer with more
    (damped) loss than that. Beside the result it holds three float32 copies of the weights and one matrix `[K, K]`
    (two without overwrite).
    """
    sizes = [w.shape[0] for w in weights]
    start, swept = sweep(weights, hessian, keeps, pattern, scope=scope, damping=damping, blocksize=blocksize)
    release()
    unit = damp_(hessian if overwrite else hessian.clone(), damping)
    scale = unit.diagonal().sqrt()
    unit.div_(scale).div_(scale[:, None])
    start *= scale
    point = torch.cat([w.detach().float() for w in weights]).mul_(scale)
    pull = point @ unit
    room = torch.empty_like(point)
    inverse = torch.empty_like(unit).t()
    # V + U of the first iteration, whose V is start: U is chosen such that start is stationary.
    rho = STAGES[0][0]
    torch.addmm(pull, start, unit, alpha=-1, out=point).div_(rho).add_(start)
    mask = _project(point, room, sizes, keeps, pattern, scope)
    # Between iterations point holds Z where mask is set and -U elsewhere: Z - U, which is all the next one needs.
    _reflect_(point, mask, room, -1.0)
    done = 1
    for stage, iterations in STAGES:
        _reflect_(point, mask, room, rho / stage)  # U is in units of 1 / rho
        rho = stage
        inverse.copy_(unit).diagonal().add_(rho)
        if not factor_(inverse):
            raise ValueError("best: the Hessian is not positive definite; raise damping or give more calibration data")
        torch.cholesky_inverse(inverse, out=inverse)
        for _ in range(iterations - done):
            torch.add(pull, point, alpha=rho, out=room)
            point.masked_fill_(mask, 0).addmm_(room, inverse, beta=-1)
            mask = _project(point, room, sizes, keeps, pattern, scope)
            _reflect_(point, mask, room, -1.0)
        done = 0
    del room, inverse
    release()
    point.mul_(mask)
    on_the_mask_(point, pull, unit, mask, polish)
    parts = (each.split(sizes) for each in (point, start, pull, mask, swept))
    for new, old, pulled, chosen, first in zip(*parts):
        if loss_change(new, old, pulled, unit) > 0:
            new.copy_(old)
            chosen.copy_(first)
    point /= scale
    return list(zip(point.split(sizes), mask.split(sizes)))


def _reflect_(point: Tensor, mask: Tensor, room: Tensor, factor: float) -> None:
    """point `[N, K]` times factor outside mask; room: memory of its size."""
    torch.mul(point, factor, out=room)
    torch.where(mask, point, room, out=point)


def _project(
    values: Tensor, room: Tensor, sizes: list[int], keeps: list[int], pattern: Pattern, scope: str
) -> Tensor:
    """values `[sum N_i, K]` -> the mask that the projection keeps in each layer: the largest squares, summed over a
    block. room: memory of their size.
    """
    scores = torch.square(values, out=room) if pattern.kind == "block" else torch.abs(values, out=room)
    return torch.cat([choose(part, pattern, keep, scope) for part, keep in zip(scores.split(sizes), keeps)])
