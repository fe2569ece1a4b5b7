"""Wanda and SparseGPT as methods of the walk: statistics of one block in, pruned weights and masks out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .admm import admm
from .patterns import Pattern, choose
from .reconstruct import reconstruct
from .sparsegpt import sparsegpt
from .store import release
from .task import BlockTask, Task

__all__ = ["ADMMMethod", "SparseGPTMethod", "WandaMethod", "wanda_scores"]


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """weight `[N, K]`, squares `[K]` = mean x^2; returns |w| * ||x|| `[N, K]`, float32 (Sun et al., 2023, equation
    1).
    """
    return weight.detach().float().abs() * squares.sqrt()


@dataclass(frozen=True)
class WandaMethod:
    """|w| * ||x||, compared within each row (scope "row") or each layer; the kept weights stay as they are."""

    teacher: bool = False

    def prune(self, task: Task) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for group in task.statistics(hessian=False):
            for fqn in group.names:
                weight = task.linears[fqn].weight.data
                scores = wanda_scores(weight, group.squares.to(weight.device))
                masks[fqn] = choose(scores, task.patterns[fqn], task.keep[fqn], task.scope)
                weight.masked_fill_(~masks[fqn], 0)
        return masks


def by_pattern(task: Task, names: tuple[str, ...]) -> list[tuple[Pattern, list[str]]]:
    """The layers of one input, apart by pattern: those that are solved in one go."""
    kinds = dict.fromkeys(task.patterns[fqn] for fqn in names)
    return [(kind, [fqn for fqn in names if task.patterns[fqn] == kind]) for kind in kinds]


@dataclass(frozen=True)
class SparseGPTMethod:
    """SparseGPT on every group of layers that read the same input."""

    damping: float = 0.01
    blocksize: int = 128
    teacher: bool = False

    def solve(
        self, weights: list[Tensor], hessian: Tensor, keeps: list[int], pattern: Pattern, scope: str, last: bool
    ) -> list[tuple[Tensor, Tensor]]:
        """last: nothing needs hessian afterwards."""
        return sparsegpt(
            weights, hessian, keeps, pattern, scope=scope, damping=self.damping, blocksize=self.blocksize
        )

    def prune(self, task: Task) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        groups = task.statistics(hessian=True)
        release()
        groups.sort(key=lambda group: -group.squares.numel())  # the widest Hessian goes first, before most is in use
        for group in groups:
            kinds = by_pattern(task, group.names)
            for i, (pattern, names) in enumerate(kinds):
                assert group.hessian is not None
                weights = [task.linears[fqn].weight for fqn in names]
                keeps = [task.keep[fqn] for fqn in names]
                hessian = group.hessian.to(weights[0].device)
                solved = self.solve(weights, hessian, keeps, pattern, task.scope, i == len(kinds) - 1)
                for fqn, (weight, mask) in zip(names, solved):
                    task.linears[fqn].weight.data.copy_(weight)
                    masks[fqn] = mask
                del solved, weight, hessian
            group.hessian = None
            release()
        return masks


@dataclass(frozen=True)
class ADMMMethod(SparseGPTMethod):
    """ADMM from the SparseGPT solution of every group of layers, see `admm`; then each block trained to give its dense
    outputs for epochs over the data, see `reconstruct`.
    """

    polish: int = 8
    epochs: int = 0
    rate: float = 0.0

    def solve(
        self, weights: list[Tensor], hessian: Tensor, keeps: list[int], pattern: Pattern, scope: str, last: bool
    ) -> list[tuple[Tensor, Tensor]]:
        return admm(
            weights, hessian, keeps, pattern, scope=scope, damping=self.damping, blocksize=self.blocksize,
            polish=self.polish, overwrite=last,
        )  # fmt: skip

    def prune(self, task: Task) -> dict[str, Tensor]:
        masks = super().prune(task)
        if isinstance(task, BlockTask) and task.target is not None and self.epochs:
            reconstruct(task, masks, epochs=self.epochs, rate=self.rate)
            release()
        return masks
