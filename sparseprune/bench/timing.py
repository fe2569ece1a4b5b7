"""Interleaved timing: every contestant is timed in every round, so that what disturbs one disturbs all.

All times are seconds. A ratio is baseline time / contestant time, formed within each round and then summarised, so
that a slow second slows both of its sides; above 1 the contestant is faster.

A GPU runs behind the host: there every sample begins and ends with a wait for the device, so that it holds the work of
its own calls, whole, and nothing of others.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

__all__ = ["Comparison", "Spread", "interleave"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the rounds."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """values: at least one number. The quartiles are those of the sample itself (inclusive method)."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, len(values))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """What :func:`interleave` returns. ``samples[name][round]``: seconds a call."""

    samples: dict[str, list[float]]
    calls: dict[str, int]

    def time(self, name: str) -> Spread:
        """Seconds a call of one contestant."""
        return Spread.of(self.samples[name])

    def ratio(self, name: str, baseline: str) -> Spread:
        """baseline time / contestant time, round by round."""
        return Spread.of([b / s for b, s in zip(self.samples[baseline], self.samples[name])])


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 9,
    min_time: float = 0.02,
    *,
    warm_up: int = 2,
    max_calls: int = 10_000,
    evict_bytes: int = 0,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Times zero-argument callables against each other.

    ``candidates``: name -> callable; each of ``rounds`` rounds runs all of them, starting with another one each
    round. One sample is as many calls in a row as fill ``min_time`` seconds (at least one, at most ``max_calls``),
    divided by their number: operands that fit the caches are then found there. ``evict_bytes`` > 0 instead reads a
    buffer of that size before every single call, outside the clock, so that a call finds its operands in memory, as a
    layer of a large model does. ``device``: where the callables work.

    ValueError on no candidate, or on rounds, min_time or warm_up below their least (1, 0, 1).
    """
    if not candidates:
        raise ValueError("interleave: expected at least one candidate, got none")
    if rounds < 1 or warm_up < 1 or max_calls < 1:
        raise ValueError(
            f"interleave: rounds, warm_up and max_calls expected >= 1, got {rounds}, {warm_up} and {max_calls}"
        )
    if not min_time >= 0:
        raise ValueError(f"interleave: min_time expected >= 0 seconds, got {min_time}")
    wait = _wait_for(torch.device(device))
    evict = torch.ones(evict_bytes // 4, device=device) if evict_bytes else None
    names = list(candidates)
    calls = {name: _calibrate(candidates[name], min_time, warm_up, max_calls, wait) for name in names}
    if evict is not None:
        calls = {name: min(count, 3) for name, count in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                run, count = candidates[name], calls[name]
                took = _timed(run, count, wait) if evict is None else _timed_cold(run, count, evict, wait)
                samples[name].append(took)
    finally:
        if collecting:
            gc.enable()
    return Comparison(samples, calls)


def _wait_for(device: torch.device) -> Callable[[], object]:
    """What returns once the device has done all it was given: nothing to wait for on a CPU."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def _calibrate(
    run: Callable[[], object], min_time: float, warm_up: int, max_calls: int, wait: Callable[[], object]
) -> int:
    """Calls a sample: enough to fill min_time, judged by the quickest warm-up call."""
    quickest = float("inf")
    spent, done = 0.0, 0
    while done < warm_up or (spent < min_time / 2 and done < max_calls):
        took = _timed(run, 1, wait)
        quickest, spent, done = min(quickest, took), spent + took, done + 1
    return max(1, min(max_calls, round(min_time / max(quickest, 1e-9))))


def _timed(run: Callable[[], object], count: int, wait: Callable[[], object]) -> float:
    clock = time.perf_counter
    wait()
    start = clock()
    for _ in range(count):
        run()
    wait()
    return (clock() - start) / count


def _timed_cold(
    run: Callable[[], object], count: int, evict: torch.Tensor, wait: Callable[[], object]
) -> float:
    clock = time.perf_counter
    spent = 0.0
    for _ in range(count):
        evict.sum()
        wait()
        start = clock()
        run()
        wait()
        spent += clock() - start
    return spent / count
