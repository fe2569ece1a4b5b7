"""Plots of benchmark records. matplotlib is imported only when one is drawn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import Record, case_of

__all__ = ["bars", "break_even", "roofline", "speedup", "spoken", "trade_off"]

_COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#edae49", "#8d6a9f", "#7a7a7a", "#2e4057", "#b5651d")


def _figure(width: float, height: float) -> Any:
    """A figure of that many inches, which pyplot does not know of: it leaves neither a backend nor itself behind."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}); pip install 'sparseprune[plot]'") from None
    return Figure(figsize=(width, height))


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    figure.savefig(unfinished, dpi=110, format=path.suffix.lstrip("."))
    unfinished.replace(path)


_SPOKEN = {
    "torch dense": "torch, dense",
    "torch csr": "torch, sparse CSR",
    "torch int8": "torch, dense int8",
    "scipy csr": "SciPy, sparse CSR",
    "mkl inspector": "MKL, sparse",
    "onnxruntime": "ONNX Runtime, dense",
    "onnxruntime int8": "ONNX Runtime, dense int8",
    "openvino": "OpenVINO, dense",
    "openvino int8": "OpenVINO, dense int8",
    "ours csr": "ours, single weights",
    "layers, unstructured": "ours, layer by layer, single weights",
    "program, unstructured": "ours, one call, single weights",
}


def spoken(name: str) -> str:
    """A contestant's name for a reader who knows none of them: ``"ours bsr 16x1"`` is "ours, 16x1 blocks"."""
    if name in _SPOKEN:
        return _SPOKEN[name]
    for start, words in (("ours bsr ", "ours"), ("layers, ", "ours, layer by layer"), ("program, ", "ours, one call")):
        if name.startswith(start):
            return f"{words}, {name.removeprefix(start)} blocks"
    return name.replace("ours nm ", "ours, ")


def trade_off(
    panels: dict[str, dict[str, tuple[float, float]]],
    path: Path,
    height: str,
    title: str = "",
    log_height: bool = False,
) -> None:
    """panels: label of the logarithmic axis below -> contestant -> (x, y), y one figure of all panels, ``height``. Ours
    are round and coloured; what is in int8 or fewer bits is filled.
    """
    colours = {"ours": _COLOURS[1], "torch": _COLOURS[5], "onnxruntime": _COLOURS[0], "openvino": _COLOURS[2],
               "llama.cpp": _COLOURS[0]}  # fmt: skip
    figure = _figure(6 * len(panels), 5)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (label, found) in zip(axes.flat, panels.items()):
        axis.set_xscale("log")
        axis.set_yscale("log" if log_height else "linear")
        axis.margins(y=0.08)
        low, high = min(x for x, _ in found.values()), max(x for x, _ in found.values())
        axis.set_xlim(low / 1.25, high * 2.2)
        ticks = [step * 10**power for power in range(-1, 5) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if low / 1.25 <= tick <= high * 2.2]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        for name, point in found.items():
            maker = name.split()[0]
            rounded = any(word in name for word in ("int8", "Q8", "Q4", "as it comes"))
            face = colours[maker] if rounded else "white"
            axis.plot(*point, "o" if maker == "ours" else "s", color=colours[maker], markerfacecolor=face, markersize=7)
        axis.set_xlabel(f"{label} (logarithmic)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel(height)
    if log_height:
        low, high = axes[0, 0].get_ylim()
        ticks = [tick for tick in (20, 25, 30, 40, 50, 60, 80, 100) if low <= tick <= high]
        axes[0, 0].set_yticks(ticks, [str(tick) for tick in ticks])
        axes[0, 0].minorticks_off()
    figure.suptitle(f"{title}; red: ours, filled: int8 or fewer bits", fontsize=9)
    figure.tight_layout()
    for axis, found in zip(axes.flat, panels.values()):
        _label(axis, {name: (point, colours[name.split()[0]]) for name, point in found.items()})
    _save(figure, path)


def _label(axis: Any, points: dict[str, tuple[tuple[float, float], str]]) -> None:
    """Writes each name beside its point, where no earlier name and no point is."""
    figure = axis.figure
    figure.canvas.draw()
    taken = []
    for point, _ in points.values():
        x, y = axis.transData.transform(point)
        taken.append((x - 4, y - 4, x + 4, y + 4))
    beside = [(7, -3), (7, 6), (7, -12), (-7, 6), (-7, -12), (-7, -3)]
    beside += [(7, step) for far in range(15, 90, 9) for step in (far, -far - 6)]
    for name, (point, colour) in sorted(points.items(), key=lambda item: -item[1][0][1]):
        look = {"textcoords": "offset points", "fontsize": 7, "color": colour}
        for dx, dy in beside:
            text = axis.annotate(name, point, xytext=(dx, dy), ha="left" if dx > 0 else "right", **look)
            box = text.get_window_extent()
            inside = box.x0 >= axis.bbox.x0 and box.x1 <= axis.bbox.x1
            if inside and not any(box.x0 < c and box.x1 > a and box.y0 < d and box.y1 > b for a, b, c, d in taken):
                break
            text.remove()
        else:
            box = axis.annotate(name, point, xytext=(7, 3), **look).get_window_extent()
        taken.append((box.x0, box.y0, box.x1, box.y1))


def bars(panels: dict[str, dict[str, tuple[float, float]]], path: Path, title: str = "") -> None:
    """panels: title -> contestant -> (ms, times as fast as the first). A bar each, from 0; ours in colour, with its
    ratio.
    """
    rows = max(map(len, panels.values()))
    size = (4.6 * len(panels) + 1.2, 0.38 * rows + 1.3)
    figure = _figure(*size)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axis, (heading, found) in zip(axes.flat, panels.items()):
        ours = [spoken(name).startswith("ours") for name in found]
        times, ratios = zip(*found.values())
        drawn = axis.barh(range(len(times)), times, color=[_COLOURS[1] if own else "#9aa5b1" for own in ours])
        labels = [f"{ms:.3g} ms" + own * f", {ratio:.1f} times" for ms, ratio, own in zip(times, ratios, ours)]
        axis.bar_label(drawn, labels, padding=4, fontsize=9)
        axis.set_yticks(range(len(times)), [spoken(name) for name in found], fontsize=10)
        axis.set_xlim(0, 1.25 * max(times))
        axis.set_title(heading, fontsize=10)
        axis.set_xlabel("ms a batch", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].invert_yaxis()
    if title:
        figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def break_even(sparsities: Sequence[float], ratios: Sequence[float]) -> float | None:
    """The sparsity at which the ratio first rises through 1, log-linear between the points; None where it never does.

    Already above 1 at the lowest sparsity measured: that sparsity.
    """
    points = sorted(zip(sparsities, ratios))
    if not points:
        return None
    if points[0][1] >= 1:
        return points[0][0]
    for (s0, r0), (s1, r1) in itertools.pairwise(points):
        if r0 < 1 <= r1:
            return s0 + (s1 - s0) * -math.log(r0) / (math.log(r1) - math.log(r0))
    return None


def speedup(records: Sequence[Record], path: Path, title: str = "", per_row: int = 3) -> None:
    """One panel a shape and token count: ratio to the baseline over sparsity, quartiles shaded, break-even marked."""
    panels: dict[tuple, dict[str, list[tuple[float, dict[str, float]]]]] = {}
    structures = list(dict.fromkeys(record["case"]["structure"] for record in records))
    for record in records:
        case = case_of(record)
        lines = panels.setdefault((case.shape, case.tokens), {})
        for name, result in record["results"].items():
            if name == record["baseline"] or name.endswith("bfloat16") or (result["ours"] and "int8" in name):
                continue
            if result["ours"] or case.structure == structures[0]:  # a peer is drawn once, on the first structure
                lines.setdefault(name, []).append((case.sparsity, result["ratio"]))
    if not panels:
        raise ValueError("speedup: no record to plot")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    columns = min(per_row, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(3.4 * columns, 2.9 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axis, ((shape, tokens), lines) in zip(axes.flat, panels.items()):
        axis.axhline(1, color="black", linewidth=0.8)
        for name, points in lines.items():
            points = sorted(points, key=lambda point: point[0])
            colour = _COLOURS[names.index(name) % len(_COLOURS)]
            x = [sparsity for sparsity, _ in points]
            median = [ratio["median"] for _, ratio in points]
            ours = name.startswith("ours")
            width = 1.8 if ours else 1.0
            axis.plot(x, median, color=colour, label=spoken(name), linewidth=width, marker="o", markersize=2.5)
            axis.fill_between(
                x, [r["low"] for _, r in points], [r["high"] for _, r in points], color=colour, alpha=0.2, linewidth=0
            )
            crossing = break_even(x, median)
            if ours and crossing is not None and crossing > x[0]:
                axis.plot([crossing], [1], marker="v", color=colour, markersize=7)
                axis.annotate(f"{crossing:.0%}", (crossing, 1), textcoords="offset points", xytext=(0, 6), fontsize=7)
        axis.set_yscale("log")
        axis.set_title(f"{shape[0]}x{shape[1]}, {tokens} token{'s' if tokens != 1 else ''}", fontsize=9)
        axis.grid(alpha=0.3)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axis.tick_params(which="minor", labelsize=7)
        axis.tick_params(labelsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("sparsity (share of zeros)", fontsize=9)
    figure.supylabel("speed-up over torch dense", fontsize=9)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    if title:
        figure.suptitle(title, fontsize=10)
    height = 0.25 * math.ceil(len(labels) / 4) / figure.get_figheight()
    figure.tight_layout(rect=(0, height, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncol=min(len(labels), 4), fontsize=8, frameon=False)
    _save(figure, path)


def roofline(records: Sequence[Record], peaks: dict[str, Any], path: Path, title: str = "") -> None:
    """Ours with float32 values, each contestant a point: GFLOP/s over flops a byte, under the machine's measured roofs.

    ``peaks``: :meth:`Peaks.to_dict`.
    """
    figure = _figure(7.2, 4.2)
    axis = figure.subplots()
    low, high = 0.05, 300.0
    xs = [low * (high / low) ** (i / 200) for i in range(201)]
    bandwidths = peaks["read_gbs"]
    for size, style in (("16 KiB", ":"), ("512 KiB", "-."), ("4096 KiB", "--"), ("262144 KiB", "-")):
        if size in bandwidths:
            rate = bandwidths[size]
            axis.plot(
                xs, [min(rate * x, peaks["fma_gflops"]) for x in xs], style, color="#999999", linewidth=0.9,
                label=f"{rate:.0f} GB/s, {size} read",
            )  # fmt: skip
    axis.axhline(peaks["l1_fma_gflops"], color="#d1495b", linewidth=0.9)
    axis.annotate("one L1 load a multiply-add", (low, peaks["l1_fma_gflops"]), fontsize=7, va="bottom", color="#d1495b")
    axis.annotate("multiply-adds", (low, peaks["fma_gflops"]), fontsize=7, va="bottom", color="#666666")
    colours: dict[str, str] = {}
    markers: dict[int, str] = {}
    for record in records:
        tokens = case_of(record).tokens
        for name, result in record["results"].items():
            if not result["ours"] or "gflops" not in result or "bytes" not in result or not result["flops"]:
                continue
            if name.endswith(("bfloat16", "int8")):
                continue
            colour = colours.setdefault(name, _COLOURS[len(colours) % len(_COLOURS)])
            marker = markers.setdefault(tokens, "os^vD"[len(markers) % 5])
            point = [result["flops"] / result["bytes"]], [result["gflops"]]
            axis.plot(*point, marker, color=colour, markersize=4, alpha=0.7, label=f"_{name}, N={tokens}")
    for name, colour in colours.items():
        axis.plot([], [], "o", color=colour, markersize=4, label=spoken(name))
    for tokens, marker in sorted(markers.items()):
        axis.plot([], [], marker, color="#666666", markersize=4, label=f"N = {tokens}")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(1, peaks["fma_gflops"] * 1.6)
    axis.set_xlabel("floating point operations on kept weights a byte")
    axis.set_ylabel("GFLOP/s on kept weights")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    _save(figure, path)
