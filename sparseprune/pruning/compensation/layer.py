"""One layer: every remedy fitted to its inputs, the best on held-out ones taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..granularity import Block, Element, make_granularity
from .moments import Moments, root_of
from .refit import low_rank_factors, refit_survivors

__all__ = ["Compensation", "compensate"]


@dataclass(frozen=True)
class Compensation:
    """One layer after compensation: use ``weight`` `[N, K]` (zero where ``mask`` is False), ``low_rank_a`` `[r, K]` and
    ``low_rank_b`` `[N, r]` (None at rank 0), and add ``bias_shift`` `[N]` (or None) to the bias.

    ``parameters`` <= ``budget``, in weights of this layer. ``errors``: candidate -> mean squared error of the
    outputs on held-out inputs, as a fraction of the dense outputs' mean square; ``chosen`` is the smallest.
    """

    weight: Tensor
    mask: Tensor
    low_rank_a: Tensor | None
    low_rank_b: Tensor | None
    bias_shift: Tensor | None
    rank: int
    parameters: int
    budget: int
    chosen: str
    errors: dict[str, float] = field(default_factory=dict)

    def effective_weight(self) -> Tensor:
        """S + B A, dense `[N, K]`."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return self.weight
        return self.weight + self.low_rank_b @ self.low_rank_a

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {error:.4f}" for name, error in self.errors.items())
        return f"{self.chosen}: {self.parameters:,} of {self.budget:,} parameters; held-out error: {listed}"


def compensate(
    weight: Tensor,
    inputs: Tensor,
    density: float | None = None,
    *,
    mask: Tensor | None = None,
    scores: Tensor | None = None,
    has_bias: bool = True,
    bias_shift: bool = True,
    granularity: str | Element | Block = "element",
    valid_inputs: Tensor | None = None,
    outputs: Tensor | None = None,
    valid_outputs: Tensor | None = None,
    ranks: Sequence[int] | None = None,
    survivors: bool = True,
    rounds: int = 3,
    damping: float = 0.01,
) -> Compensation:
    """weight: `[N, K]` dense; inputs: `[..., K]`, what the layer reads; returns the best :class:`Compensation`.

    The budget is ``density`` times N K, or the number of weights that ``mask`` keeps (give one of the two).
    Candidates: plain masking, a bias shift, refitted ``survivors``, and every rank of ``ranks`` (default: up to half
    the budget in powers of two) with the kept weights reduced to pay for it. ``scores`` `[N, K]` order the weights, by
    default |w| sqrt(E x^2); with ``mask`` only kept ones are eligible. Without scores and mask the sparse part is
    chosen anew beside the low-rank part in ``rounds`` alternations. ``has_bias``: False makes a bias shift cost N
    parameters; ``bias_shift``: False tries none. ``valid_inputs``: held-out inputs for the choice, by default the last
    quarter of ``inputs``. ``outputs`` `[..., N]`: what the layer is to give for ``inputs``, its bias taken off, instead
    of what ``weight`` gives; ``weight`` then holds the weights in use, and plain masking leaves them as they are (give
    ``valid_outputs`` with ``valid_inputs``). Rank 0, and no compensation at all, are valid answers. granularity:
    elements or blocks. ``damping`` >= 0: as a share of the mean diagonal it is added to the diagonal of the inputs'
    second moments (with a bias shift: of their covariance), so that a fit is defined where inputs hang together; it
    draws fits to the weights.

    Raises ValueError on shapes that do not fit, on inputs that are not finite, on fewer than 8 of them, and on a
    damping too small for them in float32.
    """
    kind = make_granularity(granularity)
    if not isinstance(kind, (Element, Block)):
        raise ValueError(
            f"compensate: granularity expected 'element' or Block(r, c), got {kind}: its count is not free"
        )
    if weight.dim() != 2 or inputs.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"compensate: expected weight [N, K] and inputs [..., K], got {list(weight.shape)} and {list(inputs.shape)}"
        )
    if (density is None) == (mask is None):
        raise ValueError("compensate: give density or mask, one of the two")
    if not damping >= 0:
        raise ValueError(f"compensate: damping expected >= 0, got {damping}")
    train, valid = _split(inputs, valid_inputs, outputs, valid_outputs, len(weight))
    dense = weight.detach().float()
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"compensate: mask expected bool {list(weight.shape)}, got {mask.dtype} {list(mask.shape)}")
    problem = _Problem(dense, train, valid, kind, mask, scores, survivors, rounds, damping)
    budget = int(mask.sum()) if mask is not None else problem.affordable(_share(density) * dense.numel())
    best: Compensation | None = None
    errors: dict[str, float] = {}
    for name, rank, shift, refit in _candidates(dense, budget, ranks, survivors, bias_shift):
        cost = rank * sum(dense.shape) + (0 if has_bias or not shift else dense.shape[0])
        if cost > budget:
            continue
        fitted = problem.fit(problem.affordable(budget - cost), rank, shift, refit)
        error = valid.error(dense, fitted.effective_weight(), fitted.bias_shift)
        errors[name] = error / max(valid.error(dense, torch.zeros_like(dense), None), 1e-30)
        nonzero = int(fitted.mask.sum())
        if best is None or errors[name] < errors[best.chosen]:
            best = Compensation(
                fitted.weight.to(weight.dtype),
                fitted.mask,
                None if fitted.low_rank_a is None else fitted.low_rank_a.to(weight.dtype),
                None if fitted.low_rank_b is None else fitted.low_rank_b.to(weight.dtype),
                None if fitted.bias_shift is None else fitted.bias_shift.to(weight.dtype),
                rank,
                nonzero + cost,
                budget,
                name,
                errors,
            )
    assert best is not None  # plain masking costs nothing
    return best


@dataclass
class _Problem:
    """One layer's fits, each for a number of kept weights, a rank, and with or without shift and refitted survivors."""

    dense: Tensor
    train: Moments
    valid: Moments
    kind: Element | Block
    mask: Tensor | None
    scores: Tensor | None
    survivors: bool
    rounds: int
    damping: float
    _systems: dict[bool, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def affordable(self, weights: float) -> int:
        """The largest number of weights in whole units that is at most ``weights``."""
        size = self.kind.r * self.kind.c if isinstance(self.kind, Block) else 1
        return math.floor(weights / size + 1e-9) * size

    def fit(self, kept: int, rank: int, shift: bool, refit: bool) -> Compensation:
        h, goal = self._system(shift)
        weights = self.train.lengths()
        mask = self._select(self.dense, weights, kept)
        sparse = self._sparse(goal, mask, h, refit)
        a = b = None
        if rank:
            root = root_of(h, self.damping)
            free = self.mask is None and self.scores is None and self.train.wanted is None
            for _ in range(self.rounds):
                a, b = low_rank_factors(goal - sparse, root, rank)
                rest = goal - b @ a
                if free:
                    mask = self._select(rest, weights, kept)
                sparse = self._sparse(rest, mask, h, refit)
        effective = sparse if a is None or b is None else sparse + b @ a
        move = self.train.shift(goal, effective) if shift else None
        return Compensation(sparse, mask, a, b, move, rank, 0, 0, "")

    def _system(self, shift: bool) -> tuple[Tensor, Tensor]:
        """(H, the goal in its metric), which all fits with, or without, a shift share."""
        if shift not in self._systems:
            self._systems[shift] = self.train.system(self.dense, shift, self.damping)
        return self._systems[shift]

    def _select(self, target: Tensor, weights: Tensor, kept: int) -> Tensor:
        scores = target.abs() * weights if self.scores is None else self.scores.float()
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, -math.inf)
        size = self.kind.r * self.kind.c if isinstance(self.kind, Block) else 1
        return self.kind.mask(scores, kept // size)

    def _sparse(self, target: Tensor, mask: Tensor, h: Tensor, refit: bool) -> Tensor:
        if refit:
            return refit_survivors(target, mask, h)
        return (target if self.train.wanted is None else self.dense) * mask


def _candidates(
    dense: Tensor, budget: int, ranks: Sequence[int] | None, survivors: bool, bias_shift: bool
) -> list[tuple[str, int, bool, bool]]:
    """(name, rank, bias shift, refitted survivors), the plain ones first: ties go to them."""
    if ranks is None:
        most = min(budget // (2 * sum(dense.shape)), min(dense.shape))
        ranks = [2**i for i in range(max(0, most).bit_length())]
    candidates = [("mask", 0, False, False)]
    if bias_shift:
        candidates.append(("bias", 0, True, False))
    if survivors:
        candidates.append(("survivors", 0, False, True))
    if survivors and bias_shift:
        candidates.append(("survivors and bias", 0, True, True))
    for rank in ranks:
        if not 0 <= rank <= min(dense.shape):
            raise ValueError(f"compensate: ranks expected in [0, {min(dense.shape)}], got {rank}")
        if rank:
            candidates.append((f"rank {rank}", rank, bias_shift, survivors))
    return candidates


def _split(
    inputs: Tensor, valid_inputs: Tensor | None, outputs: Tensor | None, valid_outputs: Tensor | None, width: int
) -> tuple[Moments, Moments]:
    flat = inputs.detach().reshape(-1, inputs.shape[-1])
    wanted = None if outputs is None else outputs.detach().reshape(-1, outputs.shape[-1])
    kept = None if valid_outputs is None else valid_outputs.detach().reshape(-1, valid_outputs.shape[-1])
    if valid_inputs is None:
        cut = len(flat) - len(flat) // 4
        flat, held = flat[:cut], flat[cut:]
        if wanted is not None:
            wanted, kept = wanted[:cut], wanted[cut:]
    else:
        held = valid_inputs.detach().reshape(-1, valid_inputs.shape[-1])
        if held.shape[1] != flat.shape[1]:
            raise ValueError(
                f"compensate: valid_inputs expected [..., {flat.shape[1]}], got {list(valid_inputs.shape)}"
            )
    if len(flat) < 6 or len(held) < 2:
        raise ValueError(f"compensate: expected at least 8 inputs, 2 of them held out, got {len(flat)} and {len(held)}")
    for x, y in ((flat, wanted), (held, kept)):
        if (y is None) != (wanted is None) or (y is not None and y.shape != (len(x), width)):
            got = "none" if y is None else list(y.shape)
            raise ValueError(f"compensate: outputs expected [{len(x)}, {width}], one row for each input, got {got}")
    for name, part in (("inputs", flat), ("valid_inputs", held), ("outputs", wanted), ("valid_outputs", kept)):
        if part is not None and not bool(part.isfinite().all()):
            raise ValueError(f"compensate: {name} expected finite values; check the data and the model's dtype")
    return Moments.of(flat, wanted), Moments.of(held, kept)


def _share(density: float | None) -> float:
    if density is None or not 0 < density <= 1:
        raise ValueError(f"compensate: density expected in (0, 1], got {density!r}")
    return density
