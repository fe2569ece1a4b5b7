"""What every granularity offers: the units of a model, and which of them stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from torch import Tensor, nn

from ..._config import Config
from ..selectors import Selector, topk_units
from ..units import Layers, UnitMap

__all__ = ["Granularity"]


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
        densities: Mapping[str, float] | None, selector: Selector, floor: float | None = 0.0,
    ) -> list[Tensor]:  # fmt: skip
        """scores: one tensor a map, of its shape; returns bool tensors, True = kept, exact in count."""
        return topk_units(maps, scores, sparsity, scope, densities, selector, floor)

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
