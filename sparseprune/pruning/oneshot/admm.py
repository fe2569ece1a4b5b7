"""Mask and weights of a layer found together, by the alternating direction method of multipliers on the layer's loss.

The loss of weights V `[N, K]` is tr((V - W) H (V - W)^T), H `[K, K]` the mean outer product of the inputs. ADMM splits
V from its sparse copy Z (Boza, 2024, "Fast and Effective Weight Update for Pruned Large Language Models"; Meng et al.,
2024, "ALPS"): V minimises the loss plus rho |V - Z + U|^2, Z is V + U projected onto the pattern, so that the mask is
chosen anew in every iteration, and U sums up V - Z. With rising rho the mask settles; conjugate gradients then find
the best weights on the settled mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .patterns import Pattern, choose
from .sparsegpt import damped, sparsegpt

__all__ = ["admm", "layer_loss", "on_the_mask"]

# (rho, iterations) for inputs scaled to unit second moment. On layers of a language model a constant rho leaves 10 to
# 15 % more loss, twice the iterations gain 2 %.
STAGES = ((0.1, 4), (0.2, 4), (0.4, 3), (0.8, 2), (1.6, 2))


def layer_loss(weight: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """weight, target `[N, K]`, hessian `[K, K]` -> the loss of each row `[N]`."""
    difference = weight - target
    return ((difference @ hessian) * difference).sum(1)


def on_the_mask(start: Tensor, target: Tensor, hessian: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """The least layer loss over weights that are zero outside mask, all rows at once by conjugate gradients.

    start (zero outside mask), target, mask `[N, K]`; hessian `[K, K]` positive definite, best with a constant diagonal.
    Each iteration lowers the loss of every row that is not at its minimum.
    """
    tiny = torch.finfo(start.dtype).tiny
    weight = start.clone()
    residual = ((target - start) @ hessian).mul_(mask)
    direction = residual.clone()
    square = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ hessian).mul_(mask)
        step = square / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
        weight.addcmul_(step, direction)
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
) -> list[tuple[Tensor, Tensor]]:
    """weights: `[N_i, K]` that read one input with hessian `[K, K]`; keeps: units of the pattern to keep in each.

    polish: conjugate-gradient iterations at the end. Returns (weight float32 `[N_i, K]`, mask bool `[N_i, K]`) for
    each. It starts from `sparsegpt` and never returns a layer with more (damped) loss than that.
    """
    sizes = [w.shape[0] for w in weights]
    h = damped(hessian, damping)
    scale = h.diagonal().sqrt()
    unit = h / scale / scale[:, None]
    target = torch.cat([w.detach().float() for w in weights]) * scale
    first = sparsegpt(weights, hessian, keeps, pattern, scope=scope, damping=damping, blocksize=blocksize)
    start = torch.cat([w for w, _ in first]) * scale
    pull = target @ unit
    eye = torch.eye(unit.shape[0], device=unit.device)
    sparse = start
    scaled = pull - start @ unit  # rho * U; this one makes start stationary
    for rho, iterations in STAGES:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(unit + rho * eye))
        dual = scaled / rho
        for _ in range(iterations):
            dual += torch.add(pull, sparse - dual, alpha=rho) @ inverse
            mask = torch.cat([_project(v, pattern, k, scope) for v, k in zip(dual.split(sizes), keeps)])
            sparse = dual.masked_fill(~mask, 0)
            dual -= sparse
        scaled = dual * rho
    refined = on_the_mask(sparse, target, unit, mask, polish)
    better = layer_loss(refined, target, unit), layer_loss(start, target, unit)
    solved = []
    for i, (new, old) in enumerate(zip(*(loss.split(sizes) for loss in better))):
        if float(new.sum()) <= float(old.sum()):
            solved.append((refined.split(sizes)[i] / scale, mask.split(sizes)[i]))
        else:
            solved.append(first[i])
    return solved


def _project(values: Tensor, pattern: Pattern, keep: int, scope: str) -> Tensor:
    """values `[N, K]` -> the mask that the projection keeps: the largest squares, summed over a block."""
    return choose(values.square() if pattern.kind == "block" else values.abs(), pattern, keep, scope)
