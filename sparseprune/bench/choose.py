"""Picks the fastest of several ways to run one layer, by measuring, or from the cache."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import machine
from .cache import TimingCache, default_cache
from .timing import interleave

__all__ = ["Choice", "choose_fastest"]

#: tokens -> a zero-argument callable that runs the layer once on that many tokens.
Setup = Callable[[int], Callable[[], object]]


@dataclass(frozen=True)
class Choice:
    """What won. ``ratio``: baseline time / winner's time at the worst token count (1.0 where the baseline won).

    ``ratios[name][tokens]``: the same for every candidate; ``milliseconds[name][tokens]``; ``reason``: one line that
    says why; ``cached``: nothing was measured; ``doubt``: what speaks against the timing, a busy machine or rounds that
    disagree whether it pays; empty where nothing does.
    """

    name: str
    ratio: float
    reason: str
    ratios: dict[str, dict[int, float]] = field(default_factory=dict)
    milliseconds: dict[str, dict[int, float]] = field(default_factory=dict)
    cached: bool = False
    doubt: str = ""


def choose_fastest(
    candidates: Mapping[str, Setup],
    *,
    tokens: Sequence[int],
    baseline: str = "dense",
    min_ratio: float = 1.1,
    key: Callable[[str, int], str] | None = None,
    cache: TimingCache | None = None,
    rounds: int = 5,
    min_time: float = 0.004,
    device: torch.device | str = "cpu",
) -> Choice:
    """Times every candidate beside the baseline at each token count; the worst token count decides.

    ``candidates[name](tokens)`` returns the callable to time; it is called only where a timing is missing, so
    building a layout may be put off into it. ``candidates`` must hold ``baseline``. A candidate is taken from
    ``min_ratio`` up; else the baseline is. ``key(name, tokens)``: the cache key
    (:func:`sparseprune.bench.layer_key`); without it nothing is cached, and what was timed on a busy machine is timed
    again on a quiet one. ``cache``: the default cache where None.
    ``device``: where the candidates work; on a GPU a timing waits for it.

    ValueError where the baseline is not among the candidates or tokens is empty or below 1.
    """
    if baseline not in candidates:
        raise ValueError(f"choose_fastest: baseline {baseline!r} expected among the candidates {list(candidates)}")
    if not tokens or min(tokens) < 1:
        raise ValueError(f"choose_fastest: tokens expected as one or more numbers >= 1, got {list(tokens)}")
    names = [name for name in candidates if name != baseline]
    store = (cache if cache is not None else default_cache()) if key is not None else TimingCache(None)
    ratios: dict[str, dict[int, float]] = {name: {} for name in names}
    times: dict[str, dict[int, float]] = {name: {} for name in candidates}
    entries: dict[tuple[str, int], dict[str, Any]] = {}
    load, measured = machine.load(), False
    ready: dict[str, Callable[[], object]]
    for count in tokens:
        known = {name: store.get(key(name, count)) if key is not None else None for name in names}
        if not machine.busy(load):
            known = {n: None if e is not None and machine.busy(e.get("load")) else e for n, e in known.items()}
        missing = [name for name in names if known[name] is None]
        for name, entry in known.items():
            if entry is not None:
                entries[name, count] = entry
                ratios[name][count] = float(entry["ratio"])
                times[name][count] = float(entry["ms"])
                times[baseline].setdefault(count, float(entry["baseline_ms"]))
        if not missing:
            continue
        measured = True
        ready = {name: candidates[name](count) for name in [baseline, *missing]}
        found = interleave(ready, rounds, min_time, device=device)
        base = 1e3 * found.time(baseline).median
        times[baseline][count] = base
        for name in missing:
            ratio = found.ratio(name, baseline)
            ratios[name][count], times[name][count] = ratio.median, 1e3 * found.time(name).median
            entries[name, count] = {
                "ratio": ratio.median, "ms": times[name][count], "baseline_ms": base,
                "low": ratio.low, "high": ratio.high, "load": load,
            }  # fmt: skip
        if key is not None:
            store.put({key(name, count): entries[name, count] for name in missing})
    worst = {name: min(per.values()) for name, per in ratios.items()}
    best = max(worst, key=lambda name: worst[name]) if worst else baseline
    table = ", ".join(f"{name} {worst[name]:.2f}" for name in names)
    where = f"{', '.join(str(count) for count in tokens)} tokens"
    doubt = _doubt({count: entries[best, count] for count in tokens} if worst else {}, best, baseline, min_ratio)
    if best != baseline and worst[best] >= min_ratio and not math.isnan(worst[best]):
        reason = f"{best} runs {worst[best]:.2f} times as fast as {baseline} at {where}"
        if len(names) > 1:
            reason += f" ({table})"
        return Choice(best, worst[best], reason, ratios, times, not measured, doubt)
    reason = f"{baseline} wins at {where}: needed {min_ratio:.2f}, measured {table or 'no other candidate'}"
    return Choice(baseline, 1.0, reason, ratios, times, not measured, doubt)


def _doubt(entries: Mapping[int, dict[str, Any]], best: str, baseline: str, min_ratio: float) -> str:
    """entries: tokens -> timing of ``best``. What speaks against them, or nothing."""
    load = max((entry.get("load") or 0.0 for entry in entries.values()), default=0.0)
    if machine.busy(load):
        return f"timed under load {load:.1f} on {os.cpu_count()} cores"
    for count, entry in entries.items():
        low, high = entry.get("low", 1.0), entry.get("high", 1.0)
        if low < 1 and high >= min_ratio:
            return f"{best} ran from {low:.2f} to {high:.2f} times as fast as {baseline} at {count} tokens"
    return ""
