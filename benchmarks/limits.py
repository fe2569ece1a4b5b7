"""How near the kernels come to what the machine allows: speed-ups beside those of a kernel at its limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparseprune.bench.tables import best_of_ours, geometric_mean, text_table

#: (tokens, shape) that are shown one by one.
_COLUMNS = (
    (128, (3072, 768)),
    (128, (768, 3072)),
    (128, (4096, 4096)),
    (8, (3072, 768)),
    (8, (4096, 4096)),
    (1, (4096, 4096)),
)
_SPARSITIES = (0.8, 0.9, 0.95)
#: (tokens, sparsity, structure) of which the geometric mean over the four shapes is shown.
_MEANS = (
    (128, 0.5, "element"),
    (128, 0.8, "element"),
    (128, 0.9, "element"),
    (128, 0.95, "element"),
    (128, 0.9, "16x1"),
    (8, 0.9, "element"),
    (8, 0.9, "16x1"),
    (1, 0.9, "element"),
)


def _kind(structure: str) -> str:
    return "block" if structure in ("8x1", "16x1") else structure


def shares_of_limits(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Measured ratio over dense, the ratio at the machine's limits, and the share of it, of what these records cover.

    The limit is the ratio that a kernel at the machine's measured limit would have against the dense time of this run.
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
    for structure, name in (("element", "element"), ("block", "8x1 or 16x1")):
        for sparsity in _SPARSITIES:
            for tokens, shape in _COLUMNS:
                measured = best.get((structure, sparsity, tokens, shape))
                if measured is not None:
                    rows.append(_row(f"{name} {sparsity:.0%}, {shape[0]}x{shape[1]}, N={tokens}", measured))
    for tokens, sparsity, structure in _MEANS:
        ratios = by_mean.get((tokens, sparsity, structure), {})
        if len(ratios) == 4:
            name = f"{structure} {sparsity:.0%}, geometric mean of four shapes, N={tokens}"
            means = [geometric_mean(ratio[i] for ratio in ratios.values()) for i in (0, 1)]
            rows.append(_row(name, (means[0], means[1])))
    if not rows:
        return "these records cover none of the products that are compared with the machine's limits"
    return text_table(["speed-up over torch dense", "measured", "at the limits", "share"], rows, markdown)


def shares_of_bandwidth(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """Of the suite "decoding": microseconds a call, speed-up over torch dense, GB/s of the bytes that a call must read,
    and their share of the bandwidth measured in the same run. A row a contestant and shape, a cell a sparsity.
    """
    sparsities = sorted({record["case"]["sparsity"] for record in records})
    cells: dict[tuple[tuple[int, ...], str], dict[float, str]] = {}
    for record in records:
        case = record["case"]
        for name, result in record["results"].items():
            us, ratio, share = 1e3 * result["ms"]["median"], result["ratio"]["median"], result.get("share", math.nan)
            text = f"{us:.3g}, {ratio:.2f}, {result.get('gbs', math.nan):.1f} ({share:.0%})"
            cells.setdefault((tuple(case["shape"]), name), {})[case["sparsity"]] = text
    rows = [
        [f"{shape[0]}x{shape[1]}, {name}", *(found.get(sparsity, "-") for sparsity in sparsities)]
        for (shape, name), found in sorted(cells.items(), key=lambda item: math.prod(item[0][0]))
    ]
    return text_table(["us, ratio, GB/s (share)", *(f"{s:.0%} zeros" for s in sparsities)], rows, markdown)


def _row(name: str, measured: tuple[float, float]) -> list[str]:
    ratio, limit = measured
    return [name, f"{ratio:.3g}", f"{limit:.3g}", f"{ratio / limit:.0%}"]
