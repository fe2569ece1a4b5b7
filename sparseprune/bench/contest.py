"""One op of ours beside its dense baseline and its peers: what a contest is, and what all of them need."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import _native, backends
from .peaks import Work

__all__ = ["BASELINE", "Case", "Contest", "Entry", "Suite", "add_ours_", "close_to", "generator_of", "runs_native"]

BASELINE = "torch dense"


@dataclass(frozen=True)
class Case:
    """One row of a table. ``shape``: (out, in) of a Linear, or (n,) of a flat tensor; ``structure``: what was pruned
    together: ``element``, ``RxC`` blocks or ``N:M``; ``tokens``: rows of x (0 where there are none).
    """

    suite: str
    shape: tuple[int, ...]
    sparsity: float = 0.0
    structure: str = "element"
    tokens: int = 0

    @property
    def label(self) -> str:
        parts = ["x".join(str(size) for size in self.shape)]
        if self.tokens:
            parts.append(f"N={self.tokens}")
        if self.sparsity:
            parts.append(f"{self.structure} {self.sparsity:.0%}")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Entry:
    """One contestant: ``run()`` is timed; ``check()`` returns None when its result is right, else what is wrong;
    ``work``: what the call cannot avoid; ``kept_flops``: 2 a kept weight and token, for GFLOP/s on kept weights;
    ``ours``: runs our kernels; ``calls``: how many calls ``run()`` is, each with its own operands: times and all else
    here are of one.
    """

    run: Callable[[], Any]
    check: Callable[[], str | None]
    work: Work | None = None
    kept_flops: float = 0.0
    ours: bool = False
    calls: int = 1


@dataclass
class Contest:
    """The contestants of one case. ``absent``: name -> why this contestant is not here."""

    case: Case
    entries: dict[str, Entry] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    baseline: str = BASELINE


@dataclass(frozen=True)
class Suite:
    """``build(case, peers, allow_reference)`` makes the contest; ``cases()``: the cases of the full table."""

    name: str
    about: str
    build: Callable[[Case, Sequence[str], bool], Contest]
    cases: Callable[[], Iterator[Case]]


def generator_of(case: Case) -> torch.Generator:
    """Seeded by the case, so that two runs see the same numbers."""
    return torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))


def close_to(got: Any, truth: Tensor, scale: Tensor, relative: float) -> str | None:
    """None where |got - truth| <= relative * scale everywhere; scale: the magnitudes added up, truth's shape."""
    result = torch.as_tensor(got).detach().to(torch.float64)
    if result.shape != truth.shape:
        return f"shape {list(result.shape)} instead of {list(truth.shape)}"
    excess = (result - truth).abs() - relative * scale
    if bool((excess <= 0).all()):
        return None
    where = int(torch.where(excess.isnan(), torch.inf, excess).argmax())
    return f"at flat index {where}: {result.flatten()[where].item():.7g} instead of {truth.flatten()[where].item():.7g}"

def runs_native(allow_reference: bool) -> bool:
    """Whether our ops would run compiled kernels; always true where the reference is asked for."""
    return allow_reference or (_native.C is not None and backends.forced_backend() in (None, "native"))


def add_ours_(
    contest: Contest,
    run: Callable[[], Any],
    check: Callable[[Callable[[], Any]], Callable[[], str | None]],
    work: Work,
    allow_reference: bool,
) -> None:
    """Enters what runs our kernels, or says why it does not."""
    if runs_native(allow_reference):
        contest.entries["ours"] = Entry(run, check(run), work, ours=True)
    else:
        contest.absent["ours"] = "the compiled core is absent"
