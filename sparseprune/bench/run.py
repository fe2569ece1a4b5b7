"""Runs contests: checks every result first, times what is right, relates the time to the machine's limit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _native
from .._files import write_text
from . import machine
from .cases import SUITES
from .contest import Case, Contest
from .peaks import Peaks
from .timing import Spread, interleave

__all__ = ["WrongResult", "load_results", "measure", "refuse_reference", "run_cases", "save_results"]

FORMAT = 1


class WrongResult(RuntimeError):
    """A baseline whose result is wrong: nothing can be compared with it."""


def refuse_reference(allow_reference: bool) -> None:
    """RuntimeError where our ops would run in plain torch, unless that is asked for."""
    running = machine.tier()
    if not allow_reference and running not in _tiers():
        reason = _native.why_no_c() or f"SPARSEPRUNE_BACKEND={running} is set"
        raise RuntimeError(
            f"refuses to time the {running} in place of the compiled core: {reason}; --allow-reference times it anyway"
        )


def _tiers() -> list[str]:
    return list(_native.C.runnable_tiers()) if _native.C is not None else []


def measure(
    contest: Contest, peaks: Peaks | None, rounds: int = 9, min_time: float = 0.02, evict_bytes: int = 0
) -> dict[str, Any]:
    """Checks, then times one contest; returns its record, ready for JSON.

    record: ``case``, ``baseline``, ``absent`` and ``wrong`` {name: reason} (no time is reported for either) and
    ``results`` {name: {``ms`` and ``ratio`` (median, low, high, count), ``ours``, ``gflops`` on kept weights, ``share``
    of the limit and ``limit``, what it is}}. ``peaks`` None leaves the share out. WrongResult where the baseline is
    wrong.
    """
    entries, bad = {}, {}
    for name, entry in contest.entries.items():
        wrong = entry.check()
        if wrong is None:
            entries[name] = entry
        else:
            bad[name] = wrong
    if contest.baseline in bad:
        where = f"{contest.case.suite} {contest.case.label}"
        raise WrongResult(f"{where}: the baseline {contest.baseline} is wrong: {bad[contest.baseline]}")
    found = interleave({name: entry.run for name, entry in entries.items()}, rounds, min_time, evict_bytes=evict_bytes)
    for name, entry in entries.items():
        found.samples[name] = [sample / entry.calls for sample in found.samples[name]]
    results = {}
    for name, entry in entries.items():
        seconds = found.time(name)
        result: dict[str, Any] = {
            "ms": Spread.of([1e3 * sample for sample in found.samples[name]]).to_dict(),
            "ratio": found.ratio(name, contest.baseline).to_dict(),
            "ours": entry.ours,
        }
        if entry.kept_flops:
            result["gflops"] = entry.kept_flops / seconds.median / 1e9
        if entry.work is not None and peaks is not None:
            limit, what = peaks.limit_seconds(entry.work)
            result.update(share=limit / seconds.median, limit=what, unit=entry.work.unit)
            result.update(bytes=entry.work.bytes, flops=entry.work.flops)
            result.update(gbs=entry.work.bytes / seconds.median / 1e9)
        results[name] = result
    return {
        "case": contest.case.to_dict(),
        "baseline": contest.baseline,
        "threads": torch.get_num_threads(),
        "tier": machine.tier(),
        "load": machine.load(),
        "cold": bool(evict_bytes),
        "results": results,
        "absent": contest.absent,
        "wrong": bad,
    }


def run_cases(
    cases: Iterable[Case],
    peers: Sequence[str],
    peaks: Peaks | None,
    *,
    rounds: int = 9,
    min_time: float = 0.02,
    evict_bytes: int = 0,
    allow_reference: bool = False,
    each: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Builds, checks and times every case; ``each`` sees a record as soon as it is there."""
    records = []
    for case in cases:
        contest = SUITES[case.suite].build(case, peers, allow_reference)
        with torch.no_grad() if case.suite != "training" else torch.enable_grad():
            record = measure(contest, peaks, rounds, min_time, evict_bytes)
        records.append(record)
        if each is not None:
            each(record)
    return records


def save_results(path: Path, records: Sequence[dict[str, Any]], peaks: Peaks | None, **more: Any) -> None:
    """Writes records with the machine and its peaks as JSON, whole or not at all."""
    data = {
        "format": FORMAT,
        "machine": machine.describe(),
        "peaks": peaks.to_dict() if peaks is not None else None,
        **more,
        "records": list(records),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _one_line_each(_rounded(data)))


def _one_line_each(data: dict[str, Any]) -> str:
    """JSON with one line an entry of each list, so that two result files can be read side by side."""
    lines = []
    for key, value in data.items():
        if isinstance(value, list) and value:
            inner = ",\n".join(f"  {json.dumps(item)}" for item in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _rounded(value: Any) -> Any:
    """Floats to five significant digits: what a timing is good for."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


def load_results(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_results` wrote; ValueError where it is something else."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{path}: expected results of format {FORMAT}, got {found}; run the benchmark again")
    return data
