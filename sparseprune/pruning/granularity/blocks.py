"""Granularities inside one weight: single weights, blocks, and patterns of n of every m."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from torch import Tensor, nn

from ... import ops
from ..selectors import Selector
from ..units import Layers, UnitMap, block_sums, blown_up, blown_up_units, named_units
from .base import Granularity

__all__ = ["NM", "Block", "Element", "InWeight"]


class InWeight(Granularity):
    """Base of those whose units lie inside one weight: a method that prunes layer by layer can take them."""

    @property
    def blocksize(self) -> tuple[int, int]:
        """(r, c): the weights of one unit."""
        return 1, 1

    @property
    def width(self) -> int:
        """Columns that have to be decided together."""
        return self.blocksize[1]

    def count(self, shape: Sequence[int]) -> int:
        """Units of a weight of this shape: what a count of kept ones is a count of."""
        return shape[0] * shape[1] // math.prod(self.blocksize)

    def sums(self, scores: Tensor) -> Tensor:
        """scores: `[N, K]`, or a slice of whole units; returns `[N / r, K / c]` sums."""
        r, c = self.blocksize
        if r == c == 1:
            return scores
        rows, columns = scores.shape
        return scores.reshape(rows // r, r, columns // c, c).sum((1, 3))

    def spread(self, units: Tensor) -> Tensor:
        """units: bool `[N / r, K / c]`; returns bool `[N, K]`."""
        return units if self.blocksize == (1, 1) else blown_up(self.blocksize, units)


@dataclass(frozen=True)
class Element(InWeight):
    """Every weight by itself. ``Element().mask([[3, 1], [2, 0]], 2)`` keeps ``[[1, 0], [1, 0]]``."""

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps = []
        for fqn, linear in layers.items():
            shape = (linear.out_features, linear.in_features)
            maps.append(UnitMap(fqn, (fqn,), shape, 1, itemgetter(fqn), partial(named_units, fqn)))
        return maps, {}


@dataclass(frozen=True)
class Block(InWeight):
    """Blocks of r rows (outputs) by c columns (inputs). Counts are in whole blocks: ``B - round(sparsity * B)`` of B
    stay.

    ``Block(2, 1).mask([[3, 1], [2, 0]], 1)`` keeps ``[[1, 0], [1, 0]]``. ValueError on r or c that are no positive
    integers, and, when a model is pruned, where r does not divide N or c does not divide K of a weight `[N, K]`.
    """

    r: int
    c: int

    def __post_init__(self) -> None:
        for name, value in (("r", self.r), ("c", self.c)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Block: {name} expected a positive integer, got {value!r}")

    @property
    def blocksize(self) -> tuple[int, int]:
        return self.r, self.c

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps = []
        for fqn, linear in layers.items():
            rows, cols = linear.out_features, linear.in_features
            if rows % self.r or cols % self.c:
                raise ValueError(
                    f"Block({self.r}, {self.c}): must divide the weight [{rows}, {cols}] of {fqn!r}; choose divisors, "
                    "give this layer another granularity by its name, or leave it out with filter_fn"
                )
            shape = (rows // self.r, cols // self.c)
            size = self.blocksize
            reduce, expand = partial(block_sums, fqn, size), partial(blown_up_units, fqn, size)
            maps.append(UnitMap(fqn, (fqn,), shape, self.r * self.c, reduce, expand))
        return maps, {}


@dataclass(frozen=True)
class NM(InWeight):
    """n kept of every m along the inputs; the sparsity is ``1 - n / m``, whatever the scope.

    On the way there (a gradual run) the smallest n' of m that holds the density asked for is kept.
    ``NM(2, 4)`` on ``[[3, 1, 2, 0]]`` keeps ``[[1, 0, 1, 0]]``. ValueError unless 1 <= n <= m are integers, and, when a
    model is pruned, where m does not divide K of a weight `[N, K]` or another sparsity is asked for.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if (
            not all(isinstance(v, int) and not isinstance(v, bool) for v in (self.n, self.m))
            or not 1 <= self.n <= self.m
        ):
            raise ValueError(f"NM: expected integers 1 <= n <= m, n kept of every m, got n={self.n!r}, m={self.m!r}")

    @property
    def width(self) -> int:
        return self.m

    def at_density(self, density: float) -> NM:
        """The smallest n' of m that holds this density, and no less than n."""
        return NM(min(self.m, max(self.n, math.ceil(density * self.m - 1e-9))), self.m)

    @property
    def fixed_sparsity(self) -> float:  # type: ignore[override]
        return 1 - self.n / self.m

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        for fqn, linear in layers.items():
            if linear.in_features % self.m:
                raise ValueError(
                    f"NM({self.n}, {self.m}): m must divide in_features, got {linear.in_features} in {fqn!r}; give "
                    "this layer another granularity by its name, or leave it out with filter_fn"
                )
        return Element().unit_maps(model, layers)

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float | None = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        if densities is not None:
            raise ValueError(f"{self}: densities cannot change a pattern that is the same everywhere; leave them out")
        n = self.at_density(1 - sparsity).n
        return [ops.nm_mask(s.detach().contiguous(), n, self.m) for s in scores]

    def mask(self, scores: Tensor, k: int) -> Tensor:
        if k * self.m != scores.numel() * self.n:
            raise ValueError(f"NM({self.n}, {self.m}).mask: k is {scores.numel() * self.n // self.m} here, got {k}")
        return ops.nm_mask(scores.detach().contiguous(), self.n, self.m)
