"""Granularity: what is kept or dropped together. Scores become unit scores, an exact top-k chooses units, units become
masks. A unit is one weight, one block, one attention head or one feed-forward neuron.

A granularity is a class of a file here and an entry in :func:`make_granularity`; a
:class:`~sparseprune.pruning.plan.Plan` holds the units of a whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .base import Granularity
from .blocks import NM, Block, Element, InWeight
from .heads import Heads, Neurons
from .mixture import Mixture

__all__ = ["NM", "Block", "Element", "Granularity", "Heads", "InWeight", "Mixture", "Neurons", "make_granularity"]

_NAMED: dict[str, Callable[[], Granularity]] = {
    "element": Element, "heads": Heads, "neurons": Neurons,
    "heads/axes": partial(Heads, per_axis=True, trim_rescale=True),
    "neurons/axes": partial(Neurons, per_axis=True, trim_rescale=True),
}  # fmt: skip


def make_granularity(spec: str | Granularity) -> Granularity:
    """spec: a :class:`Granularity`, or its name: "element", "heads", "neurons", "16x1" for ``Block(16, 1)``, "2:4" for
    ``NM(2, 4)``; "heads/axes" and "neurons/axes" are per axis, with the survivors rescaled by the trim factor.
    ValueError lists what exists.
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
