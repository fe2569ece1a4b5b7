"""A plan: how a model's weights are cut up into units, and the choice over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .counts import kept_count, match_patterns
from .granularity import Granularity, make_granularity
from .granularity.mixture import shown
from .selectors import Selector
from .units import Layers, UnitMap, combine

__all__ = ["Part", "Plan"]


@dataclass(frozen=True)
class Part:
    """The layers that one granularity takes care of, and their units."""

    granularity: Granularity
    maps: tuple[UnitMap, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(fqn for m in self.maps for fqn in m.layers))


@dataclass(frozen=True)
class Plan:
    """How a model's weights are cut up: made by :meth:`build`, used as often as wanted.

    ``layers``: the fqns covered; ``skipped``: fqn -> why not; ``parts``: one a granularity.
    """

    parts: tuple[Part, ...]
    skipped: dict[str, str]
    scope: str
    densities: dict[str, float] | None
    floor: float | None = 0.0

    @classmethod
    def build(
        cls, model: nn.Module, layers: Layers,
        granularity: str | Granularity | Mapping[str, str | Granularity] = "element", scope: str = "global",
        densities: Mapping[str, float] | None = None, floor: float | None = 0.0,
    ) -> Plan:  # fmt: skip
        """layers: fqn -> Linear. granularity: one for all, or name pattern (``fnmatch``) -> granularity, first match
        wins; layers that no pattern fits stay dense. scope: ``"global"`` compares the units of all layers of a part,
        ``"layer"`` keeps the same share of each. densities: name pattern -> relative density, see ``weighted_counts``.
        floor: the least density of a layer under ``"global"``, as a share of the density of all, in [0, 1] (counts
        rounded down, the total exact; of heads and neurons, of each block; N:M keeps its pattern everywhere). None:
        :data:`~sparseprune.pruning.selectors.DEFAULT_FLOOR` where a floor applies, and one unit of every layer, as far
        as the units go round.

        Raises ValueError on an unknown granularity, scope or pattern, on shapes that do not divide, and where no
        layer is left.
        """
        if scope not in ("global", "layer"):
            raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
        if isinstance(floor, bool) or (floor is not None and not (isinstance(floor, int | float) and 0 <= floor <= 1)):
            raise ValueError(f"floor: expected a share in [0, 1] or None, got {floor!r}")
        if floor and (scope != "global" or densities is not None):
            raise ValueError("floor: expected scope='global' and no densities, which fix every layer's count")
        skipped: dict[str, str] = {}
        if isinstance(granularity, Mapping):
            made = {pattern: make_granularity(spec) for pattern, spec in granularity.items()}
            matched = match_patterns(made, list(layers), "granularity")
            skipped.update({fqn: "no granularity pattern fits its name" for fqn in layers if fqn not in matched})
            kinds = list(dict.fromkeys(made.values()))
        else:
            kinds = [make_granularity(granularity)]
            matched = dict.fromkeys(layers, kinds[0])
        parts = []
        for kind in kinds:
            maps, reasons = kind.unit_maps(model, {fqn: layers[fqn] for fqn in layers if matched.get(fqn) == kind})
            skipped.update(reasons)
            if maps:
                parts.append(Part(kind, tuple(maps)))
        keys = [m.key for part in parts for m in part.maps]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"granularity: expected keys that are unique in a plan, got {twice!r} twice")
        if not parts:
            raise ValueError(f"granularity: {granularity!r} covers none of the layers: {shown(skipped)}")
        relative = None
        if densities is not None:
            covered = [fqn for part in parts for fqn in part.layers]
            relative = match_patterns(densities, covered, "densities")
            missing = [fqn for fqn in covered if fqn not in relative]
            if missing:
                raise ValueError(f"densities: no pattern fits {', '.join(missing[:10])}; add '*' as the last pattern")
            _check_shared(parts, relative)
        return cls(tuple(parts), skipped, scope, relative, None if floor is None else float(floor))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(fqn for part in self.parts for fqn in part.layers))

    @property
    def unit_maps(self) -> tuple[UnitMap, ...]:
        return tuple(m for part in self.parts for m in part.maps)

    def check_sparsity(self, sparsity: float | None) -> float:
        """The sparsity to use: as given, or the one that N:M fixes. ValueError where they differ or none is given."""
        for part in self.parts:
            fixed = part.granularity.fixed_sparsity
            if fixed is None:
                continue
            if sparsity is not None and not math.isclose(sparsity, fixed, abs_tol=1e-9):
                raise ValueError(
                    f"{part.granularity!r} fixes the sparsity at {fixed:g}, got {sparsity!r}; leave it out"
                )
            sparsity = fixed
        if sparsity is None:
            raise ValueError("sparsity expected in [0, 1], the share of the weights set to zero, got None")
        kept_count(0, sparsity)
        return float(sparsity)

    def masks(
        self, scores: Mapping[str, Tensor], sparsity: float, selector: Selector | None = None
    ) -> dict[str, Tensor]:
        """scores: fqn -> `[N, K]`, no NaN; returns fqn -> bool `[N, K]`, True = kept, exact in count."""
        for fqn in self.layers:
            if fqn not in scores:
                raise ValueError(f"Plan.masks: scores of {fqn!r} are missing")
        chosen: dict[str, Tensor] = {}
        for part in self.parts:
            chosen |= self._part(part, [m.reduce(scores) for m in part.maps], sparsity, selector)
        return {fqn: chosen[fqn] for fqn in self.layers}

    def unit_masks(
        self, unit_scores: Mapping[str, Tensor], sparsity: float, selector: Selector | None = None
    ) -> dict[str, Tensor]:
        """unit_scores: key of each of ``unit_maps`` -> scores of its shape; returns fqn -> bool `[N, K]`."""
        chosen: dict[str, Tensor] = {}
        for part in self.parts:
            chosen |= self._part(part, [unit_scores[m.key] for m in part.maps], sparsity, selector)
        return {fqn: chosen[fqn] for fqn in self.layers}

    def _part(self, part: Part, scores: list[Tensor], sparsity: float, selector: Selector | None) -> dict[str, Tensor]:
        for m, s in zip(part.maps, scores):
            if tuple(s.shape) != m.shape:
                raise ValueError(f"Plan: scores of {m.key} expected shape {list(m.shape)}, got {list(s.shape)}")
            if bool(s.sum().isnan()) and bool(s.isnan().any()):  # one pass, but for infinities of both signs
                raise ValueError(f"Plan: scores of {m.key} hold NaN, which has no rank; check the weights and the data")
        kept = part.granularity.choose(
            part.maps, scores, sparsity, self.scope, self.densities, selector or Selector(), self.floor
        )
        return combine(part.maps, kept)


def _check_shared(parts: Sequence[Part], densities: Mapping[str, float]) -> None:
    """ValueError where layers that go by the same units (heads, neurons) were given unlike densities. The first stage
    of a mixture has a density of its own.
    """
    for m in (m for part in parts if not any(m.stage for m in part.maps) for m in part.maps):
        first = m.layers[0]
        for fqn in m.layers:
            if densities[fqn] != densities[first]:
                raise ValueError(
                    f"densities: {first!r} and {fqn!r} share the units of {m.key!r}, expected one density for both, "
                    f"got {densities[first]:g} and {densities[fqn]:g}; use patterns that fit all layers of a block"
                )
