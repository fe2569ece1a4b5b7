"""How much of each layer stays: by outliers (OWL), by the scores themselves, or by measured sensitivity.

Each gives relative densities, fqn -> number; the counts made from them (`counts.weighted_counts`) are exact in the
total.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..._files import replacing
from ..batches import Batch
from ..positions import Positions, decoder_of
from .calibration import calibration_batches
from .choosing import select
from .repeated import calibrating, find_stacks
from .solvers import wanda_scores
from .statistics import collect

__all__ = ["Sensitivity", "block_of", "owl_densities", "score_densities", "sensitivity"]


def block_of(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """fqn -> the name of the repeated block it lies in, or its own fqn."""
    names = [name for stack in find_stacks(model, linears) for name in stack.names]
    found = {}
    for fqn in linears:
        found[fqn] = next((n for n in names if fqn == n or fqn.startswith(n + ".")), fqn)
    return found


def _dense_squares(model: nn.Module, linears: Mapping[str, nn.Linear], data: Any) -> dict[str, Tensor]:
    """fqn -> mean x^2 `[K]` of the dense model's inputs: one forward pass over the data, K numbers a layer."""
    made = isinstance(data, list) and bool(data) and isinstance(data[0], Batch)
    batches = data if made else calibration_batches(data, model, 1)
    with calibrating(model), torch.no_grad():
        decoder = decoder_of(model)
        runs = ((partial(b.call, model), Positions.of(b, decoder)) for b in batches)
        groups = collect(runs, linears, hessian=False)
    return {fqn: group.squares for group in groups for fqn in group.names}


def owl_densities(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    data: Any,
    density: float,
    *,
    threshold: float = 5.0,
    spread: float = 0.08,
) -> dict[str, float]:
    """fqn -> density, the same within a block, more where more Wanda scores exceed threshold times the layer's mean.

    After Yin et al. 2023 (OWL): outlier shares are scaled linearly into [-spread, +spread] around their mean and added
    to the density, spread narrowed where it would pass 0 or 1.
    """
    squares = _dense_squares(model, linears, data)
    blocks = block_of(model, linears)
    outliers: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for fqn, linear in linears.items():
        scores = wanda_scores(linear.weight, squares[fqn].to(linear.weight.device))
        count = int((scores > threshold * scores.mean()).sum())
        outliers[blocks[fqn]] = outliers.get(blocks[fqn], 0) + count
        sizes[blocks[fqn]] = sizes.get(blocks[fqn], 0) + scores.numel()
    share = {b: outliers[b] / sizes[b] for b in outliers}
    low, high = min(share.values()), max(share.values())
    if high == low:
        return dict.fromkeys(linears, density)
    spread = max(0.0, min(spread, density / 2, (1 - density) / 2))
    scaled = {b: (v - low) / (high - low) * 2 * spread for b, v in share.items()}
    mean = sum(scaled[b] * sizes[b] for b in scaled) / sum(sizes.values())
    return {fqn: density + scaled[blocks[fqn]] - mean for fqn in linears}


def score_densities(
    model: nn.Module, linears: Mapping[str, nn.Linear], data: Any, density: float
) -> dict[str, float]:
    """fqn -> the share each layer keeps when all Wanda scores of the dense model compete for the places.

    The threshold is found by bisection on its bits, the scores of one layer at a time, so that no more than a layer's
    worth of scores is ever held.
    """
    squares = _dense_squares(model, linears, data)

    def scores(fqn: str) -> Tensor:
        weight = linears[fqn].weight
        return wanda_scores(weight, squares[fqn].to(weight.device))

    total = sum(linear.weight.numel() for linear in linears.values())
    target = round(density * total)
    low, high = 0, 0x7F800000  # the bits of 0.0 and of infinity order like the floats
    while high - low > 1:
        middle = (low + high) // 2
        threshold = torch.tensor(middle, dtype=torch.int32).view(torch.float32).item()
        if sum(int((scores(f) >= threshold).sum()) for f in linears) >= target:
            low = middle
        else:
            high = middle
    threshold = torch.tensor(low, dtype=torch.int32).view(torch.float32).item()
    return {f: int((scores(f) >= threshold).sum()) / linears[f].weight.numel() for f in linears}


@dataclass(frozen=True)
class Sensitivity:
    """losses: group (block or layer) -> density -> loss of the model with only that group pruned; dense: loss unpruned.

    sizes: group -> weights in it; members: group -> fqns. Losses are what `loss` returned, for a language model the
    mean cross-entropy in nats.
    """

    dense: float
    losses: dict[str, dict[float, float]]
    sizes: dict[str, int]
    members: dict[str, tuple[str, ...]]

    def table(self) -> str:
        """One line a group, the rise of the loss at each density."""
        densities = sorted({d for row in self.losses.values() for d in row}, reverse=True)
        width = max(len("group"), *(len(g) for g in self.losses))
        lines = [f"{'group':<{width}}  {'weights':>12}  " + "  ".join(f"d={d:<6.2f}" for d in densities)]
        for group, row in self.losses.items():
            cells = "  ".join(f"{row[d] - self.dense:+8.4f}" for d in densities)
            lines.append(f"{group:<{width}}  {self.sizes[group]:>12,}  {cells}")
        lines.append(f"loss of the dense model {self.dense:.4f}; cells: rise of the loss with only that group pruned")
        return "\n".join(lines)

    def suggest(self, density: float) -> dict[str, float]:
        """Densities, fqn -> number, whose weighted mean is density: pass them to ``prune_(..., densities=...)``.

        The measured rises are made monotone and convex in the density, then weights are given where a weight lowers
        the summed loss most (greedy on convex curves, which is optimal for the sum). All but one group therefore lie at
        a measured density: measure some on both sides of the budget, since below the lowest all are scaled alike.
        """
        if not 0 <= density <= 1:
            raise ValueError(f"suggest: density expected in [0, 1], got {density}")
        segments: list[tuple[float, str, float]] = []
        start: dict[str, float] = {}
        for group, row in self.losses.items():
            points = sorted({**row, 1.0: self.dense}.items())
            hull = _convex(points)
            start[group] = hull[0][0]
            for (d0, l0), (d1, l1) in itertools.pairwise(hull):
                segments.append(((l0 - l1) / (d1 - d0) / max(1, self.sizes[group]), group, d1 - d0))
        total = sum(self.sizes.values())
        chosen = dict(start)
        budget = density * total - sum(start[g] * self.sizes[g] for g in start)
        if budget < 0:  # below what was measured: the lowest measured densities, scaled
            scale = density * total / max(1e-12, sum(start[g] * self.sizes[g] for g in start))
            chosen = {g: d * scale for g, d in start.items()}
        for _, group, width in sorted(segments, key=lambda s: -s[0]):
            if budget <= 0:
                break
            step = min(width, budget / self.sizes[group])
            chosen[group] += step
            budget -= step * self.sizes[group]
        return {fqn: min(1.0, chosen[group]) for group, fqns in self.members.items() for fqn in fqns}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A heat map of the rises as PNG or SVG. Needs matplotlib."""
        try:
            from matplotlib import colors
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Sensitivity.plot needs matplotlib; pip install 'sparseprune[plot]'") from error

        densities = sorted({d for row in self.losses.values() for d in row}, reverse=True)
        groups = list(self.losses)
        values = [[max(0.0, self.losses[g][d] - self.dense) for d in densities] for g in groups]
        figure = Figure(figsize=(2 + 0.9 * len(densities), 1.5 + 0.22 * len(groups)))
        axes = figure.subplots()
        # By the square root: the first and the last block often cost ten times what the others do.
        image = axes.imshow(values, aspect="auto", cmap="viridis", norm=colors.PowerNorm(0.5, vmin=0.0))
        axes.set_xticks(range(len(densities)), [f"{d:g}" for d in densities])
        axes.set_yticks(range(len(groups)), groups, fontsize=7)
        axes.set_xlabel("density of this group alone")
        figure.colorbar(image, label="rise of the loss")
        figure.tight_layout()
        with replacing(path) as temporary:
            figure.savefig(temporary)


def _convex(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """points (density, loss), ascending; losses made non-increasing, then the lower convex hull."""
    best = math.inf
    monotone = []
    for d, loss in points:
        best = min(best, loss)
        monotone.append((d, best))
    hull: list[tuple[float, float]] = []
    for point in monotone:
        while len(hull) >= 2:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (point[0] - x0) >= (point[1] - y0) * (x1 - x0):
                hull.pop()
            else:
                break
        hull.append(point)
    return hull


def sensitivity(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    data: Any,
    loss: Callable[[nn.Module], float],
    *,
    densities: Sequence[float] = (0.7, 0.5, 0.3),
    by: str = "block",
    progress: Callable[[str, float, float], None] | None = None,
) -> Sensitivity:
    """Prunes one group at a time by Wanda scores of the dense model, measures loss(model), and puts the weights back.

    linears: fqn -> Linear; data: as `calibration_batches` takes it; by: "block" (the repeated blocks) or "layer";
    loss: e.g. the log of `perplexity`. Costs groups x densities evaluations. progress(group, density, loss) after
    each. The model is left as it was, on errors too.
    """
    if by not in ("block", "layer"):
        raise ValueError(f"sensitivity: by expected 'block' or 'layer', got {by!r}")
    for density in densities:
        if not 0 <= density <= 1:
            raise ValueError(f"sensitivity: densities expected in [0, 1], got {density}")
    squares = _dense_squares(model, linears, data)
    names = block_of(model, linears) if by == "block" else {fqn: fqn for fqn in linears}
    members: dict[str, list[str]] = {}
    for fqn in linears:
        members.setdefault(names[fqn], []).append(fqn)
    dense = loss(model)
    losses: dict[str, dict[float, float]] = {}
    for group, fqns in members.items():
        originals = {fqn: linears[fqn].weight.detach().clone() for fqn in fqns}
        losses[group] = {}
        try:
            for density in densities:
                with torch.no_grad():
                    for fqn, original in originals.items():
                        scores = wanda_scores(original, squares[fqn].to(original.device))
                        mask = select(scores, round(density * scores.numel()))
                        linears[fqn].weight.copy_(original.masked_fill(~mask, 0))
                losses[group][density] = loss(model)
                if progress is not None:
                    progress(group, density, losses[group][density])
        finally:
            with torch.no_grad():
                for fqn, original in originals.items():
                    linears[fqn].weight.copy_(original)
    sizes = {g: sum(linears[f].weight.numel() for f in fqns) for g, fqns in members.items()}
    return Sensitivity(dense, losses, sizes, {g: tuple(f) for g, f in members.items()})


