"""``python -m benchmarks.run``: every table of docs/lab/performance.md on this machine, in one command.

Runs the suites of ``sparseprune bench`` with all peers that are installed, compares with the machine's limits, then
runs the whole models, and writes ``benchmarks/results/NAME.json`` and plots. ``--part`` runs some of it: the parts of
one NAME are merged into one file, so that a busy machine can be waited for between them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sparseprune.bench import machine, plots, tables
from sparseprune.bench.cases import SUITES
from sparseprune.bench.command import select_peers
from sparseprune.bench.contest import Case
from sparseprune.bench.peaks import measure_peaks
from sparseprune.bench.run import WrongResult, load_results, refuse_reference, run_cases, save_results

from . import models
from .limits import shares_of_bandwidth, shares_of_limits

RESULTS = Path(__file__).resolve().parent / "results"

#: part -> (suite, which of its cases)
PARTS: dict[str, tuple[str, int | None]] = {
    "linear-1": ("linear", 1),
    "linear-8": ("linear", 8),
    "linear-128": ("linear", 128),
    "curve-1": ("curve", 1),
    "curve-8": ("curve", 8),
    "curve-128": ("curve", 128),
    **{name: (name, None) for name in SUITES if name not in ("linear", "curve")},
}


def merged(
    records: Sequence[dict[str, Any]], record: dict[str, Any], key: Sequence[str]
) -> list[dict[str, Any]]:
    """The records with this one in place of the one that has the same under every name of key."""
    return [old for old in records if any(old[name] != record[name] for name in key)] + [record]


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--part", help=f"some of {', '.join(PARTS)}, models (default: all, about half an hour)")
    result.add_argument("--name", help="of the result file (default: TIER-THREADSt)")
    result.add_argument("--threads", type=int, help="torch.set_num_threads (default: torch's own)")
    result.add_argument("--peers", default="all", help="all, none, or a list (see sparseprune bench --help)")
    result.add_argument("--rounds", type=int, default=7)
    result.add_argument("--min-time", type=float, default=0.01)
    result.add_argument("--fresh", action="store_true", help="forget what the result file holds")
    result.add_argument("--allow-reference", action="store_true", help="time plain torch where the core is absent")
    return result


def cases_of(part: str) -> list[Case]:
    suite, tokens = PARTS[part]
    return [case for case in SUITES[suite].cases() if tokens is None or case.tokens == tokens]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    parts = arguments.part.split(",") if arguments.part else [*PARTS, "models"]
    unknown = [part for part in parts if part not in PARTS and part != "models"]
    if unknown:
        known = ", ".join([*PARTS, "models"])
        print(f"benchmarks.run: --part expected some of {known}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    try:
        peers = select_peers(arguments.peers.split(","))
        refuse_reference(arguments.allow_reference)
    except (ValueError, RuntimeError) as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    if "OMP_WAIT_POLICY" not in os.environ:
        print("note: OMP_WAIT_POLICY is unset; with `passive` idle threads disturb no one, and figures repeat better")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path = RESULTS / f"{arguments.name or f'{machine.tier()}-{torch.get_num_threads()}t'}.json"
    old: dict[str, Any] = load_results(path) if path.is_file() and not arguments.fresh else {}
    records: list[dict[str, Any]] = old.get("records", [])
    whole: dict[str, Any] = {key: old.get(key, []) for key in ("models", "layers")}
    print(machine.one_line(), flush=True)
    peaks = None if machine.tier() == "reference" else measure_peaks()
    if peaks is not None:
        peaks.raise_to(old.get("peaks"))
    status = 0
    for part in parts:
        start = time.perf_counter()
        if part == "models":
            status |= _models(whole, arguments.rounds)
        else:
            cases = cases_of(part)
            try:
                new = run_cases(
                    cases,
                    peers,
                    peaks,
                    rounds=arguments.rounds,
                    min_time=arguments.min_time,
                    allow_reference=arguments.allow_reference,
                )
            except WrongResult as error:
                print(f"benchmarks.run: {error}", file=sys.stderr)
                return 1
            replaced = {tables.case_of(record) for record in new}
            records = [record for record in records if tables.case_of(record) not in replaced] + new
            _show(part, new)
            wrong = [(tables.case_of(r).label, n, why) for r in new for n, why in r["wrong"].items()]
            for label, name, why in wrong:
                print(f"WRONG, not timed: {label}: {name}: {why}", file=sys.stderr)
            status |= 1 if wrong else 0
        save_results(path, records, peaks, **whole)
        print(f"{part}: {time.perf_counter() - start:.0f} s, load {machine.load()}, wrote {path}\n", flush=True)
    linear = [record for record in records if record["case"]["suite"] == "linear"]
    if linear:
        print(shares_of_limits(linear) + "\n")
    _draw(path, records, peaks)
    return status


def _show(part: str, records: list[dict[str, Any]]) -> None:
    print(f"{part}: {SUITES[PARTS[part][0]].about}\n")
    for record in records:
        print(tables.record_table(record) + "\n")
    if records[0]["case"]["suite"] == "decoding":
        print(shares_of_bandwidth(records) + "\n")
    elif records[0]["case"]["tokens"]:
        print(tables.summary(records) + "\n")


def _models(whole: dict[str, Any], rounds: int) -> int:
    """Measures at the threads in use and merges by (threads, tier)."""
    threads = torch.get_num_threads()
    try:
        found = models.measure_models(models.SHAPES, [threads], 0.9, rounds)
        rows = models.layer_gap(threads, 1024, 0.9, rounds)
    except models.Missing as error:
        print(f"models: skipped: {error}")
        return 0
    for key, new in (("models", found), ("layers", rows)):
        whole[key] = [r for r in whole[key] if (r["threads"], r["tier"]) != (threads, machine.tier())] + new
    same = [record for record in found if record["batch"] * record["length"] == 1024]
    print(f"MiniLM-L6 at 90 %, ms\n\n{models.models_table(found)}\n")
    print(models.gap_table(rows, same[0] if same else None) + "\n")
    return 0


def _draw(path: Path, records: list[dict[str, Any]], peaks: Any) -> None:
    curve = [record for record in records if record["case"]["suite"] == "curve"]
    linear = [record for record in records if record["case"]["suite"] == "linear"]
    about = f"{machine.cpu_model()}, {torch.get_num_threads()} threads, {machine.tier()}"
    try:
        for structure in dict.fromkeys(record["case"]["structure"] for record in curve):
            chosen = [record for record in curve if record["case"]["structure"] == structure]
            plots.speedup(chosen, path.with_name(f"{path.stem}-speedup-{structure}.png"), f"{structure}, {about}")
        if linear and peaks is not None:
            plots.roofline(linear, peaks.to_dict(), path.with_name(f"{path.stem}-roofline.png"), about)
    except RuntimeError as error:
        print(f"no plots: {error}")


if __name__ == "__main__":
    sys.exit(main())
