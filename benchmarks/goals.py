"""The ratios that the kernels set out to reach, and which of them a run met.

They were set on a two-core AVX2 machine where one L1 load a multiply-add halves the rate; another machine moves them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparseprune.bench.tables import best_of_ours, geometric_mean, text_table

#: structure -> sparsity -> (tokens, shape) -> speed-up over torch dense.
_COLUMNS = (
    (128, (3072, 768)),
    (128, (768, 3072)),
    (128, (4096, 4096)),
    (8, (3072, 768)),
    (8, (4096, 4096)),
    (1, (4096, 4096)),
)
_ROWS = {
    ("element", 0.8): (6, 5, 6.5, 8, 9, 4),
    ("element", 0.9): (10, 8, 11, 15, 18, 8),
    ("element", 0.95): (18, 14, 18, 28, 35, 16),
    ("block", 0.8): (8, 7, 8, 20, 20, 5),
    ("block", 0.9): (14, 11, 14, 37, 40, 9),
    ("block", 0.95): (25, 19, 25, 60, 70, 18),
}
#: (tokens, sparsity, structure) -> least geometric mean over the four shapes.
_MEANS = {
    (128, 0.5, "element"): 2.0,
    (128, 0.8, "element"): 5.5,
    (128, 0.9, "element"): 9.0,
    (128, 0.95, "element"): 15.0,
    (128, 0.9, "16x1"): 12.0,
    (8, 0.9, "element"): 12.0,
    (8, 0.9, "16x1"): 26.0,
    (1, 0.9, "element"): 4.0,
}


def _kind(structure: str) -> str:
    return "block" if structure in ("8x1", "16x1") else structure


def compare_with_goals(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Goal, measured ratio, what share of the goal was reached and the ceiling, for every goal that these records
    cover.

    The ceiling is the ratio that a kernel at the machine's measured limit would have against the dense time of this
    run: where it lies below the goal, no kernel reaches the goal here.
    """
    best: dict[tuple, tuple[float, float]] = {}
    by_mean: dict[tuple, dict[tuple, tuple[float, float]]] = {}
    for record in records:
        case = record["case"]
        found = best_of_ours(record)
        if case["suite"] != "linear" or found is None:
            continue
        shape = tuple(case["shape"])
        ratio = (found[1], found[1] / record["results"][found[0]].get("share", math.nan))
        key = (_kind(case["structure"]), case["sparsity"], case["tokens"], shape)
        best[key] = max(best.get(key, (0.0, 0.0)), ratio)
        by_mean.setdefault((case["tokens"], case["sparsity"], case["structure"]), {})[shape] = ratio
    rows = []
    for (structure, sparsity), goals in _ROWS.items():
        for (tokens, shape), goal in zip(_COLUMNS, goals):
            measured = best.get((structure, sparsity, tokens, shape))
            if measured is not None:
                name = "8x1 or 16x1" if structure == "block" else structure
                rows.append(_row(f"{name} {sparsity:.0%}, {shape[0]}x{shape[1]}, N={tokens}", goal, measured))
    for (tokens, sparsity, structure), goal in _MEANS.items():
        ratios = by_mean.get((tokens, sparsity, structure), {})
        if len(ratios) == 4:
            name = f"{structure} {sparsity:.0%}, geometric mean of four shapes, N={tokens}"
            means = [geometric_mean(ratio[i] for ratio in ratios.values()) for i in (0, 1)]
            rows.append(_row(name, goal, (means[0], means[1])))
    if not rows:
        return "no goal is covered by these records"
    return text_table(["speed-up over torch dense", "goal", "measured", "of the goal", "ceiling"], rows, markdown)


def _row(name: str, goal: float, measured: tuple[float, float]) -> list[str]:
    ratio, ceiling = measured
    missed = "" if ratio >= goal else " (missed)"
    return [name, f"{goal:g}", f"{ratio:.3g}", f"{ratio / goal:.0%}{missed}", f"{ceiling:.3g}"]
