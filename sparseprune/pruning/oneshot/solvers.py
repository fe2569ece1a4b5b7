"""Wanda and SparseGPT as solvers for the driver: statistics of one block in, pruned weights and masks out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..granularity import InWeight
from ..masks import MaskSet
from .admm import admm_
from .choosing import choose_sliced
from .reconstruct import reconstruct
from .sparsegpt import sparsegpt_
from .store import SpilledMatrix, release
from .task import BlockTask, Task

__all__ = ["ADMMSolver", "SparseGPTSolver", "WandaSolver", "wanda_scores"]


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """weight `[N, K]`, squares `[K]` = mean x^2; returns |w| * ||x|| `[N, K]`, float32 (Sun et al., 2023, equation
    1).
    """
    return weight.detach().float().abs() * squares.sqrt()


@dataclass(frozen=True)
class WandaSolver:
    """|w| * ||x||, compared within each row (scope "row") or each layer; the kept weights stay as they are."""

    needs_hessian: ClassVar[bool] = False
    teacher: bool = False

    def prune(self, task: Task) -> MaskSet:
        masks: list[MaskSet] = []
        for group in task.statistics(hessian=self.needs_hessian):
            for fqn in group.names:
                weight = task.linears[fqn].weight.data
                squares = group.squares.to(weight.device)

                def scores(rows: slice, weight: Tensor = weight, squares: Tensor = squares) -> Tensor:
                    return wanda_scores(weight[rows], squares)

                mask = choose_sliced(scores, weight, task.patterns[fqn], task.keep[fqn], task.scope)
                weight.masked_fill_(~mask, 0)
                masks.append(MaskSet({fqn: mask}))
        return MaskSet.joined(masks)


def by_pattern(task: Task, names: tuple[str, ...]) -> list[tuple[InWeight, list[str]]]:
    """The layers of one input, apart by pattern: those that are solved in one go."""
    kinds = dict.fromkeys(task.patterns[fqn] for fqn in names)
    return [(kind, [fqn for fqn in names if task.patterns[fqn] == kind]) for kind in kinds]


@dataclass(frozen=True)
class SparseGPTSolver:
    """SparseGPT on every group of layers that read the same input."""

    needs_hessian: ClassVar[bool] = True
    damping: float = 0.01
    blocksize: int = 128
    teacher: bool = False

    def solve_(
        self, weights: list[Tensor], hessian: Callable[[], Tensor], keeps: list[int], pattern: InWeight, task: Task
    ) -> Iterable[Tensor]:
        """weights `[N_i, K]` are pruned in place; hessian: gives a copy of it `[K, K]`. Returns their masks."""
        return sparsegpt_(
            weights, hessian, keeps, pattern, scope=task.scope, damping=self.damping, blocksize=self.blocksize
        )

    def prune(self, task: Task) -> MaskSet:
        masks: list[MaskSet] = []
        groups = task.statistics(hessian=self.needs_hessian)
        release()
        for group in sorted(groups, key=lambda group: -group.squares.numel()):  # the widest before libraries hold most
            assert group.hessian is not None
            matrix = group.hessian
            for pattern, names in by_pattern(task, group.names):
                weights = [task.linears[fqn].weight.data for fqn in names]
                device = weights[0].device

                def hessian(matrix: SpilledMatrix = matrix, device: torch.device = device) -> Tensor:
                    return matrix[:].to(device)

                solved = self.solve_(weights, hessian, [task.keep[fqn] for fqn in names], pattern, task)
                masks += [MaskSet({fqn: mask}) for fqn, mask in zip(names, solved)]
                del solved
            matrix.close()
            release()
        return MaskSet.joined(masks)


@dataclass(frozen=True)
class ADMMSolver(SparseGPTSolver):
    """ADMM from the SparseGPT solution of every group of layers, see `admm_`; then each block trained to give its dense
    outputs for epochs over the data, see `reconstruct`.
    """

    polish: int = 8
    epochs: int = 0
    rate: float = 0.0

    def solve_(
        self, weights: list[Tensor], hessian: Callable[[], Tensor], keeps: list[int], pattern: InWeight, task: Task
    ) -> Iterable[Tensor]:
        return admm_(
            weights, hessian, keeps, pattern, scope=task.scope, damping=self.damping, blocksize=self.blocksize,
            polish=self.polish, spill=task.spill,
        )  # fmt: skip

    def prune(self, task: Task) -> MaskSet:
        masks = super().prune(task)
        if isinstance(task, BlockTask) and task.target is not None and self.epochs:
            reconstruct(task, masks, epochs=self.epochs, rate=self.rate)
            release()
        return masks
