"""One block at a time: its Linears, what enters it, and how to run it. Criteria work on these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..granularity import InWeight
from ..positions import Positions, decoder_of
from .repeated import Capture, run_block
from .statistics import InputStatistics, collect
from .store import ChunkStore, release

__all__ = ["BlockTask", "LooseTask", "Task"]


@dataclass
class Task:
    """name: the block's fqn; linears: what to prune in it, by fqn; keep: how many units of its pattern stay, by fqn;
    spill: the folder for what a solver need not hold in memory, None: there.
    """

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    keep: dict[str, int]
    patterns: dict[str, InWeight]
    scope: str
    spill: Path | None = field(default=None, kw_only=True)

    def runs(self) -> Iterator[tuple[Callable[[], Any], Positions]]:
        raise NotImplementedError

    def statistics(self, *, hessian: bool) -> list[InputStatistics]:
        with torch.no_grad():
            return collect(self.runs(), self.linears, hessian=hessian, spill=self.spill)


@dataclass
class BlockTask(Task):
    """A block of a stack. student: hidden states of the pruned model entering it; target, where the solver wants it:
    those of the dense model leaving it.
    """

    index: int
    capture: Capture
    student: ChunkStore
    target: ChunkStore | None = None

    def run(self, hidden: Tensor, chunk: int) -> Tensor:
        return run_block(self.module, hidden, self.capture.call(chunk), self.index)

    def runs(self) -> Iterator[tuple[Callable[[], Any], Positions]]:
        for i in range(len(self.student)):
            yield partial(self.run, self.student[i], i), self.capture.positions[i]

    def advance(self, store: ChunkStore) -> None:
        """Every chunk of store through the block as it is now."""
        with torch.no_grad():
            for i in range(len(store)):
                store[i] = self.run(store[i], i).detach()
        release()


@dataclass
class LooseTask(Task):
    """Linears outside any stack, or of a model without one: the whole model runs, and all of them are judged
    together.
    """

    batches: list[Any]

    def runs(self) -> Iterator[tuple[Callable[[], Any], Positions]]:
        decoder = decoder_of(self.module)
        for batch in self.batches:
            yield partial(batch.call, self.module), Positions.of(batch, decoder)
