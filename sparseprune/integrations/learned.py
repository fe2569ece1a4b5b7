"""Learned scores as a criterion, for training loops that are not ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..pruning.criteria import Criterion, PruneContext

__all__ = ["LearnedScores"]


class LearnedScores(Criterion):
    """A score for every weight, trained beside the weights by the straight-through gradient dL/ds = dL/dW' * W (W' the
    masked weight) with Adam: what :class:`sparseprune.DistillPruner` does with ``method="scores"``, here through the
    gradients that a :class:`sparseprune.Pruner` is shown. Scores begin as the ranks of \\|W\\| within each layer, in
    [0, 1]; a unit of several weights has the scores of its weights together.

    lr, betas: of Adam. Takes 12 bytes a weight. Choose masks often (``PruneConfig(every=1)`` or a few steps).
    """

    name = "learned"
    needs_gradients = True

    def __init__(self, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        if not lr > 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"learned: expected lr > 0 and betas in [0, 1), got {lr!r} and {betas!r}")
        self.lr, self.betas, self.eps = lr, betas, eps
        self.state: dict[str, dict[str, Tensor]] = {}
        self.steps = 0

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        return {fqn: self._of(fqn, weight)["score"] for fqn, weight in context.weights.items()}

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        self.steps += 1
        first, second = self.betas
        step, spread = self.lr / (1 - first**self.steps), (1 - second**self.steps) ** 0.5
        for fqn, gradient in gradients.items():
            weight = weights[fqn].detach().float()
            held = self._of(fqn, weight)
            slope = gradient.float() * weight
            held["mean"].lerp_(slope, 1 - first)
            held["square"].mul_(second).addcmul_(slope, slope, value=1 - second)
            held["score"].addcdiv_(held["mean"], held["square"].sqrt().div_(spread).add_(self.eps), value=-step)

    def _of(self, fqn: str, weight: Tensor) -> dict[str, Tensor]:
        if fqn not in self.state:
            size = weight.detach().float().abs().flatten()
            ranks = torch.empty_like(size)
            ranks[size.argsort(stable=True)] = torch.linspace(0, 1, len(size), device=size.device)
            zero = torch.zeros_like(weight, dtype=torch.float32)
            self.state[fqn] = {"score": ranks.view(weight.shape), "mean": zero, "square": zero.clone()}
        return self.state[fqn]

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "layers": {f: {k: t.clone() for k, t in s.items()} for f, s in self.state.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"steps", "layers"}:
            raise ValueError(f"learned: expected the state ['layers', 'steps'], got {sorted(state)}")
        self.steps = int(state["steps"])
        self.state = {f: {k: t.clone() for k, t in s.items()} for f, s in state["layers"].items()}
