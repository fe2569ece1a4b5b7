"""``python -m benchmarks.render``: puts the tables of ``benchmarks/results/*.json`` into the pages of docs/lab.

A table stands between ``<!-- table: RESULT WHAT -->`` and ``<!-- end -->``; RESULT is the name of a result file, WHAT
one of ``machine``, ``limits``, ``fixed``, ``linear STRUCTURE``, ``means``, ``shares``, ``decoding``, ``tokens``,
``minilm``, ``training``, ``other``, ``models``, ``gap``; of ``programs``: ``whole THREADS TIER``, ``steps``; of
``accuracy-latency`` and ``perplexity-speed``: ``accuracy`` and ``language``, with THREADS TIER.
``--picture RESULT`` draws docs/pictures/speedup.png, ``--models RESULT`` docs/pictures/whole-model.png.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparseprune.bench import plots, tables
from sparseprune.bench.run import load_results

from .accuracy_latency import table as accuracy_table
from .limits import shares_of_bandwidth, shares_of_limits
from .models import gap_table, models_table
from .perplexity_speed import table as language_table
from .programs import programs_table, steps_table
from .run import RESULTS

DOCS = RESULTS.parents[1] / "docs"
_BLOCK = re.compile(r"(<!-- table: (\S+) ([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
_SIZES = ("16 KiB", "512 KiB", "4096 KiB", "262144 KiB")
_FLAT = ("kth", "topk", "mask", "threshold", "adamw")


def table(results: dict[str, Any], what: str) -> str:
    """One block of the document; ValueError on an unknown kind, or where the results hold nothing for it."""
    kind, _, rest = what.partition(" ")
    records = results["records"]
    if kind in ("accuracy", "language"):
        threads, tier = rest.split()
        (chosen,) = [r for r in records if (str(r["threads"]), r["tier"]) == (threads, tier)]
        return (accuracy_table if kind == "accuracy" else language_table)(chosen, markdown=True)
    own = [record for record in records if record["case"]["suite"] == kind]
    if kind == "machine":
        about = results["machine"]
        names = ("cpu", "cores", "threads", "tier", "torch", "torch_cpu_capability", "omp_wait_policy")
        loads = sorted(record["load"] for record in records if record["load"] is not None)
        rows = [[name.replace("_", " "), str(about[name])] for name in names]
        if loads:
            rows.append(["load average over the run", f"{loads[0]} to {loads[-1]}, median {loads[len(loads) // 2]}"])
        return tables.text_table(["", ""], rows, markdown=True)
    if kind == "limits":
        peaks = results["peaks"]
        rows = [
            ["multiply-adds, operands in registers", f"{peaks['fma_gflops']:.0f} GFLOP/s"],
            ["multiply-adds, one L1 load each", f"{peaks['l1_fma_gflops']:.0f} GFLOP/s"],
            *([f"read, working set {size}", f"{peaks['read_gbs'][size]:.0f} GB/s"] for size in _SIZES),
            ["read and written in place, 256 MiB", f"{peaks['update_gbs']:.0f} GB/s"],
        ]
        return tables.text_table(["limit", "measured"], rows, markdown=True)
    if kind == "models":
        return models_table(results["models"], markdown=True)
    if kind == "whole":
        threads, tier = rest.split()
        chosen = [r for r in results["programs"] if (str(r["threads"]), r["tier"]) == (threads, tier)]
        return programs_table(chosen, markdown=True)
    if kind == "steps":
        chosen = [r for r in results["programs"] if (r["shape"], r["threads"]) == ("16x64", 1)]
        return steps_table(chosen, markdown=True)
    if kind == "gap":
        same = [record for record in results["models"] if record["batch"] * record["length"] == 1024]
        return gap_table(results["layers"], same[0] if same else None, markdown=True)
    if kind == "shares":
        return shares_of_limits(records, markdown=True)
    if kind == "decoding":
        return shares_of_bandwidth(own, markdown=True)
    if kind == "means":
        linear = [record for record in records if record["case"]["suite"] == "linear"]
        return tables.summary(linear, markdown=True).split("\n\n")[-1]
    if kind == "linear" and rest:
        structure, _, tokens = rest.partition(" ")
        chosen = [r for r in own if not tokens or str(r["case"]["tokens"]) in tokens.split(",")]
        head, rows = tables.grid(chosen, structure)
        return tables.text_table(head, rows, markdown=True)
    if kind in ("training", "minilm"):
        parts = [tables.grid(own, structure) for structure in dict.fromkeys(r["case"]["structure"] for r in own)]
        return "\n\n".join(tables.text_table(head, rows, markdown=True) for head, rows in parts)
    if kind == "fixed":
        return _fixed([record for record in records if record["case"]["suite"] == "linear"])
    if kind == "tokens":
        return _tokens(own)
    if kind == "other":
        return _other([record for record in records if record["case"]["suite"] in _FLAT])
    raise ValueError(f"benchmarks.render: unknown table {what!r}")


def _fixed(records: Sequence[dict[str, Any]]) -> str:
    """A line through the times of ours over density: what a call costs whatever is kept, and what kept weights cost."""
    times: dict[tuple, list[tuple[float, float, float]]] = {}
    for record in records:
        case, best = record["case"], tables.best_of_ours(record)
        if case["tokens"] != 128 or case["structure"] not in ("element", "16x1") or best is None:
            continue
        result = record["results"][best[0]]
        key = (case["structure"], tuple(case["shape"]))
        limit = result["share"] * result["ms"]["median"]
        times.setdefault(key, []).append((1 - case["sparsity"], result["ms"]["median"], limit))
    rows = []
    for (structure, shape), points in times.items():
        density, ms = [point[0] for point in points], [point[1] for point in points]
        slope, fixed = statistics.linear_regression(density, ms)
        limit = statistics.linear_regression(density, [point[2] for point in points]).slope
        at_ninety = max(0.0, fixed) / (fixed + 0.1 * slope)
        name = f"{structure}, {shape[0]}x{shape[1]}"
        rows.append([name, f"{fixed:.3f}", f"{at_ninety:.0%}", f"{0.1 * slope:.3f}", f"{limit / slope:.0%}"])
    head = ["N = 128", "fixed ms", "of the time at 90 %", "ms of the kept weights at 90 %", "their share of the limit"]
    return tables.text_table(head, rows, markdown=True)


def _tokens(records: Sequence[dict[str, Any]]) -> str:
    """Microseconds a token of ours, over the number of tokens."""
    counts = sorted({record["case"]["tokens"] for record in records})
    rows: dict[str, dict[int, str]] = {}
    for record in records:
        tokens = record["case"]["tokens"]
        for name, result in record["results"].items():
            if name == "torch dense" or result["ours"]:
                rows.setdefault(name, {})[tokens] = f"{1e3 * result['ms']['median'] / tokens:.2f}"
    head = ["us a token, N =", *map(str, counts)]
    cells = [[name, *(row.get(count, "-") for count in counts)] for name, row in rows.items()]
    return tables.text_table(head, cells, markdown=True)


def _other(records: Sequence[dict[str, Any]]) -> str:
    rows = []
    for record in records:
        case = tables.case_of(record)
        for name, result in record["results"].items():
            share = f"{result['share']:.0%}" if "share" in result else ""
            ratio = f"{result['ratio']['median']:.3g}"
            rows.append([f"{case.suite}, {case.shape[0]:.0e}", name, f"{result['ms']['median']:.3g}", ratio, share])
    return tables.text_table(["kernel, elements", "", "ms", "ratio", "of the bandwidth"], rows, markdown=True)


def render(text: str) -> str:
    """The document with every table made anew from its result file."""

    def block(match: re.Match[str]) -> str:
        results = load_results(RESULTS / f"{match[2]}.json")
        return f"{match[1]}{table(results, match[3])}\n{match[4]}"

    return _BLOCK.sub(block, text)


def picture(results: dict[str, Any], path: Path) -> None:
    """The README's picture: one shape at 1, 8 and 128 tokens, our two structures beside the peers."""
    suites = ("curve", "linear")
    records = [r for r in results["records"] if tuple(r["case"]["shape"]) == (3072, 768)]
    records = [r for r in records if r["case"]["structure"] in ("element", "16x1")]
    chosen = next(own for own in ([r for r in records if r["case"]["suite"] == suite] for suite in suites) if own)
    about = results["machine"]
    plots.speedup(chosen, path, f"{about['cpu']}, {about['threads']} threads, {about['tier']}, torch {about['torch']}")


def models_picture(results: dict[str, Any], path: Path) -> None:
    """The whole model of ``programs`` as bars: a batch and one short sentence, two threads, dense beside ours."""
    chosen = {r["shape"]: r for r in results["programs"] if (r["threads"], r["tier"]) == (2, "avx512vnni")}
    shown = ("torch dense", "onnxruntime", "onnxruntime int8", "openvino", "program, unstructured", "program, 16x1")
    names = {"16x64": "16 sentences of 64 tokens", "1x16": "one sentence of 16 tokens"}
    panels = {}
    for shape, heading in names.items():
        times, ratios = chosen[shape]["ms"], chosen[shape]["ratio"]
        panels[heading] = {name: (times[name], ratios[name]["median"]) for name in shown if name in times}
    about = chosen["16x64"]["machine"]
    zeros = f"{chosen['16x64']['sparsity']:.0%}".replace("%", " %")
    where = f"{about['cpu']}, {about['threads']} threads, {about['tier']}, torch {about['torch']}"
    plots.bars(panels, path, f"MiniLM-L6, ours with {zeros} zeros, float32 where not int8; {where}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.render", description=__doc__)
    parser.add_argument("--picture", metavar="RESULT", help="draw docs/pictures/speedup.png from this result file")
    parser.add_argument("--models", metavar="RESULT", help="draw docs/pictures/whole-model.png from this result file")
    arguments = parser.parse_args(argv)
    try:
        for path in sorted((DOCS / "lab").glob("*.md")):
            path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
        if arguments.picture:
            picture(load_results(RESULTS / f"{arguments.picture}.json"), DOCS / "pictures" / "speedup.png")
        if arguments.models:
            models_picture(load_results(RESULTS / f"{arguments.models}.json"), DOCS / "pictures" / "whole-model.png")
    except (OSError, ValueError) as error:
        print(f"benchmarks.render: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
