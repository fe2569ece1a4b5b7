"""A granularity of two stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..selectors import Selector, topk_units
from ..units import Layers, UnitMap, combine
from .base import Granularity
from .blocks import Block, Element
from .heads import Heads, Neurons

__all__ = ["Mixture", "shown"]


@dataclass(frozen=True)
class Mixture(Granularity):
    """Two stages: ``first`` (heads, neurons or blocks) keeps ``first_density``, then ``then`` (elements or blocks)
    keeps, of what is left, as many as make the total exact. first_density: default sqrt(density), the article's
    per-axis reading. ValueError on other stages, and on a first one with ``trim_rescale``: its factor is of one stage.
    """

    first: Granularity
    then: Granularity = field(default_factory=Element)
    first_density: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.first, (Heads, Neurons, Block)) or not isinstance(self.then, (Element, Block)):
            raise ValueError(
                "Mixture: expected Heads, Neurons or Block first and Element or Block then, "
                f"got {self.first!r}, {self.then!r}"
            )
        if getattr(self.first, "trim_rescale", False):
            raise ValueError(
                f"Mixture: first expected without trim_rescale, got {self.first!r}; leave it out, or use "
                f"{type(self.first).__name__}(trim_rescale=True) by itself"
            )
        if self.first_density is not None and not 0 < self.first_density <= 1:
            raise ValueError(f"Mixture: first_density expected in (0, 1], got {self.first_density!r}")

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        first, reasons = self.first.unit_maps(model, layers)
        if not first:
            raise ValueError(f"Mixture: {type(self.first).__name__} finds nothing here: {shown(reasons)}")
        then = [replace(m, key=f"{m.key}:then", stage=1) for m in self.then.unit_maps(model, layers)[0]]
        return first + then, {}

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float | None = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        count = sum(m.stage == 0 for m in maps)
        first, then = maps[:count], maps[count:]
        density = 1 - sparsity
        share = max(density, self.first_density if self.first_density is not None else math.sqrt(density))
        kept = self.first.choose(first, scores[:count], 1 - share, scope, None, selector, floor)
        alive = combine(first, kept)
        masked = []
        for m, s in zip(then, scores[count:]):
            live = {fqn: alive[fqn].to(s.dtype) for fqn in m.layers if fqn in alive}
            masked.append(s.masked_fill(m.reduce(live) <= 0, -math.inf) if live else s)
        chosen = topk_units(then, masked, sparsity, scope, densities, selector, floor)
        for m, s, c in zip(then, masked, chosen):
            if bool((c & (s == -math.inf)).any()):
                raise ValueError(
                    f"Mixture: the first stage leaves fewer units of {m.key} than are to stay; raise first_density or "
                    "use scope='global'"
                )
        return kept + chosen


def shown(reasons: Mapping[str, str]) -> str:
    listed = [f"{fqn}: {why}" for fqn, why in list(reasons.items())[:10]]
    return "; ".join(listed) or "the model has no Linears of that kind"
