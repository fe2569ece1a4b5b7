"""The pictures of a run. Imports matplotlib, so it is imported only where one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .._files import replacing
from .display import kept_in_words

__all__ = ["draw"]

INK, DENSE, PRUNED, THIRD = "#22303c", "#7a8794", "#c8452f", "#2f6f8f"


def draw(folder: Path, history: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Draws curves.png, layers.png, tradeoff.png and, where it was judged, robustness.png into ``folder``; returns
    their names.
    """
    pictures = {
        "curves.png": _curves(history),
        "layers.png": _layers(record),
        "tradeoff.png": _tradeoff(record),
    }
    if record.get("robustness"):
        pictures["robustness.png"] = _robustness(record["robustness"])
    for name, figure in pictures.items():
        with replacing(folder / name) as unfinished:
            figure.savefig(unfinished, dpi=120, bbox_inches="tight", format="png")
    return list(pictures)


def _smooth(values: list[float], width: int) -> list[float]:
    """Running mean over the last ``width`` values."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= width:
            total -= values[i - width]
        out.append(total / min(i + 1, width))
    return out


def _clean(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _curves(history: dict[str, Any]) -> Any:
    steps = history["steps"]
    x = [s["step"] for s in steps]
    width = max(1, len(steps) // 60)
    has_game = any("discriminator_accuracy" in s for s in steps)
    figure = Figure(figsize=(8, 8 if has_game else 5.5))
    axes = figure.subplots(3 if has_game else 2, 1, sharex=True)
    frozen = next((e["step"] for e in history["events"] if e["event"] == "masks frozen"), None)
    for key, colour in (("loss", INK), ("ce", DENSE), ("kd", PRUNED), ("hidden", THIRD)):
        if steps and key in steps[0]:
            axes[0].plot(x, _smooth([s[key] for s in steps], width), color=colour, label=key, linewidth=1.3)
    axes[0].set_ylabel("loss (running mean)")
    axes[0].set_yscale("log")
    axes[0].set_ylim(bottom=max(1e-3, axes[0].get_ylim()[0]))  # the student starts as the teacher: losses of 0
    axes[0].legend(frameon=False, ncol=4)
    axes[1].plot(x, [s["density"] for s in steps], color=PRUNED, linewidth=1.6, label="density in use (U)")
    points = history["evaluations"]
    if points and "accuracy" in points[0]:
        axes[1].plot([p["step"] for p in points], [p["accuracy"] for p in points], "o-", color=INK, markersize=4,
                     linewidth=1, label="validation accuracy")  # fmt: skip
    axes[1].set_ylim(0, 1.02)
    axes[1].legend(frameon=False, loc="center right")
    if has_game:
        game = [s for s in steps if "discriminator_accuracy" in s]
        at = [s["step"] for s in game]
        axes[2].plot(
            at, [s["discriminator_accuracy"] for s in game], color=THIRD, label="discriminator accuracy (mean)"
        )
        axes[2].plot(at, _smooth([s["discriminator_loss"] for s in game], width), color=DENSE, linewidth=1,
                     label="discriminator loss")  # fmt: skip
        axes[2].plot(at, [s["weight"] for s in game], color=PRUNED, linewidth=1, label="adversarial weight")
        axes[2].axhline(0.5, color=INK, linewidth=0.7, linestyle=":")
        axes[2].legend(frameon=False)
    for axis in axes:
        _clean(axis)
        if frozen is not None:
            axis.axvline(frozen, color=INK, linewidth=0.8, linestyle="--")
    if frozen is not None:
        axes[0].annotate("masks frozen", (frozen, axes[0].get_ylim()[1]), xytext=(4, -10), textcoords="offset points",
                         fontsize=8, color=INK)  # fmt: skip
    axes[-1].set_xlabel("step")
    return figure


def _layers(record: dict[str, Any]) -> Any:
    names = list(record["layers"])
    values = [1 - record["layers"][name] for name in names]
    figure = Figure(figsize=(8, max(2.5, 0.28 * len(names) + 1)))
    axis = figure.subplots()
    axis.barh(range(len(names)), values, color=PRUNED, height=0.7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0.0, 1.0)
    axis.axvline(1 - record["density"], color=INK, linestyle="--", linewidth=1)
    axis.set_xlabel(f"sparsity per layer (dashed: {1 - record['density']:.3f} over all)")
    _clean(axis)
    return figure


def _tradeoff(record: dict[str, Any]) -> Any:
    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    points = [("dense", DENSE, record["dense"]), ("pruned", PRUNED, record["pruned"])]
    for name, colour, figures in points:
        x, y = figures["latency_ms"], figures["test"]["accuracy"]
        axis.scatter([x], [y], s=90, color=colour, zorder=3)
        axis.annotate(f"{name}\n{y:.1%}, {x:.1f} ms, {figures['bytes'] / 2**20:.1f} MiB", (x, y), xytext=(0, -30),
                      textcoords="offset points", ha="center", fontsize=9, color=INK)  # fmt: skip
    accuracies = [figures["test"]["accuracy"] for _, _, figures in points]
    latest = max(figures["latency_ms"] for _, _, figures in points)
    axis.set_xlim(0, latest * 1.3)
    axis.set_ylim(max(0.0, min(accuracies) - 0.1), min(1.0, max(accuracies) + 0.05))
    axis.set_xlabel(f"latency of one batch, {' x '.join(map(str, record['latency_batch']))} tokens, ms")
    axis.set_ylabel("test accuracy")
    axis.set_title(
        f"{record['speedup']:.2f} times as fast, {kept_in_words(record)} of the accuracy kept", fontsize=11
    )
    _clean(axis)
    return figure


def _robustness(found: dict[str, Any]) -> Any:
    figure = Figure(figsize=(7, 0.5 * len(found) + 1))
    axis = figure.subplots()
    for i, entry in enumerate(found.values()):
        axis.plot([entry["dense"], entry["pruned"]], [i, i], color=INK, linewidth=1, zorder=1)
        for which, colour in (("dense", DENSE), ("pruned", PRUNED)):
            axis.scatter([entry[which]], [i], s=60, color=colour, zorder=2, label=which if i == 0 else None)
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy")
    axis.legend(frameon=False)
    _clean(axis)
    return figure
