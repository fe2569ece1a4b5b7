"""Compensation: what pruning removed, given back in part, inside the same budget of parameters.

After pruning a Linear computes ``x S^T + b`` with sparse S instead of ``x W^T + b``. Three remedies, each fitted to the
layer's own inputs and judged on held-out ones:

- *bias shift*: the mean of what is missing goes into the bias;
- *survivors*: the kept weights are refitted by least squares, so that they stand in for the removed ones (the
  optimal brain surgeon's update of all survivors at once);
- *low rank*: ``y += (x A^T) B^T`` with A `[r, K]` and B `[N, r]`, the truncated SVD of the removed part, weighted by
  the inputs. Its ``r (N + K)`` parameters come off the kept weights, so that it must beat spending them there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import SparseLinear
from .granularity import Block, Element, make_granularity

__all__ = [
    "Compensation",
    "CompensationReport",
    "collect_inputs",
    "collect_outputs",
    "compensate",
    "compensate_",
    "refit_survivors",
]


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


@dataclass
class _Moments:
    """Of inputs x `[T, K]`: mean `[K]`, second moment `[K, K]` about zero; and the rows themselves, with the outputs
    wanted `[T, N]`, where these are not what a dense weight gives.
    """

    mean: Tensor
    second: Tensor
    rows: Tensor
    wanted: Tensor | None

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor | None) -> _Moments:
        x = inputs.float()
        return cls(x.mean(0), x.T @ x / len(x), x, None if wanted is None else wanted.float())

    def goal(self, weight: Tensor, h: Tensor, centred: bool) -> Tensor:
        """The dense `[N, K]` to come near in the metric h of :meth:`fitted`: the weight itself, or the one that gives
        the outputs wanted best, by least squares, drawn to the weight in use by the damping.
        """
        if self.wanted is None:
            return weight
        x, y = (self.rows - self.mean, self.wanted - self.wanted.mean(0)) if centred else (self.rows, self.wanted)
        spare = h.diagonal() - x.square().mean(0)  # the damping
        return torch.linalg.solve(h, (y.T @ x / len(x) + weight * spare).T).T

    def shift(self, goal: Tensor, effective: Tensor) -> Tensor:
        """The bias shift `[N]` that makes the means of the outputs right."""
        if self.wanted is None:
            return (goal - effective) @ self.mean
        return self.wanted.mean(0) - effective @ self.mean

    def fitted(self, centred: bool, damping: float) -> Tensor:
        """The matrix H of the least-squares problem, symmetric and positive definite."""
        h = self.second - torch.outer(self.mean, self.mean) if centred else self.second
        level = h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny)
        return h + damping * level * torch.eye(len(h), dtype=h.dtype, device=h.device)

    def error(self, weight: Tensor, effective: Tensor, shift: Tensor | None) -> float:
        """Mean over the inputs of ||y - effective x - shift||^2 for the outputs wanted, by default weight x."""
        if self.wanted is not None:
            given = self.rows @ effective.T + (0 if shift is None else shift)
            return float((self.wanted - given).square().sum(1).mean())
        missing = weight - effective
        total = ((missing @ self.second) * missing).sum()
        if shift is not None:
            total = total - 2 * shift @ (missing @ self.mean) + shift @ shift
        return float(total)


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
    elements or blocks.

    Raises ValueError on shapes that do not fit, on inputs that are not finite, and on fewer than 8 of them.
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


@dataclass(frozen=True)
class CompensationReport:
    """What :func:`compensate_` did: fqn -> :class:`Compensation`."""

    layers: dict[str, Compensation]

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'chosen':<18}  error: mask  chosen  parameters / budget"]
        for name, c in self.layers.items():
            errors = f"{c.errors['mask']:11.4f}  {c.errors[c.chosen]:6.4f}"
            lines.append(f"{name:<{width}}  {c.chosen:<18}  {errors}  {c.parameters} / {c.budget}")
        return "\n".join(lines)


@torch.no_grad()
def compensate_(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[Any],
    *,
    ranks: Sequence[int] | None = None,
    rows: int = 4096,
) -> CompensationReport:
    """Gives a pruned model back, in place, part of what pruning removed; no layer ends with more parameters than it
    had.

    model: its pruned Linears hold zeros; dense: the same architecture before pruning, left untouched; batches: what
    the models are called with, as for :func:`collect_inputs`. Each pruned Linear gets what served it best on held-out
    inputs of its own: nothing, a bias shift (where it has a bias), refitted survivors, or a low-rank term paid for
    with kept weights; then it becomes a :class:`SparseLinear` with ``low_rank_a`` and ``low_rank_b``. ``ranks``: those
    tried; ``()`` for none. ``rows``: input positions kept a layer.

    Raises ValueError where nothing is pruned or the two models differ in shape.
    """
    twins = dict(dense.named_modules())
    pruned = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not bool((module.weight != 0).all())
    }
    if not pruned:
        raise ValueError("compensate_: expected a model with pruned Linears, got none with zeros; prune it first")
    for name, linear in pruned.items():
        twin = twins.get(name)
        if not isinstance(twin, nn.Linear) or twin.weight.shape != linear.weight.shape:
            raise ValueError(f"compensate_: the dense model expected a Linear {list(linear.weight.shape)} at {name!r}")
    inputs = collect_inputs(model, pruned, batches, rows)
    results: dict[str, Compensation] = {}
    for name, linear in pruned.items():
        weight, mask = twins[name].get_parameter("weight").detach(), linear.weight != 0
        own = ranks if name else ()  # a model that is itself a Linear cannot be replaced in place
        results[name] = compensate(weight, inputs[name], mask=mask, bias_shift=linear.bias is not None, ranks=own)
    for name, found in results.items():  # only now, so that an error leaves the model as it was
        linear = pruned[name]
        linear.weight.copy_(found.weight)
        if found.bias_shift is not None:
            linear.bias.add_(found.bias_shift)
        if found.low_rank_a is not None:
            layer = SparseLinear.from_linear(linear, low_rank_a=found.low_rank_a, low_rank_b=found.low_rank_b)
            model.set_submodule(name, layer)
    return CompensationReport(results)


def refit_survivors(weight: Tensor, mask: Tensor, second_moment: Tensor, iterations: int = 30) -> Tensor:
    """weight: `[N, K]`; mask: bool `[N, K]`; second_moment H: `[K, K]`, E x x^T, positive definite; returns S `[N, K]`.

    S is zero where the mask is False and minimises tr((W - S) H (W - S)^T): every row by itself is the least-squares
    fit of the dense row's outputs by its survivors. Conjugate gradients on all rows at once, scaled by H's diagonal,
    starting from the masked weights, so that it never ends worse than them.
    """
    scale = second_moment.diagonal().clamp_min(torch.finfo(second_moment.dtype).tiny)
    kept = mask.to(weight.dtype)
    fit = weight * kept
    residual = ((weight - fit) @ second_moment) * kept
    direction = scaled = residual / scale
    product = (residual * scaled).sum(1, keepdim=True)
    start = product.clone()
    for _ in range(iterations):
        image = (direction @ second_moment) * kept
        curvature = (direction * image).sum(1, keepdim=True)
        # A row that has converged (or is empty) stays where it is.
        active = (product > 1e-12 * start) & (curvature > 0)
        if not bool(active.any()):
            break
        length = torch.where(active, product / curvature.clamp_min(1e-38), torch.zeros_like(product))
        fit = fit + length * direction
        residual = residual - length * image
        scaled = residual / scale
        after = (residual * scaled).sum(1, keepdim=True)
        direction = (
            scaled + torch.where(active, after / product.clamp_min(1e-38), torch.zeros_like(product)) * direction
        )
        product = torch.where(active, after, product)
    return fit * kept


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


Call = Callable[[nn.Module, Any], Any]


def collect_inputs(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], rows: int = 4096, seed: int = 0, call: Call = _call
) -> dict[str, Tensor]:
    """fqn -> `[T, K]`, T <= rows: what each named Linear reads while the model runs over the batches in eval mode.

    batches: what the model is called with: a dict (keywords, ``labels`` left out), a tuple (its first entry) or a
    tensor; ``call`` replaces that reading. Positions with ``attention_mask`` 0 are left out. At most ``rows`` positions
    are kept, drawn evenly from all batches, the same of every layer that has as many. ValueError on a Linear that the
    batches never reach.
    """
    return _collect(model, names, batches, rows, seed, call, outputs=False)


def collect_outputs(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], rows: int = 4096, seed: int = 0, call: Call = _call
) -> dict[str, Tensor]:
    """fqn -> `[T, N]`: what each named module gives, at the positions where :func:`collect_inputs` reads."""
    return _collect(model, names, batches, rows, seed, call, outputs=True)


@torch.no_grad()
def _collect(
    model: nn.Module, names: Iterable[str], batches: Iterable[Any], rows: int, seed: int, call: Call, outputs: bool
) -> dict[str, Tensor]:
    name = "collect_outputs" if outputs else "collect_inputs"
    modules = dict(model.named_modules())
    listed = list(batches)
    if not listed:
        raise ValueError(f"{name}: expected at least one batch, got none")
    share = max(1, math.ceil(rows / len(listed)))
    found: dict[str, list[Tensor]] = {fqn: [] for fqn in names}
    keep: Tensor | None = None
    number = 0

    def hook(fqn: str) -> Any:
        def read(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            x = (result if outputs else arguments[0]).detach()
            flat = x.reshape(-1, x.shape[-1])
            if keep is not None and x.dim() > 2 and x.shape[:-1] == keep.shape:
                flat = flat[keep.reshape(-1)]
            if len(flat) > share:
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                flat = flat[torch.randperm(len(flat), generator=generator)[:share].to(flat.device)]
            found[fqn].append(flat.clone())

        return read

    hooks = [modules[fqn].register_forward_hook(hook(fqn)) for fqn in found]
    training = model.training
    try:
        model.eval()
        for number, batch in enumerate(listed):  # noqa: B007 (read by the hooks)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            keep = None if mask is None else mask.bool()
            call(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
        model.train(training)
    missing = [fqn for fqn, parts in found.items() if not parts]
    if missing:
        raise ValueError(f"{name}: the batches never reach {', '.join(missing[:10])}; leave them out")
    return {fqn: torch.cat(parts)[:rows] for fqn, parts in found.items()}


@dataclass
class _Problem:
    """One layer's fits, each for a number of kept weights, a rank, and with or without shift and refitted survivors."""

    dense: Tensor
    train: _Moments
    valid: _Moments
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
        weights = self.train.second.diagonal().clamp_min(0).sqrt()
        mask = self._select(self.dense, weights, kept)
        sparse = self._sparse(goal, mask, h, refit)
        a = b = None
        if rank:
            root = torch.linalg.cholesky(h)
            free = self.mask is None and self.scores is None and self.train.wanted is None
            for _ in range(self.rounds):
                a, b = _low_rank(goal - sparse, root, rank)
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
            h = self.train.fitted(shift, self.damping)
            self._systems[shift] = h, self.train.goal(self.dense, h, shift)
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


def _low_rank(missing: Tensor, root: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A `[r, K]`, B `[N, r]` that minimise tr((M - B A) H (M - B A)^T) for H = root root^T: the SVD of M root, cut
    at r.
    """
    weighted = missing @ root
    width = min(rank + 8, *weighted.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(weighted.shape[1], width, generator=generator).to(weighted)
    basis = torch.linalg.qr(weighted @ start).Q
    for _ in range(4):
        basis = torch.linalg.qr(weighted @ (weighted.T @ basis)).Q
    left, values, right = torch.linalg.svd(basis.T @ weighted, full_matrices=False)
    scale = values[:rank].sqrt()
    b = (basis @ left[:, :rank]) * scale
    a = torch.linalg.solve_triangular(root, right[:rank] * scale[:, None], upper=False, left=False)
    return a, b


def _split(
    inputs: Tensor, valid_inputs: Tensor | None, outputs: Tensor | None, valid_outputs: Tensor | None, width: int
) -> tuple[_Moments, _Moments]:
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
    return _Moments.of(flat, wanted), _Moments.of(held, kept)


def _share(density: float | None) -> float:
    if density is None or not 0 < density <= 1:
        raise ValueError(f"compensate: density expected in (0, 1], got {density!r}")
    return density
