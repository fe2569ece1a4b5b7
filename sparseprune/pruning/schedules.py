"""Schedules: the density in use, from 1 down to the final one, over the pruning window.

``density(progress)`` takes the share of the window that is over. At 0 nothing has happened and the density is 1;
from 1 on it is ``final_density``. No schedule ever rises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .._config import Config

__all__ = ["ConstantSchedule", "CubicSchedule", "LinearSchedule", "OneShotSchedule", "RetentionSchedule", "Schedule"]

_MAX_STEPS = 100_000


class Schedule(Config):
    """Base of the schedules. A subclass offers ``final_density`` (a field or a property) and :meth:`_inside`."""

    final_density: float

    def density(self, progress: float) -> float:
        """progress: share of the window that is over, any real number; returns the density to keep, in (0, 1]."""
        if math.isnan(progress):
            raise ValueError(f"{type(self).__name__}: progress expected a number, got NaN")
        if progress <= 0:
            return 1.0
        return self.final_density if progress >= 1 else self._inside(progress)

    def sparsity(self, progress: float) -> float:
        """``1 - density(progress)``."""
        return 1.0 - self.density(progress)

    def _inside(self, progress: float) -> float:
        """The density at ``0 < progress < 1``."""
        raise NotImplementedError(f"{type(self).__name__} must define _inside(progress)")


def _check_density(name: str, field: str, value: float, low: float = 0.0) -> None:
    if isinstance(value, bool) or not (isinstance(value, (int, float)) and low < value <= 1):
        raise ValueError(f"{name}: {field} expected in ({low:g}, 1], the share of the weights kept, got {value!r}")


@dataclass(frozen=True)
class _Falling(Schedule):
    final_density: float
    initial_density: float = 1.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        _check_density(name, "final_density", self.final_density)
        _check_density(name, "initial_density", self.initial_density)
        if self.initial_density < self.final_density:
            raise ValueError(
                f"{name}: initial_density ({self.initial_density:g}) expected to be at least final_density "
                f"({self.final_density:g}): a schedule never rises"
            )


@dataclass(frozen=True)
class CubicSchedule(_Falling):
    """s(t) = s_f + (s_i - s_f) (1 - t)^3 for the sparsity s: fast at first, slow at the end (Zhu and Gupta 2017).

    final_density, initial_density: shares of the weights kept, 0 < final_density <= initial_density <= 1, where the
    window ends and begins; ValueError on others.
    """

    def _inside(self, progress: float) -> float:
        return self.final_density + (self.initial_density - self.final_density) * (1 - progress) ** 3


@dataclass(frozen=True)
class LinearSchedule(_Falling):
    """The density falls on a straight line.

    final_density, initial_density: shares of the weights kept, 0 < final_density <= initial_density <= 1, where the
    window ends and begins; ValueError on others.
    """

    def _inside(self, progress: float) -> float:
        return self.final_density + (self.initial_density - self.final_density) * (1 - progress)


@dataclass(frozen=True)
class OneShotSchedule(Schedule):
    """Everything at once, when the share ``at`` of the window is over: 1 before, ``final_density`` after.

    final_density: share of the weights kept, in (0, 1]; at: in [0, 1). ValueError on others.
    """

    final_density: float
    at: float = 0.0

    def __post_init__(self) -> None:
        _check_density("OneShotSchedule", "final_density", self.final_density)
        if not 0 <= self.at < 1:
            raise ValueError(f"OneShotSchedule: at expected in [0, 1), a share of the window, got {self.at!r}")

    def _inside(self, progress: float) -> float:
        return self.final_density if progress > self.at else 1.0


@dataclass(frozen=True)
class ConstantSchedule(Schedule):
    """``final_density``, a share of the weights in (0, 1], from the first step of the window to its last. ValueError on
    another.
    """

    final_density: float

    def __post_init__(self) -> None:
        _check_density("ConstantSchedule", "final_density", self.final_density)

    def _inside(self, progress: float) -> float:
        return self.final_density


@dataclass(frozen=True)
class RetentionSchedule(Schedule):
    """The density schedule of the article: z, the density still kept, falls while r, the share pruned, grows::

        z' = z + z_min - r z        r' = r + r z        u = min(z, z')        from r = r0, z = 1 - r0

    ``u`` is the density in use and ``z_min`` the share regrown in every step. Without bounds ``r + z = 1 + k z_min``
    after k steps, and for ``z_min = 0`` exactly ``z_k = (1 - r0)^(2^k)``. Modes:

    - ``"bounded"``: r stays at most 1 and z at least z_min; once r reaches 1, z is set to z_min, which is the final
      density.
    - ``"literal"``: the recurrence as it stands; z turns negative in the end, which raises. Over a window it ends
      with the first density at or below z_min.
    - ``"consistent"``: r = 1 - z is kept true, so z' = z^2 + z_min; the final density is the fixed point
      ``(1 - sqrt(1 - 4 z_min)) / 2``, for which z_min < 1/4 and a start between the two fixed points are needed.

    Over a window the steps are spread evenly, with straight lines in log density between them.

    r0: in (0, 1); z_min: in [0, 1) and at most 1 - r0, above 0 for a window. ValueError on others.
    """

    r0: float = 0.1
    z_min: float = 0.01
    mode: Literal["bounded", "literal", "consistent"] = "bounded"

    def __post_init__(self) -> None:
        if self.mode not in ("bounded", "literal", "consistent"):
            raise ValueError(
                f"RetentionSchedule: mode expected 'bounded', 'literal' or 'consistent', got {self.mode!r}"
            )
        if not 0 < self.r0 < 1:
            raise ValueError(f"RetentionSchedule: r0 expected in (0, 1), the share pruned first, got {self.r0!r}")
        if not 0 <= self.z_min < 1:
            raise ValueError(f"RetentionSchedule: z_min expected in [0, 1), the share regrown, got {self.z_min!r}")
        start = 1 - self.r0
        if self.mode == "consistent":
            if self.z_min >= 0.25:
                raise ValueError(
                    f"RetentionSchedule: mode 'consistent' needs z_min < 1/4 for a fixed point, got {self.z_min!r}; "
                    "use mode='bounded'"
                )
            root = math.sqrt(1 - 4 * self.z_min)
            low, high = (1 - root) / 2, (1 + root) / 2
            if not low <= start < high:
                raise ValueError(
                    f"RetentionSchedule: mode 'consistent' with z_min={self.z_min:g} converges from 1 - r0 in "
                    f"[{low:g}, {high:g}), got {start:g}; choose r0 in ({1 - high:g}, {1 - low:g}] or mode='bounded'"
                )
        elif self.z_min > start:
            raise ValueError(
                f"RetentionSchedule: z_min ({self.z_min:g}) expected at most 1 - r0 ({start:g}): a schedule never rises"
            )

    def states(self, n: int) -> list[tuple[float, float]]:
        """(r, z) after steps 1 to n. ValueError in mode 'literal' where z turns negative or is not finite."""
        if n < 0:
            raise ValueError(f"RetentionSchedule: n expected to be at least 0, got {n}")
        r, z = self.r0, 1 - self.r0
        states = []
        for step in range(1, n + 1):
            r, z = self._next(r, z)
            if z < 0 or not math.isfinite(z) or not math.isfinite(r):
                raise ValueError(
                    f"RetentionSchedule: mode 'literal' leaves the densities at step {step} (z = {z:g}); "
                    "use mode='bounded'"
                )
            states.append((r, z))
        return states

    def densities(self, n: int) -> list[float]:
        """u, the density in use, after steps 1 to n."""
        used, before = [], 1 - self.r0
        lowest = 1.0
        for _, z in self.states(n):
            u = min(before, z)
            if self.mode == "bounded":
                lowest = u = min(lowest, u)
            used.append(u)
            before = z
        return used

    def _next(self, r: float, z: float) -> tuple[float, float]:
        if self.mode == "consistent":
            z = z * z + self.z_min
            return 1 - z, z
        if self.mode == "literal":
            return r + r * z, z + self.z_min - r * z
        if r >= 1:
            return 1.0, self.z_min
        return min(1.0, r + r * z), max(self.z_min, z + self.z_min - r * z)

    @property
    def final_density(self) -> float:  # type: ignore[override]
        """The density at the end of the window. ValueError for z_min = 0, where the density falls to nothing."""
        return self._knots()[-1]

    def _knots(self) -> list[float]:
        """The densities in use at the ends of the steps of the window, falling, the last one final."""
        if self.z_min == 0:
            raise ValueError("RetentionSchedule: z_min = 0 lets the density fall to 0; a window needs z_min > 0")
        fixed = (1 - math.sqrt(1 - 4 * self.z_min)) / 2 if self.mode == "consistent" else self.z_min
        enough = fixed * 1.01 if self.mode == "consistent" else fixed
        n = 8
        while n <= _MAX_STEPS:
            used = self.densities(n)
            end = next((i for i, u in enumerate(used) if u <= enough), None)
            if end is not None:
                knots = used[: end + 1]
                if self.mode == "consistent":
                    knots[-1] = fixed
                return [min(knots[: i + 1] + [1.0]) for i in range(len(knots))]
            n *= 2
        raise ValueError(f"RetentionSchedule: r0={self.r0!r} settles on no density within {_MAX_STEPS} steps; raise r0")

    def _inside(self, progress: float) -> float:
        knots = [1.0, *self._knots()]
        position = progress * (len(knots) - 1)
        index = min(int(position), len(knots) - 2)
        share = position - index
        if share == 0:
            return knots[index]
        return math.exp((1 - share) * math.log(knots[index]) + share * math.log(knots[index + 1]))
