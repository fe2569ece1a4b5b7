"""Allocation: how many units of each layer are kept. Every count is exact and an integer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any, TypeVar

__all__ = ["erk_densities", "kept_count", "match_patterns", "weighted_counts"]

V = TypeVar("V")


def kept_count(units: int, sparsity: float) -> int:
    """``units - round(sparsity * units)``: how many of so many units stay."""
    if isinstance(sparsity, bool) or not (isinstance(sparsity, Real) and 0 <= sparsity <= 1):
        raise ValueError(f"sparsity expected in [0, 1], the share of the weights set to zero, got {sparsity!r}")
    return units - round(float(sparsity) * units)


def weighted_counts(units: Sequence[int], sparsity: float, densities: Sequence[float]) -> list[int]:
    """units, densities: one a layer; returns the kept units of each, in all exactly ``kept_count(sum(units),
    sparsity)``.

    The densities are relative: they are scaled by one common factor until the total is right, and none passes 1.
    Fractions are rounded by largest remainder, ties to the earlier layer. ``weighted_counts([100, 100], 0.5, [1, 3])``
    is ``[25, 75]``. ValueError on a density that is negative or not finite, or where the positive ones cannot hold the
    total.
    """
    if len(units) != len(densities):
        raise ValueError(f"densities expected {len(units)} entries, one a layer, got {len(densities)}")
    for density in densities:
        if not (math.isfinite(density) and density >= 0):
            raise ValueError(f"densities expected finite and not negative, got {density!r}")
    target = kept_count(sum(units), sparsity)
    room = sum(n for n, d in zip(units, densities) if d > 0)
    if target > room:
        raise ValueError(
            f"densities: {target} units are to stay, but the layers with a density above 0 hold {room}; raise the "
            "sparsity or give more layers a density"
        )
    shares = _scaled(units, target, densities)
    counts = [min(n, math.floor(share)) for n, share in zip(units, shares)]
    order = sorted(range(len(units)), key=lambda i: (counts[i] - shares[i], i))
    while (missing := target - sum(counts)) > 0:
        for i in order:
            if missing and counts[i] < units[i] and densities[i] > 0:
                counts[i] += 1
                missing -= 1
    for i in reversed(order):  # rounding in the scaling can leave a unit too many
        spare = min(counts[i], sum(counts) - target)
        counts[i] -= max(0, spare)
    return counts


def _scaled(units: Sequence[int], target: int, densities: Sequence[float]) -> list[float]:
    """min(n, t d n) for the t at which they sum to the target: layers that reach 1 are filled, the rest is scaled
    anew.
    """
    full: set[int] = set()
    while True:
        free = [i for i in range(len(units)) if i not in full]
        mass = sum(densities[i] * units[i] for i in free)
        left = target - sum(units[i] for i in full)
        t = left / mass if mass > 0 else 0.0
        over = [i for i in free if t * densities[i] > 1]
        if not over:
            return [float(units[i]) if i in full else t * densities[i] * units[i] for i in range(len(units))]
        full.update(over)


def erk_densities(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """shapes: fqn -> (N, K); returns relative densities (N + K) / (N K), thinner for larger layers (Evci et al.
    2020).
    """
    return {fqn: (shape[0] + shape[1]) / (shape[0] * shape[1]) for fqn, shape in shapes.items()}


def match_patterns(patterns: Mapping[str, V], names: Sequence[str], what: str) -> dict[str, V]:
    """name -> value of the first pattern (``fnmatch``: ``*``, ``?``, ``[...]``) that fits it; names without one are
    absent.

    ValueError on a pattern that fits no name, listing the names.
    """
    found: dict[str, Any] = {}
    used = set()
    for name in names:
        fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        used.update(fitting)
        if fitting:
            found[name] = patterns[fitting[0]]
    for pattern in patterns:
        if pattern not in used:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise ValueError(f"{what}: pattern {pattern!r} fits no layer; the layers are: {shown}")
    return found
