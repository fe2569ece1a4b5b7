"""The criterion of second order: a Fisher matrix of the gradients, in blocks along each row of a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .criteria import Accumulating, PruneContext, register_criterion

__all__ = ["Fisher"]

_AT_ONCE = 1 << 14  # blocks that are inverted in one call


class Fisher(Accumulating):
    """w^2 / (2 [F^-1]_ww), by how much the loss rises where a weight goes and the others of its block make up for it
    (The Optimal BERT Surgeon, Kurtic et al. 2022; Hassibi and Stork 1993).

    F: the mean of g g^T over the steps, of ``block`` neighbours in a row of `[N, K]` at a time, with ``damp`` of the
    layer's mean diagonal added. window: steps of which it remembers the mean; refresh: steps after which it is inverted
    anew where scores are asked for, sooner among the first. A unit of several weights gets the sum of its weights'
    scores, and the survivors are left to training.

    Takes 4 * block bytes a weight, in memory and in checkpoints. Few gradients say little: ``prune_`` shows it one
    alone. ValueError on options outside of their ranges.
    """

    name = "fisher"
    tensors = ("fisher", "inverse", "steps")

    def __init__(self, block: int = 32, window: int = 256, refresh: int = 32, damp: float = 1.0) -> None:
        super().__init__()
        for option, value in (("block", block), ("window", window), ("refresh", refresh)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"fisher: {option} expected a whole number of at least 1, got {value!r}")
        if not 0 < damp < float("inf"):
            raise ValueError(f"fisher: damp expected a number above 0, got {damp!r}")
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
        found = {}
        for fqn, weight in context.weights.items():
            state = self.state[fqn]
            seen, at = state["steps"].tolist()
            if seen >= at + min(self.refresh, at):
                state["inverse"].copy_(self._inverse(state["fisher"], weight.shape[1]))
                state["steps"][1] = seen
            found[fqn] = weight.detach().float().square() / (2 * state["inverse"])
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for fqn, tensors in state.items():
            if "fisher" in tensors and tensors["fisher"].shape[2:] != (self.block, self.block):
                got = tensors["fisher"].shape[-1]
                raise ValueError(
                    f"fisher: state of {fqn} has blocks of {got}, expected {self.block}; make the criterion with "
                    f"block={got}"
                )
        super().load_state_dict(state)

    def _inverse(self, fisher: Tensor, columns: int) -> Tensor:
        """The diagonal of the damped blocks' inverses, `[N, columns]`."""
        mean = float(fisher.diagonal(dim1=2, dim2=3).sum()) / max(1, fisher.shape[0] * columns)
        extra = torch.eye(self.block, device=fisher.device) * (self.damp * mean if mean > 0 else 1.0)
        parts = fisher.view(-1, self.block, self.block).split(_AT_ONCE)
        diagonals = [torch.cholesky_inverse(torch.linalg.cholesky(p + extra)).diagonal(dim1=1, dim2=2) for p in parts]
        return torch.cat(diagonals).reshape(fisher.shape[:3]).flatten(1)[:, :columns]


register_criterion(Fisher.name, Fisher)
