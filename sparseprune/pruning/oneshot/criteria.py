"""The criteria ``wanda``, ``sparsegpt`` and ``admm`` of ``prune_(..., data=calibration)``."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from ..._files import holding
from ..batches import Batch
from ..counts import kept_count, weighted_counts
from ..criteria import Criterion, PruneContext, register_criterion
from ..granularity import NM, InWeight
from ..masks import MaskSet
from .calibration import calibration_batches
from .densities import owl_densities, score_densities
from .driver import Progress, Solver, prune_blocks_
from .solvers import ADMMSolver, SparseGPTSolver, WandaSolver

__all__ = ["ADMM", "OneShotCriterion", "SparseGPT", "Wanda"]

ALLOCATIONS = ("uniform", "owl", "score")
# Arguments that say how a run goes and not what it gives: a run that is resumed may have others.
_ASIDE = frozenset({"chunk_tokens", "min_tokens", "spill", "state", "progress", "small_heap"})
_ANOTHER = "wait for it, or name another folder as state, one for each run and each process"


class OneShotCriterion(Criterion):
    """Base of the criteria that prune layer by layer from calibration data. A subclass defines :meth:`solver`, and
    keeps every argument of its constructor as an attribute of the same name.

    ``prune_`` passes ``criterion_options`` to the constructor. Common to all:

    per_row: keep the same count in every output row (Wanda's default) instead of comparing within a layer. allocation:
    "uniform" (every layer the same share), "owl" (more where inputs have outliers) or "score" (layers compete by their
    Wanda scores); the total is exact with each. ``prune_``'s own ``densities`` take its place, and ``scope="layer"``
    rounds in every layer by itself. owl: {"threshold": 5.0, "spread": 0.08} for "owl". chunk_tokens: positions in one
    forward pass. min_tokens: the least calibration data accepted; by default as many positions as the widest layer has
    inputs (an eighth of it for Wanda). spill: a folder for the hidden states and, with weights on the CPU, statistics,
    moments and solvers' copies, which are then not in memory; True: the system's temporary folder, False or None: in
    memory. The replaced weights wait in files in any case. state: a folder in which finished blocks are kept, so that a
    killed run goes on; what is temporary is then there too, and a run that goes on removes what the killed one left. It
    holds one run at a time: BlockingIOError for a second one.
    progress: called with a `Progress` after each block. small_heap: while it runs, glibc hands every large block of
    memory back at once, in the whole process: less memory, a little slower, and glibc adjusts those limits itself no
    more.
    """

    needs_data = True

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
        small_heap: bool = False,
    ) -> None:
        if allocation not in ALLOCATIONS:
            raise ValueError(f"{self.name}: allocation expected one of {', '.join(ALLOCATIONS)}, got {allocation!r}")
        if chunk_tokens < 1:
            raise ValueError(f"{self.name}: chunk_tokens expected at least 1, got {chunk_tokens}")
        spill = os.path.expanduser(spill) if isinstance(spill, str | os.PathLike) else spill
        state = os.path.expanduser(state) if isinstance(state, str | os.PathLike) else state
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
        self.small_heap = small_heap

    def solver(self) -> Solver:
        raise NotImplementedError(f"{type(self).__name__} must define solver()")

    def options(self) -> dict[str, Any]:
        """What decides the result, for the folder of a run: the constructor's arguments, those of all its classes.

        TypeError where one is not an attribute of its name: a resume could not see that it has another value.
        """
        found: dict[str, Any] = {"criterion": self.name}
        for base in type(self).__mro__:
            constructor = vars(base).get("__init__")
            if constructor is None or not issubclass(base, OneShotCriterion):
                continue
            for name, parameter in list(inspect.signature(constructor).parameters.items())[1:]:
                if name in _ASIDE or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                    continue
                if not hasattr(self, name):
                    raise TypeError(
                        f"{base.__name__}: the argument {name!r} expected as an attribute of the same name, got none; "
                        f"set self.{name} in the constructor, so that a resumed run can be compared with it"
                    )
                found[name] = getattr(self, name)
        return found

    def _batches(self, context: PruneContext) -> list[Batch]:
        widest = max(linear.in_features for linear in context.layers.values())
        needed = self.min_tokens
        if needed is None:
            needed = widest if self.solver().needs_hessian else -(-widest // 8)
        batches = calibration_batches(context.data, context.model, max(1, needed), self.chunk_tokens)
        device = next(context.model.parameters()).device
        return [batch.to(device) for batch in batches]

    def _patterns(self, context: PruneContext) -> dict[str, InWeight]:
        patterns: dict[str, InWeight] = {}
        for part in context.plan.parts:
            kind = part.granularity
            if isinstance(kind, NM):  # on the way of a gradual run: the smallest n that holds the density asked for
                pattern: InWeight = kind.at_density(1 - context.sparsity)
            elif isinstance(kind, InWeight):
                pattern = kind
            else:
                raise ValueError(
                    f"{self.name}: works on Element(), Block(r, c) and NM(n, m), got {kind!r}; "
                    'criterion="magnitude" takes the others'
                )
            patterns.update(dict.fromkeys(part.layers, pattern))
        return patterns

    def _keep(
        self, context: PruneContext, patterns: Mapping[str, InWeight], batches: list[Batch]
    ) -> dict[str, int]:
        """Units kept in each layer, exact in every part of the plan."""
        keep: dict[str, int] = {}
        shares: Mapping[str, float] | None = context.plan.densities
        free = [f for f, pattern in patterns.items() if not isinstance(pattern, NM)]
        if shares is None and self.allocation != "uniform" and context.plan.scope == "global" and free:
            linears = {f: context.layers[f] for f in free}
            if self.allocation == "owl":
                shares = owl_densities(context.model, linears, batches, 1 - context.sparsity, **self.owl)
            else:
                shares = score_densities(context.model, linears, batches, 1 - context.sparsity)
        for part in context.plan.parts:
            names = list(part.layers)
            units = [patterns[f].count(context.layers[f].weight.shape) for f in names]
            if isinstance(part.granularity, NM):
                n = part.granularity.at_density(1 - context.sparsity).n
                counts = [u * n // part.granularity.m for u in units]
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

        def take(fqn: str, mask: Tensor) -> None:
            found[fqn] = MaskSet({fqn: mask.to(context.layers[fqn].weight.device)})

        here = nullcontext() if self.state is None else holding(self.state, _ANOTHER, warnings.warn)
        with here:
            prune_blocks_(
                context.model,
                context.layers,
                batches,
                self.solver(),
                keep,
                patterns,
                scope="row" if self.per_row else "layer",
                spill=self.spill,
                small_heap=self.small_heap,
                state=self.state,
                identity={**self.options(), "patterns": {f: repr(p) for f, p in patterns.items()}},
                progress=self.progress,
                take=take,
            )
        return MaskSet.joined(found[fqn] for fqn in context.layers)


class Wanda(OneShotCriterion):
    """|w| * ||x||_2 (Sun et al., 2023): the same count in every row, unless per_row=False."""

    name = "wanda"

    def __init__(self, *, per_row: bool = True, **common: Any) -> None:
        super().__init__(per_row=per_row, **common)

    def solver(self) -> Solver:
        return WandaSolver()


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

    def solver(self) -> Solver:
        return SparseGPTSolver(self.damping, self.blocksize)


class ADMM(SparseGPT):
    """What kept most of a language model within minutes (docs/lab/oneshot.md): ADMM on each layer's loss, mask and
    weights together, started from SparseGPT, conjugate gradients on the final mask, and then every block trained on its
    masks to give the dense model's outputs.

    damping and blocksize as for SparseGPT; polish: conjugate-gradient iterations at the end; epochs: of that training
    over the data, 0 for none; rate: its first steps, as a share of the root mean square of a layer's kept weights.
    """

    name = "admm"

    def __init__(self, *, polish: int = 8, epochs: int = 1, rate: float = 0.01, **options: Any) -> None:
        super().__init__(**options)
        if polish < 0:
            raise ValueError(f"admm: polish expected at least 0, got {polish}")
        if epochs < 0 or not rate > 0:
            raise ValueError(f"admm: expected epochs of at least 0 and a rate above 0, got {epochs} and {rate}")
        self.polish = polish
        self.epochs = epochs
        self.rate = rate

    def solver(self) -> Solver:
        return ADMMSolver(
            self.damping, self.blocksize, teacher=self.epochs > 0, polish=self.polish, epochs=self.epochs,
            rate=self.rate,
        )  # fmt: skip


register_criterion("wanda", Wanda)
register_criterion("sparsegpt", SparseGPT)
register_criterion("admm", ADMM)
