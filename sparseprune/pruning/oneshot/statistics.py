"""What a criterion needs to know of a layer's inputs, summed chunk by chunk in float32."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..positions import Positions
from ..reading import reading
from .repeated import Stopped
from .store import SpilledMatrix

__all__ = ["InputStatistics", "collect"]


@dataclass
class InputStatistics:
    """Of the Linears `names`, which all read the same input `[..., K]`: count positions, squares `[K]` = sum of x^2
    or, when asked for, hessian `[K, K]` = sum of x x^T, of which squares is then the diagonal. Everything float32 and
    divided by count once complete.
    """

    names: tuple[str, ...]
    count: int
    squares: Tensor
    hessian: SpilledMatrix | None


class _Collector:
    def __init__(self, linears: Mapping[str, nn.Linear], hessian: bool, spill: str | os.PathLike[str] | None) -> None:
        self.linears = dict(linears)
        self.hessian = hessian
        self.spill = spill
        self.groups: dict[str, InputStatistics] = {}
        self.leader: dict[str, str] = {}
        self.positions = Positions(None)
        self._last: tuple[str, Tensor] | None = None
        self._order: list[str] = []
        self._final: str | None = None

    def start(self, positions: Positions) -> None:
        self.positions = positions
        self._last = None
        self._order = []

    def finish(self) -> None:
        """Where every Linear is reached once, later passes may end at the last of them: its output is not needed."""
        self._final = self._order[-1] if sorted(self._order) == sorted(self.linears) else None
        self._last = None

    def see(self, name: str, x: Tensor) -> None:
        self._order.append(name)
        if self._last is not None and self._last[1] is x and self.leader.get(name, self._last[0]) == self._last[0]:
            if name not in self.leader:
                self.leader[name] = self._last[0]
                group = self.groups[self._last[0]]
                group.names = (*group.names, name)
        else:
            if self.leader.setdefault(name, name) != name:
                raise RuntimeError(
                    f"one-shot pruning: {name} read the same input as {self.leader[name]} in the first chunk but "
                    "not in a later one; give all the data as one batch, or leave the layer out"
                )
            self.add(name, x)
            self._last = (name, x)
        if name == self._final and len(self._order) == len(self.linears):
            raise Stopped

    def add(self, name: str, x: Tensor) -> None:
        k = x.shape[-1]
        x = self.positions.rows(name, x.detach()).float()
        group = self.groups.get(name)
        if group is None:
            hessian = SpilledMatrix.of(torch.zeros(k, k, device=x.device), self.spill) if self.hessian else None
            group = self.groups[name] = InputStatistics((name,), 0, torch.zeros(k, device=x.device), hessian)
        group.count += x.shape[0]
        if group.hessian is not None:
            group.hessian.opened().addmm_(x.T, x)
        else:
            group.squares += x.square().sum(0)


def collect(
    runs: Iterable[tuple[Callable[[], Any], Positions]],
    linears: Mapping[str, nn.Linear],
    *,
    hessian: bool,
    spill: str | os.PathLike[str] | None = None,
) -> list[InputStatistics]:
    """runs: one (forward pass, positions) a chunk; spill: a folder where the Hessians wait, each of them in memory only
    while a chunk is added. Returns the statistics in the order in which the Linears are reached.

    Raises ValueError naming the layer on NaN or infinite inputs, and on a Linear that the data never reach.
    """
    collector = _Collector(linears, hessian, spill)
    with reading(linears, collector.see):
        for forward, positions in runs:
            collector.start(positions)
            with contextlib.suppress(Stopped):
                forward()
            collector.finish()
    missing = [name for name in linears if name not in collector.leader]
    if missing:
        raise ValueError(
            f"calibration: the data never reach {', '.join(missing)}; give data that use them or leave them out "
            "with filter_fn"
        )
    for group in collector.groups.values():
        if group.hessian is not None:
            matrix = group.hessian.opened()
            matrix /= max(1, group.count)
            group.squares = matrix.diagonal().clone()
            del matrix
        else:
            group.squares /= max(1, group.count)
        if not bool(torch.isfinite(group.squares).all()):
            raise ValueError(
                f"calibration: the inputs of {group.names[0]} are NaN or infinite; check the data and the dtype "
                "(float16 overflows where bfloat16 and float32 do not)"
            )
    return list(collector.groups.values())
