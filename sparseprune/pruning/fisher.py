"""The criterion of second order: a Fisher matrix of the gradients, in blocks along each row of a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .criteria import Accumulating, PruneContext, register_criterion

__all__ = ["Fisher"]

_AT_ONCE = 1 << 14  # blocks that are inverted in one call
_LEAST = 1e-30  # a mean square of gradients below this, where float32 ends, is none


class Fisher(Accumulating):
    """w^2 / (2 [F^-1]_ww), by how much the loss rises where a weight goes and the others of its block make up for it
    (The Optimal BERT Surgeon, Kurtic et al. 2022; Hassibi and Stork 1993).

    F: the mean of g g^T over the steps, of ``block`` neighbours in a row of `[N, K]` at a time, with ``damp`` of the
    mean diagonal of all layers added. window: steps of which it remembers the mean; refresh: steps after which it is
    inverted anew where scores are asked for, sooner among the first. A unit of several weights gets the sum of its
    weights' scores, and the survivors are left to training.

    Takes 4 * block bytes a weight, in memory and until the masks are final in checkpoints; a trainer that can go back
    holds as much again. Few gradients say little: ``prune_`` shows it one alone. Weights whose gradients were not
    finite get NaN, which a pruner refuses by the layer's name. ValueError on options outside of their ranges.
    """

    name = "fisher"
    tensors = ("fisher", "inverse", "steps")

    def __init__(self, block: int = 32, window: int = 256, refresh: int = 32, damp: float = 1.0) -> None:
        super().__init__()
        for option, value in (("block", block), ("window", window), ("refresh", refresh)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"fisher: {option} expected a whole number of at least 1, got {value!r}")
        if not 1e-4 <= damp < float("inf"):
            raise ValueError(f"fisher: damp expected at least 1e-4, for F is held in float32, got {damp!r}")
        self.block, self.window, self.refresh, self.damp = block, window, refresh, damp

    def _zeros(self, like: Tensor) -> dict[str, Tensor]:
        rows, columns = like.shape
        blocks = -(-columns // self.block)
        return {
            "fisher": like.new_zeros(rows, blocks, self.block, self.block, dtype=torch.float32),
            "inverse": torch.zeros_like(like, dtype=torch.float32),
            "steps": torch.zeros(2, dtype=torch.int64),  # seen, and those at the last inversion
        }

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for fqn, gradient in gradients.items():
            state = self._of(fqn, weights[fqn])
            fisher = state["fisher"]
            state["steps"][0] += 1
            share = 1 / min(int(state["steps"][0]), self.window)
            padded = F.pad(gradient.float(), (0, fisher.shape[1] * self.block - gradient.shape[1]))
            parts = padded.reshape(-1, self.block, 1)
            fisher.view(-1, self.block, self.block).baddbmm_(parts, parts.mT, beta=1 - share, alpha=share)

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        self.check_seen(context)
        added = self._damping(context)
        found = {}
        for fqn, weight in context.weights.items():
            state = self.state[fqn]
            seen, at = state["steps"].tolist()
            if seen >= at + min(self.refresh, at):
                state["inverse"].copy_(self._inverse(state["fisher"], weight.shape[1], added))
                state["steps"][1] = seen
            found[fqn] = weight.detach().float().square() / (2 * state["inverse"])
        return found

    def _damping(self, context: PruneContext) -> float:
        """What is added to all diagonals: one number, so that layers compare, those that no gradient reaches too."""
        diagonals = [self.state[fqn]["fisher"].diagonal(dim1=2, dim2=3) for fqn in context.weights]
        sums = torch.stack([d.sum(dtype=torch.float64) for d in diagonals])  # NaN where a gradient was
        count = sum(weight.numel() for weight in context.weights.values())
        told = torch.stack([sums.nansum(), torch.full_like(sums[0], count)])
        context.sum_(told)
        total, weights = told.tolist()
        return self.damp * total / weights if math.isfinite(total) and total > _LEAST * weights else 1.0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for fqn, tensors in state.items():
            if "fisher" in tensors and tensors["fisher"].shape[2:] != (self.block, self.block):
                got = tensors["fisher"].shape[-1]
                raise ValueError(
                    f"fisher: state of {fqn} has blocks of {got}, expected {self.block}; make the criterion with "
                    f"block={got}"
                )
        super().load_state_dict(state)

    def _inverse(self, fisher: Tensor, columns: int, added: float) -> Tensor:
        """The diagonal of the damped blocks' inverses, `[N, columns]`; NaN where a block is not finite."""
        extra = torch.eye(self.block, device=fisher.device, dtype=torch.float64) * added
        diagonals = []
        for part in fisher.view(-1, self.block, self.block).split(_AT_ONCE):
            factor, failed = torch.linalg.cholesky_ex(part.double() + extra)
            inverse = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2)
            failed = (failed != 0) | ~part.isfinite().flatten(1).all(1)
            diagonals.append(inverse.masked_fill(failed[:, None], torch.nan).float())
        return torch.cat(diagonals).reshape(fisher.shape[:3]).flatten(1)[:, :columns]


register_criterion(Fisher.name, Fisher)
