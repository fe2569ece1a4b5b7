"""Mask and weights of a layer found together, by the alternating direction method of multipliers on the layer's loss.

The loss of weights V `[N, K]` is tr((V - W) H (V - W)^T), H `[K, K]` the mean outer product of the inputs. ADMM splits
V from its sparse copy Z (Boza, 2024, "Fast and Effective Weight Update for Pruned Large Language Models"; Meng et al.,
2024, "ALPS"): V minimises the loss plus rho |V - Z + U|^2, Z is V + U projected onto the pattern, so that the mask is
chosen anew in every iteration, and U sums up V - Z. With rising rho the mask settles; conjugate gradients then find
the best weights on the settled mask.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from ... import ops
from ..granularity import Block, Element, InWeight
from ..masks import MaskSet
from .choosing import choose_sliced, row_slices
from .sparsegpt import damp_, factor_, in_float32, inverse_factor, sweep_
from .store import SpilledMatrix, release

__all__ = ["admm_", "loss_change", "on_the_mask_"]

# (rho, iterations) for inputs scaled to unit second moment. On layers of a language model a constant rho leaves 10 to
# 15 % more loss, twice the iterations gain 2 %.
STAGES = ((0.1, 4), (0.2, 4), (0.4, 3), (0.8, 2), (1.6, 2))

# Rows are independent once the mask is chosen; so many numbers at a time keep the temporaries small, in the cache where
# several are in use at once.
SLICE = 2**19
POLISHED = 2**18

TILE = 256


def loss_change(new: Tensor, old: SpilledMatrix, pull: SpilledMatrix, hessian: Tensor) -> float:
    """The layer loss of new less that of old, all `[N, K]`; pull `[N, K]` is target @ hessian."""
    total = 0.0
    for rows in row_slices(new.shape, POLISHED):
        before = old[rows]
        slope = pull[rows].addmm_(new[rows] + before, hessian, beta=-2)
        total += float(slope.mul_(before.neg_().add_(new[rows])).sum())
    return total


def on_the_mask_(weight: Tensor, pull: SpilledMatrix, hessian: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Lowers the layer loss over weights that are zero outside mask, by conjugate gradients on all rows at once.

    weight (zero outside mask; changed in place and returned), pull = target @ hessian, mask `[N, K]`; hessian
    `[K, K]` positive definite, best with a constant diagonal. Each iteration lowers the loss of every row that is not
    at its minimum.
    """
    tiny = torch.finfo(weight.dtype).tiny
    for rows in row_slices(weight.shape, POLISHED):
        kept, part = mask[rows], weight[rows]
        residual = pull[rows].addmm_(part, hessian, alpha=-1).mul_(kept)
        direction, image, room = residual.clone(), torch.empty_like(residual), torch.empty_like(residual)
        square = torch.square(residual, out=room).sum(1, keepdim=True)
        for _ in range(iterations):
            torch.mm(direction, hessian, out=image).mul_(kept)
            step = square / torch.mul(direction, image, out=room).sum(1, keepdim=True).clamp_min(tiny)
            part.addcmul_(step, direction)
            residual.addcmul_(step, image, value=-1)
            fresh = torch.square(residual, out=room).sum(1, keepdim=True)
            direction.mul_(fresh / square.clamp_min(tiny)).add_(residual)
            square = fresh
    return weight


def admm_(
    weights: list[Tensor],
    hessian: Callable[[], Tensor],
    keeps: list[int],
    pattern: InWeight,
    *,
    scope: str = "layer",
    damping: float = 0.01,
    blocksize: int = 128,
    polish: int = 8,
    spill: str | os.PathLike[str] | None = None,
) -> list[Tensor]:
    """weights: `[N_i, K]` that read one input, of any floating dtype, pruned in place; hessian: gives the mean outer
    product of the inputs `[K, K]`, contiguous, in memory of its own; keeps: units of the pattern to keep in each.

    polish: conjugate-gradient iterations at the end. Returns the mask bool `[N_i, K]` of each. It starts from
    `sparsegpt_` and never returns a layer with more (damped) loss than that. All iterations work in the weights' own
    memory. Beside it there are the masks, one matrix `[K, K]` and slices of rows; float32 copies of weights of another
    dtype; and two more of the weights, in files where spill names a folder.
    """
    with ExitStack() as stack:
        layers = [
            _Layer(values, keep, pattern, scope, spill)
            for values, keep in zip([stack.enter_context(in_float32(w)) for w in weights], keeps)
        ]
        unit, scale = _unit(hessian, damping)
        for layer in layers:
            layer.aim(unit, scale)
        del unit
        upper = inverse_factor(hessian, damping)
        swept = {str(i): layer.sweep(upper, scale, blocksize) for i, layer in enumerate(layers)}
        bits = MaskSet(swept)
        del upper, swept
        release()
        rho = STAGES[0][0]
        unit, _ = _unit(hessian, damping)
        for layer in layers:
            layer.begin(unit, rho)
        done = 1
        del unit
        for stage, iterations in STAGES:
            inverse = _transpose_(_unit(hessian, damping)[0]).t()
            inverse.diagonal().add_(stage)
            if not factor_(inverse):
                raise ValueError(
                    "admm: the Hessian is not positive definite; raise damping or give more calibration data"
                )
            torch.cholesky_inverse(inverse, out=inverse)
            for layer in layers:
                layer.iterate(inverse, stage, rho / stage, iterations - done)
            rho, done = stage, 0
            del inverse  # before the next one is made
        release()
        unit, _ = _unit(hessian, damping)
        for i, layer in enumerate(layers):
            layer.finish(unit, scale, polish, bits[str(i)])
        return [layer.mask for layer in layers]


def _unit(hessian: Callable[[], Tensor], damping: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian of inputs scaled to unit second moment, and the scale `[K]`."""
    unit = damp_(hessian(), damping)
    scale = unit.diagonal().sqrt()
    return unit.div_(scale).div_(scale[:, None]), scale


def _transpose_(matrix: Tensor) -> Tensor:
    """A square matrix transposed in its own memory."""
    tiles = [slice(i, i + TILE) for i in range(0, matrix.shape[0], TILE)]
    for i, a in enumerate(tiles):
        for b in tiles[: i + 1]:
            lower = matrix[a, b].t().clone()
            matrix[a, b] = matrix[b, a].t().clone()
            matrix[b, a] = lower
    return matrix


class _Layer:
    """One layer's iterations in the memory of its weights `[N, K]`, in units of the scaled inputs from `sweep` to
    `finish`. pull `[N, K]`: the dense weights times the Hessian; start `[N, K]`: what SparseGPT made of them.
    """

    def __init__(
        self, values: Tensor, keep: int, pattern: InWeight, scope: str, spill: str | os.PathLike[str] | None
    ) -> None:
        self.values, self.keep, self.pattern, self.scope = values, keep, pattern, scope
        self.pull = SpilledMatrix(values.shape, values.device, spill)
        self.start = SpilledMatrix(values.shape, values.device, spill)
        self.slices = list(row_slices(values.shape, SLICE))
        self.mask = torch.empty(0)

    def aim(self, unit: Tensor, scale: Tensor) -> None:
        for rows in self.slices:
            self.pull[rows] = (self.values[rows] * scale) @ unit

    def sweep(self, upper: Tensor, scale: Tensor, blocksize: int) -> Tensor:
        """Leaves SparseGPT's weights, returns their mask."""
        mask = sweep_(self.values, upper, self.keep, self.pattern, scope=self.scope, blocksize=blocksize)
        self.values *= scale
        self.start[:] = self.values
        return mask

    def begin(self, unit: Tensor, rho: float) -> None:
        """V + U of the first iteration, whose V is start: U is chosen such that start is stationary.

        Between iterations values holds Z where mask is set and -U elsewhere: Z - U, which is all the next one needs.
        """
        for rows in self.slices:
            point = self.values[rows]
            self.values[rows] = self.pull[rows].addmm_(point, unit, alpha=-1).div_(rho).add_(point)
        self.project()
        self.reflect(-1.0)

    def iterate(self, inverse: Tensor, rho: float, change: float, iterations: int) -> None:
        """change: of the unit of U, which is 1 / rho."""
        self.reflect(change)
        for _ in range(iterations):
            for rows in self.slices:
                point = self.values[rows]
                room = self.pull[rows].add_(point, alpha=rho)
                point.masked_fill_(self.mask[rows], 0).addmm_(room, inverse, beta=-1)
            self.project()
            self.reflect(-1.0)

    def finish(self, unit: Tensor, scale: Tensor, polish: int, swept: Tensor) -> None:
        self.values.mul_(self.mask)
        on_the_mask_(self.values, self.pull, unit, self.mask, polish)
        if loss_change(self.values, self.start, self.pull, unit) > 0:
            for rows in self.slices:
                self.values[rows] = self.start[rows]
            self.mask = swept
        self.values /= scale
        self.pull.close()
        self.start.close()

    def reflect(self, factor: float) -> None:
        """Everything outside the mask times factor."""
        for rows in self.slices:
            point = self.values[rows]
            torch.where(self.mask[rows], point, point * factor, out=point)

    def project(self) -> None:
        """The mask that the projection keeps: the largest squares, summed over a block."""
        self.mask = torch.empty(0)
        values = self.values
        if isinstance(self.pattern, Element) and self.scope != "row":
            self.mask = ops.magnitude_mask(values, self.keep)
            return

        def scores(rows: slice) -> Tensor:
            return values[rows].square() if isinstance(self.pattern, Block) else values[rows].abs()

        self.mask = choose_sliced(scores, values, self.pattern, self.keep, self.scope)
