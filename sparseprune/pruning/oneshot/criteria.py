"""The criteria ``wanda``, ``sparsegpt`` and ``best`` of ``prune_(..., data=calibration)``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..allocation import kept_count, weighted_counts
from ..criteria import Criterion, PruneContext, register_criterion
from ..granularity import NM, Block, Element
from ..masks import MaskSet
from .allocation import owl_densities, score_densities
from .calibration import Batch, calibration_batches
from .driver import Method, Progress, walk
from .methods import ADMMMethod, SparseGPTMethod, WandaMethod
from .patterns import Pattern

__all__ = ["Best", "OneShotCriterion", "SparseGPT", "Wanda"]

ALLOCATIONS = ("uniform", "owl", "score")


class OneShotCriterion(Criterion):
    """Base of the criteria that prune layer by layer from calibration data.

    ``prune_`` passes ``criterion_options`` to the constructor. Common to all:

    per_row: keep the same count in every output row (Wanda's default) instead of comparing within a layer. allocation:
    "uniform" (every layer the same share), "owl" (more where inputs have outliers) or "score" (layers compete by their
    Wanda scores); the total is exact with each. ``prune_``'s own ``densities`` take its place, and ``scope="layer"``
    rounds in every layer by itself. owl: {"threshold": 5.0, "spread": 0.08} for "owl". chunk_tokens: positions in one
    forward pass. min_tokens: the least calibration data accepted; by default as many positions as the widest layer has
    inputs (an eighth of it for Wanda). spill: a folder for the hidden states and, with weights on the CPU, statistics,
    moments and solvers' copies, which are then not in memory; True: the system's temporary folder, False or None: in
    memory. The replaced weights wait in files in any case. state: a folder in which finished blocks are kept, so that a
    killed run goes on; what is temporary is then there too, and a run that goes on removes what the killed one left.
    progress: called with a `Progress` after each block.
    """

    needs_data = True
    needs_hessian = True

    def __init__(
        self,
        *,
        per_row: bool = False,
        allocation: str = "uniform",
        owl: Mapping[str, float] | None = None,
        chunk_tokens: int = 512,
        min_tokens: int | None = None,
        spill: bool | str | os.PathLike[str] | None = True,
        state: str | os.PathLike[str] | None = None,
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        if allocation not in ALLOCATIONS:
            raise ValueError(f"{self.name}: allocation expected one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
        if chunk_tokens < 1:
            raise ValueError(f"{self.name}: chunk_tokens expected at least 1, got {chunk_tokens}")
        for option, place in (("spill", None if isinstance(spill, bool) else spill), ("state", state)):
            if place is not None and (not isinstance(place, str | os.PathLike) or os.path.isfile(place)):
                expected = "a folder, True, False or None" if option == "spill" else "a folder or None"
                got = f"{place!r}{', which is a file' if isinstance(place, str | os.PathLike) else ''}"
                raise ValueError(
                    f"{self.name}: {option} expected {expected}, got {got}; a folder that is not there is made"
                )
        self.per_row = per_row
        self.allocation = allocation
        self.owl = dict(owl or {})
        self.chunk_tokens = chunk_tokens
        self.min_tokens = min_tokens
        self.spill = False if spill is None else spill
        self.state = state
        self.progress = progress

    def method(self) -> Method:
        raise NotImplementedError(f"{type(self).__name__} must define method()")

    def options(self) -> dict[str, Any]:
        """What decides the result, for the folder of a run."""
        return {"criterion": self.name, "per_row": self.per_row, "allocation": self.allocation, "owl": self.owl}

    def _batches(self, context: PruneContext) -> list[Batch]:
        widest = max(linear.in_features for linear in context.layers.values())
        needed = self.min_tokens if self.min_tokens is not None else (widest if self.needs_hessian else -(-widest // 8))
        batches = calibration_batches(context.data, context.model, max(1, needed), self.chunk_tokens)
        device = next(context.model.parameters()).device
        return [batch.to(device) for batch in batches]

    def _patterns(self, context: PruneContext) -> dict[str, Pattern]:
        patterns: dict[str, Pattern] = {}
        for part in context.plan.parts:
            kind = part.granularity
            if isinstance(kind, Element):
                pattern = Pattern()
            elif isinstance(kind, Block):
                pattern = Pattern("block", r=kind.r, c=kind.c)
            elif isinstance(kind, NM):
                # On the way of a gradual run: the smallest n that holds the density asked for.
                n = min(kind.m, max(kind.n, math.ceil((1 - context.sparsity) * kind.m - 1e-9)))
                pattern = Pattern("nm", n=n, m=kind.m)
            else:
                raise ValueError(
                    f"{self.name}: works on Element(), Block(r, c) and NM(n, m), got {kind!r}; "
                    'criterion="magnitude" takes the others'
                )
            patterns.update(dict.fromkeys(part.layers, pattern))
        return patterns

    def _keep(
        self, context: PruneContext, patterns: Mapping[str, Pattern], batches: list[Batch]
    ) -> dict[str, int]:
        """Units kept in each layer, exact in every part of the plan."""
        keep: dict[str, int] = {}
        shares: Mapping[str, float] | None = context.plan.densities
        free = [f for f, pattern in patterns.items() if pattern.kind != "nm"]
        if shares is None and self.allocation != "uniform" and context.plan.scope == "global" and free:
            linears = {f: context.layers[f] for f in free}
            if self.allocation == "owl":
                shares = owl_densities(context.model, linears, batches, 1 - context.sparsity, **self.owl)
            else:
                shares = score_densities(context.model, linears, batches, 1 - context.sparsity)
        for part in context.plan.parts:
            names = list(part.layers)
            units = [patterns[f].units(context.layers[f].weight.shape) for f in names]
            if isinstance(part.granularity, NM):
                counts = [u * patterns[f].n // patterns[f].m for u, f in zip(units, names)]
            elif shares is not None:
                counts = weighted_counts(units, context.sparsity, [shares[f] for f in names])
            elif context.plan.scope == "layer":
                counts = [kept_count(u, context.sparsity) for u in units]
            else:
                counts = weighted_counts(units, context.sparsity, [1.0] * len(units))
            keep.update(zip(names, counts))
        return keep

    def masks(self, context: PruneContext) -> Mapping[str, Tensor]:
        batches = self._batches(context)
        patterns = self._patterns(context)
        keep = self._keep(context, patterns, batches)
        found: dict[str, MaskSet] = {}

        def deliver(fqn: str, mask: Tensor) -> None:
            found[fqn] = MaskSet({fqn: mask.to(context.layers[fqn].weight.device)})

        walk(
            context.model,
            context.layers,
            batches,
            self.method(),
            keep,
            patterns,
            scope="row" if self.per_row else "layer",
            spill=self.spill,
            state=self.state,
            identity={**self.options(), "patterns": {f: repr(p) for f, p in patterns.items()}},
            progress=self.progress,
            deliver=deliver,
        )
        return MaskSet.joined(found[fqn] for fqn in context.layers)


class Wanda(OneShotCriterion):
    """|w| * ||x||_2 (Sun et al., 2023): the same count in every row, unless per_row=False."""

    name = "wanda"
    needs_hessian = False

    def __init__(self, *, per_row: bool = True, **common: Any) -> None:
        super().__init__(per_row=per_row, **common)

    def method(self) -> Method:
        return WandaMethod()


class SparseGPT(OneShotCriterion):
    """Optimal-brain-surgeon pruning with weight updates (Frantar and Alistarh, 2023).

    damping: share of the mean of the Hessian's diagonal added to it. blocksize: columns whose mask is chosen at once.
    """

    name = "sparsegpt"

    def __init__(self, *, damping: float = 0.01, blocksize: int = 128, **common: Any) -> None:
        super().__init__(**common)
        if not damping > 0:
            raise ValueError(f"{self.name}: damping expected above 0, got {damping}")
        if blocksize < 1:
            raise ValueError(f"{self.name}: blocksize expected at least 1, got {blocksize}")
        self.damping = damping
        self.blocksize = blocksize

    def options(self) -> dict[str, Any]:
        return {**super().options(), "damping": self.damping, "blocksize": self.blocksize}

    def method(self) -> Method:
        return SparseGPTMethod(self.damping, self.blocksize)


class Best(SparseGPT):
    """What kept most of a language model within minutes (docs/oneshot.md): ADMM on each layer's loss, mask and weights
    together, started from SparseGPT, conjugate gradients on the final mask, and then every block trained on its masks
    to give the dense model's outputs.

    damping and blocksize as for SparseGPT; polish: conjugate-gradient iterations at the end; epochs: of that training
    over the data, 0 for none; rate: its first steps, as a share of the root mean square of a layer's kept weights.
    """

    name = "best"

    def __init__(self, *, polish: int = 8, epochs: int = 1, rate: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        if polish < 0:
            raise ValueError(f"best: polish expected at least 0, got {polish}")
        if epochs < 0 or not rate > 0:
            raise ValueError(f"best: expected epochs of at least 0 and a rate above 0, got {epochs} and {rate}")
        self.polish = polish
        self.epochs = epochs
        self.rate = rate

    def options(self) -> dict[str, Any]:
        return {**super().options(), "polish": self.polish, "epochs": self.epochs, "rate": self.rate}

    def method(self) -> Method:
        return ADMMMethod(
            self.damping, self.blocksize, teacher=self.epochs > 0, polish=self.polish, epochs=self.epochs,
            rate=self.rate,
        )  # fmt: skip


register_criterion("wanda", Wanda)
register_criterion("sparsegpt", SparseGPT)
register_criterion("best", Best)
