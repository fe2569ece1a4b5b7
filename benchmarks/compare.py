"""``python -m benchmarks.compare OLD NEW``: which contestants of ours became slower between two result files.

A regression: the new median ratio to the baseline is below the old by more than the tolerance, and the quartiles do
not overlap. Ratios are compared, not times, so that two days on one machine compare; two machines do not, and that is
said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseprune.bench.run import load_results
from sparseprune.bench.tables import case_of, text_table

Key = tuple[str, str, int, str, bool, str]


def ours(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """(suite, case, threads, tier, cold, contestant) -> ratio of every contestant of ours."""
    found = {}
    for record in results["records"]:
        case = case_of(record)
        for name, result in record["results"].items():
            if result["ours"]:
                place = (case.suite, case.label, record["threads"], record["tier"], record["cold"], name)
                found[place] = result["ratio"]
    return found


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[list[list[str]], int, int]:
    """Rows (case, contestant, old, new, change, verdict) of what both hold, the number of regressions and of gains."""
    before, after = ours(old), ours(new)
    rows, slower, faster = [], 0, 0
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        change = b["median"] / a["median"]
        verdict = ""
        if change < 1 - tolerance and b["high"] < a["low"]:
            verdict, slower = "slower", slower + 1
        elif change > 1 + tolerance and b["low"] > a["high"]:
            verdict, faster = "faster", faster + 1
        suite, label, threads, tier, cold, name = key
        where = f"{suite} {label}, {threads} threads, {tier}{', cold' if cold else ''}"
        rows.append([where, name, f"{a['median']:.2f}", f"{b['median']:.2f}", f"{change - 1:+.0%}", verdict])
    rows.sort(key=lambda row: (row[5] != "slower", row[0], row[1]))
    return rows, slower, faster


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: no regression, 1: some, 2: the files cannot be compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="fraction of the ratio (default 0.1)")
    parser.add_argument("--all", action="store_true", help="print what did not change, too")
    arguments = parser.parse_args(argv)
    try:
        old, new = load_results(arguments.old), load_results(arguments.new)
    except (OSError, ValueError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    for field in ("cpu", "cores", "torch", "omp_wait_policy"):
        if old["machine"].get(field) != new["machine"].get(field):
            print(f"note: {field} differs: {old['machine'].get(field)} and {new['machine'].get(field)}")
    rows, slower, faster = compare(old, new, arguments.tolerance)
    if not rows:
        print("benchmarks.compare: the files have no contestant of ours in common", file=sys.stderr)
        return 2
    shown = rows if arguments.all else [row for row in rows if row[5]]
    if shown:
        print(text_table(["case", "contestant", "old ratio", "new ratio", "change", ""], shown))
    print(f"{len(rows)} compared: {slower} slower, {faster} faster, by more than {arguments.tolerance:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
