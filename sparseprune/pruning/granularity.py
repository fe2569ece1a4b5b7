"""Granularity: what is kept or dropped together. Scores become unit scores, an exact top-k chooses units, units
become masks.

A *unit* is one weight, one block, one attention head or one feed-forward neuron. A :class:`UnitMap` knows the units
of one weight, or of one group of weights that share them; a :class:`Plan` holds the maps of a model and chooses over
all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._config import Config
from .allocation import kept_count, match_patterns, weighted_counts
from .factors import Factors
from .structures import Share, attention_blocks, feed_forwards, head_groups

__all__ = [
    "NM",
    "Block",
    "DistributedSelector",
    "Element",
    "Granularity",
    "Heads",
    "Mixture",
    "Neurons",
    "Part",
    "Plan",
    "Selector",
    "UnitMap",
    "make_granularity",
]

Layers = Mapping[str, nn.Linear]


class Selector:
    """Exact top-k on one process. :class:`DistributedSelector` does the same over several."""

    def total(self, units: int) -> int:
        """The number of units over all processes."""
        return units

    def topk(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        """scores: `[...]` each; returns bool masks with k True in all, ties to the lower index."""
        device = scores[0].device
        wide = [s if s.dtype == scores[0].dtype else s.float() for s in scores]
        if any(s.dtype != wide[0].dtype for s in wide):
            wide = [s.float() for s in scores]
        masks = ops.topk_mask([s.detach().to(device).contiguous() for s in wide], k)
        return [mask.to(s.device) for mask, s in zip(masks, scores)]


class DistributedSelector(Selector):
    """Exact top-k over tensors that are spread over the processes of ``group``: only histograms are exchanged.

    Every process calls with the same number of tensors and the same k, counted over all of them. Ties go to the lower
    rank, then to the lower index.
    """

    def __init__(self, group: Any = None) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("DistributedSelector: torch.distributed is not initialised; call init_process_group first")
        self.group = group

    def _reduce(self, counts: Tensor) -> None:
        torch.distributed.all_reduce(counts, group=self.group)

    def total(self, units: int) -> int:
        count = torch.tensor([units], dtype=torch.int64)
        self._reduce(count)
        return int(count)

    def topk(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        if k == 0:
            return [torch.zeros(s.shape, dtype=torch.bool, device=s.device) for s in scores]
        listed = [s.detach().float().contiguous() for s in scores]
        select = ops.RadixSelect(k, dtype=torch.float32)
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        return select.run(listed, self._reduce, rank, size)


@dataclass(frozen=True)
class UnitMap:
    """The units of one or several weights. ``key`` names them; unit scores have ``shape``; ``weights_per_unit`` weights
    each.

    ``layers``: the fqns of the weights. ``key``: the fqn for elements and blocks, ``NAME:heads`` and
    ``NAME:neurons`` with the block's name, unique in a plan. ``axis``: True for the other axis of a matrix that is
    cut along both. ``stage``: 1 for the second stage of a mixture.
    """

    key: str
    layers: tuple[str, ...]
    shape: tuple[int, ...]
    weights_per_unit: int
    reduce_fn: Callable[[Mapping[str, Tensor]], Tensor] = field(repr=False)
    expand_fn: Callable[[Tensor], dict[str, Tensor]] = field(repr=False)
    axis: bool = False
    stage: int = 0

    @property
    def units(self) -> int:
        return math.prod(self.shape)

    def reduce(self, scores: Mapping[str, Tensor]) -> Tensor:
        """scores: fqn -> `[N, K]`; returns the sum over each unit, of ``shape``."""
        return self.reduce_fn(scores)

    def expand(self, units: Tensor) -> dict[str, Tensor]:
        """units: bool of ``shape``, True = kept; returns fqn -> bool `[N, K]`."""
        return self.expand_fn(units)


class Granularity(Config):
    """Base of the granularities. ``unit_maps`` finds the units of a model, ``choose`` picks those that stay."""

    #: The one sparsity that this granularity can give, or None.
    fixed_sparsity: float | None = None

    def __str__(self) -> str:
        own = [(f.name, f.default, getattr(self, f.name)) for f in fields(self)]  # type: ignore[arg-type]
        shown = [f"{name}={value!s}" for name, default, value in own if value != default]
        return f"{type(self).__name__}({', '.join(shown)})"

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        """The maps over these layers (fqn -> Linear), and fqn -> reason for those it does not cover."""
        raise NotImplementedError(f"{type(self).__name__} must define unit_maps(model, layers)")

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        """scores: one tensor a map, of its shape; returns bool tensors, True = kept, exact in count."""
        return _topk_units(maps, scores, sparsity, scope, densities, selector, floor)

    def mask(self, scores: Tensor, k: int) -> Tensor:
        """scores: `[N, K]` of one weight; returns its bool mask with exactly k whole units kept."""
        layer = nn.Linear(scores.shape[1], scores.shape[0], bias=False, device="meta")
        maps, reasons = self.unit_maps(layer, {"": layer})
        if not maps:
            raise ValueError(f"{type(self).__name__}.mask: {reasons.get('', 'needs a whole model, see Plan')}")
        if not 0 <= k <= maps[0].units:
            raise ValueError(f"{type(self).__name__}.mask: k expected in [0, {maps[0].units}], the units, got {k}")
        (units,) = Selector().topk([maps[0].reduce({"": scores})], k)
        return maps[0].expand(units)[""]


def _topk_units(
    maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
    densities: Mapping[str, float] | None, selector: Selector, floor: float = 0.0,
) -> list[Tensor]:  # fmt: skip
    units = [selector.total(m.units) for m in maps]
    if densities is not None:
        counts = weighted_counts(units, sparsity, [densities[m.layers[0]] for m in maps])
    elif scope == "layer":
        counts = [kept_count(n, sparsity) for n in units]
    else:
        return _topk_above(scores, units, kept_count(sum(units), sparsity), selector, floor)
    return [selector.topk([s], k)[0] for s, k in zip(scores, counts)]


def _topk_above(
    scores: Sequence[Tensor], units: Sequence[int], k: int, selector: Selector, floor: float
) -> list[Tensor]:
    """The k highest of all, but of each tensor at least ``floor * k / sum(units)`` of its own units, rounded down.

    A tensor that falls short is held at its least and leaves the competition, which starts anew for the rest: their
    threshold rises, so that none that was short would come back.
    """
    kept = selector.topk(scores, k)
    if floor == 0:
        return kept
    least = [math.floor(floor * k * n / max(1, sum(units))) for n in units]
    for i, s in enumerate(scores):  # what an earlier stage has taken away cannot be kept
        least[i] = min(least[i], selector.total(int((s > -math.inf).sum())))
    held: set[int] = set()
    while True:
        short = [i for i in range(len(scores)) if i not in held and selector.total(int(kept[i].sum())) < least[i]]
        if not short:
            return kept
        held.update(short)
        for i in short:
            kept[i] = selector.topk([scores[i]], least[i])[0]
        free = [i for i in range(len(scores)) if i not in held]
        chosen = selector.topk([scores[i] for i in free], k - sum(least[i] for i in held))
        for i, mask in zip(free, chosen):
            kept[i] = mask


@dataclass(frozen=True)
class Element(Granularity):
    """Every weight by itself. ``Element().mask([[3, 1], [2, 0]], 2)`` keeps ``[[1, 0], [1, 0]]``."""

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps = []
        for fqn, linear in layers.items():
            shape = (linear.out_features, linear.in_features)
            maps.append(UnitMap(fqn, (fqn,), shape, 1, itemgetter(fqn), partial(_named, fqn)))
        return maps, {}


@dataclass(frozen=True)
class Block(Granularity):
    """Blocks of r rows (outputs) by c columns (inputs). Counts are in whole blocks: ``B - round(sparsity * B)`` of B
    stay.

    r and c must divide the weight `[N, K]`. ``Block(2, 1).mask([[3, 1], [2, 0]], 1)`` keeps ``[[1, 0], [1, 0]]``.
    """

    r: int
    c: int

    def __post_init__(self) -> None:
        for name, value in (("r", self.r), ("c", self.c)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"Block: {name} expected a positive integer, got {value!r}")

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
            size = (self.r, self.c)
            maps.append(
                UnitMap(
                    fqn, (fqn,), shape, self.r * self.c, partial(_block_sums, fqn, size), partial(_blown_up, fqn, size)
                )
            )
        return maps, {}


@dataclass(frozen=True)
class NM(Granularity):
    """n kept of every m along the inputs; the sparsity is ``1 - n / m``, whatever the scope. m must divide K of `[N,
    K]`.

    On the way there (a gradual run) the smallest n' of m that holds the density asked for is kept.
    ``NM(2, 4)`` on ``[[3, 1, 2, 0]]`` keeps ``[[1, 0, 1, 0]]``.
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
        densities: Mapping[str, float] | None, selector: Selector, floor: float = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        if densities is not None:
            raise ValueError(f"{self}: densities cannot change a pattern that is the same everywhere; leave them out")
        n = min(self.m, max(self.n, math.ceil((1 - sparsity) * self.m - 1e-9)))
        return [ops.nm_mask(s.detach().contiguous(), n, self.m) for s in scores]

    def mask(self, scores: Tensor, k: int) -> Tensor:
        if k * self.m != scores.numel() * self.n:
            raise ValueError(f"NM({self.n}, {self.m}).mask: k is {scores.numel() * self.n // self.m} here, got {k}")
        return ops.nm_mask(scores.detach().contiguous(), self.n, self.m)


@dataclass(frozen=True)
class _Structured(Granularity):
    """``per_axis``: keep sqrt(R) of the units and, in every matrix, sqrt(R) of its other axis, so R overall (the
    article's ``Factors(convention="formula").pruning``); only the units shrink away, the other axis stays as zeros.
    ``trim_rescale``: the survivors are multiplied by that reading's ``trim`` once, when the masks are final.
    """

    per_axis: bool = False
    trim_rescale: bool = False

    def trim(self, density: float) -> float:
        """What the survivors are multiplied by."""
        return Factors.from_retention(density, convention="formula").trim if self.trim_rescale else 1.0

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        if self.per_axis:
            if densities is not None:
                raise ValueError(f"{type(self).__name__}: per_axis and densities do not go together; drop one")
            sparsity = 1 - math.sqrt(1 - sparsity)
        units = [i for i, m in enumerate(maps) if not m.axis]
        chosen: dict[int, Tensor] = dict(
            zip(
                units,
                _topk_units(
                    [maps[i] for i in units], [scores[i] for i in units], sparsity, scope, densities, selector, floor
                ),
            )
        )
        for i, m in enumerate(maps):
            if m.axis:
                chosen[i] = selector.topk([scores[i]], kept_count(selector.total(m.units), sparsity))[0]
        return [chosen[i] for i in range(len(maps))]

    def _axes(self, layers: Layers, shares: Sequence[Share]) -> list[UnitMap]:
        """Maps over the other axis: the columns of the matrices whose rows are units, the rows of those whose
        columns are.
        """
        if not self.per_axis:
            return []
        shapes = {s.layer: (layers[s.layer].out_features, layers[s.layer].in_features) for s in shares}
        return [_line_map(s.layer, shapes[s.layer], 1 - s.dim) for s in shares]


def _line_map(fqn: str, shape: tuple[int, int], dim: int) -> UnitMap:
    """The rows (dim 0) or columns (dim 1) of one weight."""
    key = f"{fqn}:{'columns' if dim else 'rows'}"
    reduce, expand = partial(_line_sums, fqn, 1 - dim), partial(_lines, fqn, shape, dim)
    return UnitMap(key, (fqn,), (shape[dim],), shape[1 - dim], reduce, expand, axis=True)


def _shared_map(key: str, layers: Layers, shares: Sequence[Share], units: int) -> UnitMap:
    """Units that own lines of several weights."""
    parts = [(share.layer, share.lines(units), share.dim) for share in shares]
    shapes = {fqn: (layers[fqn].out_features, layers[fqn].in_features) for fqn, _, _ in parts}
    weights = sum(lines.shape[1] * shapes[fqn][1 - dim] for fqn, lines, dim in parts)
    reduce, expand = partial(_shared_sums, parts), partial(_shared_masks, parts, shapes)
    return UnitMap(key, tuple(shapes), (units,), weights, reduce, expand)


# The two directions of every kind of unit. Plain functions, so that plans can be pickled.


def _named(fqn: str, units: Tensor) -> dict[str, Tensor]:
    return {fqn: units}


def _block_sums(fqn: str, size: tuple[int, int], scores: Mapping[str, Tensor]) -> Tensor:
    return ops.block_scores(scores[fqn], size)


def _blown_up(fqn: str, size: tuple[int, int], units: Tensor) -> dict[str, Tensor]:
    return {fqn: units.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)}


def _line_sums(fqn: str, over: int, scores: Mapping[str, Tensor]) -> Tensor:
    return scores[fqn].float().sum(over)


def _lines(fqn: str, shape: tuple[int, int], dim: int, units: Tensor) -> dict[str, Tensor]:
    return {fqn: units.unsqueeze(1 - dim).expand(shape).contiguous()}


def _shared_sums(parts: Sequence[tuple[str, Tensor, int]], scores: Mapping[str, Tensor]) -> Tensor:
    sums = [scores[fqn].float().sum(1 - dim)[lines].sum(1) for fqn, lines, dim in parts]
    return torch.stack([s.to(sums[0].device) for s in sums]).sum(0)


def _shared_masks(
    parts: Sequence[tuple[str, Tensor, int]], shapes: Mapping[str, tuple[int, int]], units: Tensor
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for fqn, lines, dim in parts:
        kept = torch.zeros(shapes[fqn][dim], dtype=torch.bool, device=units.device)
        kept[lines.to(units.device)[units].flatten()] = True
        masks |= _lines(fqn, shapes[fqn], dim, kept)
    return masks


def _covered(layers: Layers, wanted: Sequence[str], what: str, reasons: dict[str, str]) -> bool:
    """True where all the Linears of a block are being pruned; else those that are get a reason."""
    missing = [fqn for fqn in wanted if fqn not in layers]
    if missing:
        reasons.update({fqn: f"{missing[0]}, of the same {what}, is not selected" for fqn in wanted if fqn in layers})
    return not missing


@dataclass(frozen=True)
class Heads(_Structured):
    """Whole attention heads: their rows of query, key and value and their columns of the output, in every attention
    block found by structure. Heads that share a key and a value go together, and so does one head in all layers that
    read one position bias (T5). ``H - round(sparsity * H)`` of H stay; ``shrink_`` then cuts them out. Weights that are
    no ``nn.Linear`` (Conv1D, ``nn.MultiheadAttention``) want ``use_linears_`` first.
    """

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps: list[UnitMap] = []
        reasons: dict[str, str] = {}
        blocks, unfit = attention_blocks(model)
        for group in head_groups(blocks):
            shares = [share for block in group for share in block.shares]
            if not _covered(layers, [share.layer for share in shares], "attention", reasons):
                continue
            maps.append(_shared_map(f"{group[0].name}:heads", layers, shares, group[0].units))
            maps += self._axes(layers, shares)
        return maps, _uncovered(layers, maps, reasons, unfit, "no attention block")


@dataclass(frozen=True)
class Neurons(_Structured):
    """Whole feed-forward neurons: their row of the expanding Linear (and of the gate) and their column of the
    contracting one. ``I - round(sparsity * I)`` of I stay; ``shrink_`` then cuts them out.
    """

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        maps: list[UnitMap] = []
        reasons: dict[str, str] = {}
        blocks, unfit = feed_forwards(model)
        for block in blocks:
            if not _covered(layers, block.layers, "feed-forward", reasons):
                continue
            maps.append(_shared_map(f"{block.name}:neurons", layers, block.shares, block.neurons))
            maps += self._axes(layers, block.shares)
        return maps, _uncovered(layers, maps, reasons, unfit, "no feed-forward block")


def _uncovered(
    layers: Layers, maps: Sequence[UnitMap], reasons: Mapping[str, str], unfit: Mapping[str, str], default: str
) -> dict[str, str]:
    covered = {fqn for m in maps for fqn in m.layers}
    left = {}
    for fqn in layers:
        if fqn not in covered:
            near = next((why for name, why in unfit.items() if name and fqn.startswith(name + ".")), None)
            left[fqn] = reasons.get(fqn) or near or f"part of {default}"
    return left


@dataclass(frozen=True)
class Mixture(Granularity):
    """Two stages: ``first`` (heads, neurons or blocks) keeps ``first_density``, then ``then`` (elements or blocks)
    keeps, of what is left, as many as make the total exact. first_density: default sqrt(density), the article's
    per-axis reading.
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
        if self.first_density is not None and not 0 < self.first_density <= 1:
            raise ValueError(f"Mixture: first_density expected in (0, 1], got {self.first_density!r}")

    def unit_maps(self, model: nn.Module, layers: Layers) -> tuple[list[UnitMap], dict[str, str]]:
        first, reasons = self.first.unit_maps(model, layers)
        if not first:
            raise ValueError(f"Mixture: {type(self.first).__name__} finds nothing here: {_shown(reasons)}")
        then = [replace(m, key=f"{m.key}:then", stage=1) for m in self.then.unit_maps(model, layers)[0]]
        return first + then, {}

    def choose(
        self, maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
        densities: Mapping[str, float] | None, selector: Selector, floor: float = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        count = sum(m.stage == 0 for m in maps)
        first, then = maps[:count], maps[count:]
        density = 1 - sparsity
        share = max(density, self.first_density if self.first_density is not None else math.sqrt(density))
        kept = self.first.choose(first, scores[:count], 1 - share, scope, None, selector, floor)
        alive = _combine(first, kept)
        masked = []
        for m, s in zip(then, scores[count:]):
            live = {fqn: alive[fqn].to(s.dtype) for fqn in m.layers if fqn in alive}
            masked.append(s.masked_fill(m.reduce(live) <= 0, -math.inf) if live else s)
        chosen = _topk_units(then, masked, sparsity, scope, densities, selector, floor)
        for m, s, c in zip(then, masked, chosen):
            if bool((c & (s == -math.inf)).any()):
                raise ValueError(
                    f"Mixture: the first stage leaves fewer units of {m.key} than are to stay; raise first_density or "
                    "use scope='global'"
                )
        return kept + chosen


def _shown(reasons: Mapping[str, str]) -> str:
    listed = [f"{fqn}: {why}" for fqn, why in list(reasons.items())[:10]]
    return "; ".join(listed) or "the model has no Linears of that kind"


_NAMED: dict[str, Callable[[], Granularity]] = {"element": Element, "heads": Heads, "neurons": Neurons}


def make_granularity(spec: str | Granularity) -> Granularity:
    """spec: a :class:`Granularity`, or its name: "element", "heads", "neurons", "16x1" for ``Block(16, 1)``, "2:4" for
    ``NM(2, 4)``. ValueError lists what exists.
    """
    if isinstance(spec, Granularity):
        return spec
    if isinstance(spec, str):
        if spec in _NAMED:
            return _NAMED[spec]()
        for sign, build in (("x", Block), (":", NM)):
            parts = spec.split(sign)
            if len(parts) == 2 and all(part.isdecimal() for part in parts):
                return build(int(parts[0]), int(parts[1]))
    raise ValueError(
        f"granularity: expected one of {', '.join(map(repr, _NAMED))}, 'RxC' or Block(r, c), 'N:M' or NM(n, m), "
        f"Mixture(first, then) or a dict from layer name patterns to them, got {spec!r}"
    )


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
    floor: float = 0.0

    @classmethod
    def build(
        cls, model: nn.Module, layers: Layers,
        granularity: str | Granularity | Mapping[str, str | Granularity] = "element", scope: str = "global",
        densities: Mapping[str, float] | None = None, floor: float = 0.0,
    ) -> Plan:  # fmt: skip
        """layers: fqn -> Linear. granularity: one for all, or name pattern (``fnmatch``) -> granularity, first match
        wins; layers that no pattern fits stay dense. scope: ``"global"`` compares the units of all layers of a part,
        ``"layer"`` keeps the same share of each. densities: name pattern -> relative density, see ``weighted_counts``.
        floor: the least density of a layer under ``"global"``, as a share of the density of all, in [0, 1] (counts
        rounded down, the total exact; of heads and neurons, of each block; N:M keeps its pattern everywhere).

        Raises ValueError on an unknown granularity, scope or pattern, on shapes that do not divide, and where no
        layer is left.
        """
        if scope not in ("global", "layer"):
            raise ValueError(f"scope: expected 'global' or 'layer', got {scope!r}")
        if not (isinstance(floor, int | float) and 0 <= floor <= 1):
            raise ValueError(f"floor: expected a share in [0, 1], got {floor!r}")
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
            raise ValueError(f"granularity: {granularity!r} covers none of the layers: {_shown(skipped)}")
        relative = None
        if densities is not None:
            covered = [fqn for part in parts for fqn in part.layers]
            relative = match_patterns(densities, covered, "densities")
            missing = [fqn for fqn in covered if fqn not in relative]
            if missing:
                raise ValueError(f"densities: no pattern fits {', '.join(missing[:10])}; add '*' as the last pattern")
        return cls(tuple(parts), skipped, scope, relative, float(floor))

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
            if bool(s.isnan().any()):
                raise ValueError(f"Plan: scores of {m.key} hold NaN, which has no rank; check the weights and the data")
        kept = part.granularity.choose(
            part.maps, scores, sparsity, self.scope, self.densities, selector or Selector(), self.floor
        )
        return _combine(part.maps, kept)


def _combine(maps: Sequence[UnitMap], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    """A weight stays where every map that covers it keeps it."""
    masks: dict[str, Tensor] = {}
    for m, k in zip(maps, kept):
        for fqn, mask in m.expand(k).items():
            masks[fqn] = masks[fqn] & mask if fqn in masks else mask
    return masks
