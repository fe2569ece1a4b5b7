"""Plain-text tables of benchmark records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .contest import Case

__all__ = ["case_of", "geometric_mean", "grid", "record_table", "summary", "text_table"]

Record = dict[str, Any]


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], markdown: bool = False) -> str:
    """Columns as wide as their widest cell, the first left-aligned, the others right; ``markdown``: with bars."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def one(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return "| " + " | ".join(padded) + " |" if markdown else "  ".join(padded).rstrip()

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    body = [one(line) for line in lines[1:]]
    return "\n".join([one(lines[0]), rule if markdown else "-" * (sum(widths) + 2 * (len(widths) - 1)), *body])


def case_of(record: Record) -> Case:
    """The case of a record, also of one read from JSON."""
    fields = dict(record["case"])
    fields["shape"] = tuple(fields["shape"])
    return Case(**fields)


def record_table(record: Record) -> str:
    """All of one contest: medians and quartiles of ms and ratio, GFLOP/s on kept weights, share of the limit."""
    rows = []
    for name, result in record["results"].items():
        ms, ratio = result["ms"], result["ratio"]
        rows.append(
            [
                name,
                f"{ms['median']:.4g}",
                f"{ms['low']:.4g}..{ms['high']:.4g}",
                f"{ratio['median']:.2f}",
                f"{ratio['low']:.2f}..{ratio['high']:.2f}",
                f"{result['gflops']:.1f}" if "gflops" in result else "",
                f"{result['share']:.0%} {result['limit']}" if "share" in result else "",
            ]
        )
    head = [case_of(record).label, "ms", "quartiles", "ratio", "quartiles", "kept GFLOP/s", "of the limit"]
    missing = [f"  not run: {name}: {reason}" for name, reason in record["absent"].items()]
    wrong = [f"  WRONG, not timed: {name}: {reason}" for name, reason in record["wrong"].items()]
    return "\n".join([text_table(head, rows), *missing, *wrong])


def geometric_mean(values: Iterable[float]) -> float:
    """values: one or more positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def best_of_ours(record: Record) -> tuple[str, float] | None:
    """The quickest float32 contestant of ours and its ratio; None where none ran."""
    ours = {
        name: result["ratio"]["median"]
        for name, result in record["results"].items()
        if result["ours"] and not name.endswith(("bfloat16", "int8"))
    }
    return max(ours.items(), key=lambda item: item[1]) if ours else None


def grid(records: Sequence[Record], structure: str) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of speed-ups of one structure: a row a contestant, a column a shape and token count.

    A cell lists the median ratios at the sparsities of the head, in order; ``-``: not run.
    """
    chosen = [record for record in records if record["case"]["structure"] == structure]
    sparsities = sorted({record["case"]["sparsity"] for record in chosen})
    columns = list(dict.fromkeys((tuple(r["case"]["shape"]), r["case"]["tokens"]) for r in chosen))
    names = list(dict.fromkeys(name for record in chosen for name in record["results"]))
    cells: dict[tuple[str, tuple, float], float] = {}
    for record in chosen:
        column = (tuple(record["case"]["shape"]), record["case"]["tokens"])
        for name, result in record["results"].items():
            cells[name, column, record["case"]["sparsity"]] = result["ratio"]["median"]
    head = [f"{structure} at " + " / ".join(f"{s:.0%}" for s in sparsities)]
    head += ["x".join(map(str, shape)) + (f" N={tokens}" if tokens else "") for shape, tokens in columns]
    rows = []
    for name in names:
        row = [name]
        for column in columns:
            found = [cells.get((name, column, s)) for s in sparsities]
            row.append(" / ".join("-" if ratio is None else f"{ratio:.3g}" for ratio in found))
        if any(set(cell) - set("-/ ") for cell in row[1:]):
            rows.append(row)
    return head, rows


def summary(records: Sequence[Record], markdown: bool = False) -> str:
    """The tables of all structures, and the geometric means of ours over the shapes for each token count."""
    parts = []
    for suite in dict.fromkeys(record["case"]["suite"] for record in records):
        own = [record for record in records if record["case"]["suite"] == suite]
        for structure in dict.fromkeys(record["case"]["structure"] for record in own):
            head, rows = grid(own, structure)
            head[0] = f"{suite}, {head[0]}"
            if rows:
                parts.append(text_table(head, rows, markdown))
    means = []
    groups: dict[tuple[str, str, int, float], list[float]] = {}
    for record in records:
        best = best_of_ours(record)
        if best is not None and record["case"]["tokens"]:
            case = record["case"]
            key = (case["suite"], case["structure"], case["tokens"], case["sparsity"])
            groups.setdefault(key, []).append(best[1])
    for (suite, structure, tokens, sparsity), ratios in sorted(groups.items(), key=lambda item: item[0]):
        if len(ratios) > 1:
            mean = f"{geometric_mean(ratios):.2f}"
            means.append([f"{suite}, {structure}", str(tokens), f"{sparsity:.0%}", mean, str(len(ratios))])
    if means:
        head = ["ours (float32), geometric mean", "N", "sparsity", "ratio", "shapes"]
        parts.append(text_table(head, means, markdown))
    return "\n\n".join(parts)
