"""Criteria: which weights matter. A criterion gives every weight a score; the highest scores are kept.

Criteria stand in a table by name. :func:`register_criterion` adds one; the data-driven ones (Wanda, SparseGPT) register
themselves in ``oneshot``, that of second order in ``fisher``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .plan import Plan

__all__ = [
    "Accumulating",
    "Criterion",
    "FromFunction",
    "Magnitude",
    "Movement",
    "PruneContext",
    "Random",
    "SoftMovement",
    "Uncertainty",
    "criterion_names",
    "magnitude",
    "make_criterion",
    "register_criterion",
]

#: ``fn(linear, fqn) -> scores [N, K]``: a criterion as a plain function.
ScoreFn = Callable[[nn.Linear, str], Tensor]


@dataclass
class PruneContext:
    """What a criterion may look at.

    ``layers``: fqn -> Linear, the ones being pruned. ``weights``: fqn -> `[N, K]`, their values with what is pruned at
    present still in place (a gradual run can bring weights back). ``plan`` turns scores into masks, exactly:
    ``plan.masks(scores, sparsity)``. ``data``: what the user passed, or None. ``sum_``: adds up a tensor, in
    place, over the processes that hold parts of these layers; called by all of them or by none.
    """

    model: nn.Module
    layers: dict[str, nn.Linear]
    weights: dict[str, Tensor]
    plan: Plan
    sparsity: float
    data: Any = None
    sum_: Callable[[Tensor], None] = lambda tensor: None


class Criterion:
    """Base of the criteria. A subclass defines :meth:`scores`, or :meth:`masks` where it chooses or changes weights
    itself.

    ``needs_data``: ``data`` must be given. ``needs_gradients``: :meth:`observe` is called between each backward pass
    and the optimiser's step, by ``prune_`` once with what lies in ``.grad``; :meth:`scores` raises ValueError on a
    layer that was never observed. State that a resume needs goes through :meth:`state_dict`: tensors, plain values,
    lists and dicts of them.
    """

    name = "criterion"
    needs_data = False
    needs_gradients = False

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        """fqn -> scores `[N, K]`, larger = kept, no NaN."""
        raise NotImplementedError(f"{type(self).__name__} must define scores(context) or masks(context)")

    def masks(self, context: PruneContext) -> Mapping[str, Tensor]:
        """fqn -> bool `[N, K]`. A criterion that also updates the surviving weights does so here, in place."""
        return context.plan.masks(self.scores(context), context.sparsity)

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """weights, gradients: fqn -> `[N, K]`; the dense gradient at the masked weights, pruned entries included."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"{self.name}: expected no state, got {sorted(state)}")


def magnitude(weight: Tensor) -> Tensor:
    """weight: `[N, K]`; returns |w| `[N, K]`."""
    return weight.detach().abs()


class Magnitude(Criterion):
    """|w|."""

    name = "magnitude"

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        return {fqn: magnitude(weight) for fqn, weight in context.weights.items()}


class Random(Criterion):
    """Uniform random scores, the same at every call: the control that any criterion has to beat. seed: int."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        return {fqn: torch.rand(w.shape, generator=generator).to(w.device) for fqn, w in context.weights.items()}


class FromFunction(Criterion):
    """A criterion from ``fn(linear, fqn) -> scores [N, K]``."""

    def __init__(self, function: ScoreFn) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        found = {fqn: self.function(linear, fqn) for fqn, linear in context.layers.items()}
        for fqn, linear in context.layers.items():
            scores, shape = found[fqn], linear.weight.shape
            if not isinstance(scores, Tensor) or scores.shape != shape or scores.is_complex():
                got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(
                    f"criterion {self.name!r}: scores of {fqn!r} expected a real tensor {list(shape)}, got {got}; "
                    "return one score a weight"
                )
        return found


class Accumulating(Criterion):
    """State of one tensor (or more) a layer, made at the first gradient."""

    needs_gradients = True
    tensors: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.state: dict[str, dict[str, Tensor]] = {}

    def _zeros(self, like: Tensor) -> dict[str, Tensor]:
        return {name: torch.zeros_like(like, dtype=torch.float32) for name in self.tensors}

    def _of(self, fqn: str, like: Tensor) -> dict[str, Tensor]:
        if fqn not in self.state:
            self.state[fqn] = self._zeros(like)
        return self.state[fqn]

    def _score(self, state: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def check_seen(self, context: PruneContext) -> None:
        """ValueError on layers whose gradients were never observed."""
        unseen = [fqn for fqn in context.weights if fqn not in self.state]
        if unseen:
            raise ValueError(
                f"{self.name}: no gradient seen for {', '.join(unseen[:5])}; expected a step that reached each layer "
                "before pruning begins: leave frozen and unused layers out, give a short run more time, and in your "
                "own loop call backward first and give Pruner.prepare the optimiser"
            )

    def scores(self, context: PruneContext) -> dict[str, Tensor]:
        self.check_seen(context)
        return {fqn: self._score(self.state[fqn]) for fqn in context.weights}

    def state_dict(self) -> dict[str, Any]:
        return {fqn: {name: t.clone() for name, t in tensors.items()} for fqn, tensors in self.state.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for fqn, tensors in state.items():
            if set(tensors) != set(self.tensors):
                raise ValueError(
                    f"{self.name}: state of {fqn} expected {list(self.tensors)}, got {sorted(tensors)}; load what this "
                    "criterion saved"
                )
        self.state = {fqn: {name: t.clone() for name, t in tensors.items()} for fqn, tensors in state.items()}


class Movement(Accumulating):
    """The sum of -g w over the steps: weights that move away from zero stay (Sanh et al. 2020).

    g is the gradient at the masked weight and w the value behind the mask (straight-through), so a pruned weight can
    come back.
    """

    name = "movement"
    tensors = ("moved",)

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for fqn, gradient in gradients.items():
            self._of(fqn, weights[fqn])["moved"].addcmul_(gradient.float(), weights[fqn].detach().float(), value=-1)

    def _score(self, state: dict[str, Tensor]) -> Tensor:
        return state["moved"]


class SoftMovement(Movement):
    """Movement with a pull on every score: each step also takes ``pull * sigmoid'(S)`` off (Sanh et al. 2020).

    In the original a fixed threshold on sigmoid(S) decides and the pull sets the density; here the count is exact
    and the pull acts on the order: scores near zero, of undecided weights, sink below those that have made their way.
    ``learning_rate`` scales -g w, as the scores' own rate does there.
    """

    name = "soft_movement"

    def __init__(self, learning_rate: float = 1.0, pull: float = 1e-3) -> None:
        super().__init__()
        if not learning_rate > 0 or not pull >= 0:
            raise ValueError(
                f"soft_movement: expected learning_rate > 0 and pull >= 0, got {learning_rate!r} and {pull!r}"
            )
        self.learning_rate, self.pull = learning_rate, pull

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for fqn, gradient in gradients.items():
            moved = self._of(fqn, weights[fqn])["moved"]
            sigmoid = moved.sigmoid()
            moved.addcmul_(gradient.float(), weights[fqn].detach().float(), value=-self.learning_rate)
            moved.sub_(sigmoid * (1 - sigmoid), alpha=self.pull)


class Uncertainty(Accumulating):
    """Smoothed |g w| times its smoothed spread: what matters, or might, is kept (PLATON, Zhang et al. 2022)."""

    name = "uncertainty"
    tensors = ("mean", "spread")

    def __init__(self, beta1: float = 0.85, beta2: float = 0.95) -> None:
        super().__init__()
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"uncertainty: {name} expected in [0, 1), got {beta!r}")
        self.beta1, self.beta2 = beta1, beta2

    def observe(self, weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        for fqn, gradient in gradients.items():
            state = self._of(fqn, weights[fqn])
            sensitivity = (gradient.float() * weights[fqn].detach().float()).abs()
            state["mean"].lerp_(sensitivity, 1 - self.beta1)
            state["spread"].lerp_((sensitivity - state["mean"]).abs(), 1 - self.beta2)

    def _score(self, state: dict[str, Tensor]) -> Tensor:
        return state["mean"] * state["spread"]


_CRITERIA: dict[str, Callable[..., Criterion]] = {}


def register_criterion(name: str, factory: Callable[..., Criterion]) -> None:
    """``factory(**options)`` makes the criterion that ``criterion=name`` stands for. ValueError on a taken name."""
    if name in _CRITERIA and _CRITERIA[name] is not factory:
        raise ValueError(f"register_criterion: {name!r} is taken; choose another name")
    _CRITERIA[name] = factory


def criterion_names() -> list[str]:
    """The names that exist."""
    return sorted(_CRITERIA)


def make_criterion(criterion: str | Criterion | ScoreFn, options: Mapping[str, Any] | None = None) -> Criterion:
    """criterion: a name, a :class:`Criterion`, or ``fn(linear, fqn) -> scores [N, K]``; options: keyword arguments
    of the named.

    Raises ValueError on an unknown name, listing what exists, on an unknown option, and on a class in place of its
    instance.
    """
    if isinstance(criterion, type):
        name = criterion.__name__
        raise ValueError(f"criterion: expected a name, a Criterion or a function, got a class, {name}; pass {name}()")
    if isinstance(criterion, Criterion):
        return _without_options(criterion, options)
    if isinstance(criterion, str):
        if criterion not in _CRITERIA:
            near = difflib.get_close_matches(criterion, _CRITERIA, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"criterion: expected one of {', '.join(criterion_names())}, got {criterion!r}{hint}")
        factory = _CRITERIA[criterion]
        _check_options(criterion, factory, options or {})
        return factory(**(options or {}))
    if callable(criterion):
        return _without_options(FromFunction(criterion), options)
    raise ValueError(f"criterion: expected a name, a Criterion or a function of (linear, fqn), got {criterion!r}")


def _without_options(criterion: Criterion, options: Mapping[str, Any] | None) -> Criterion:
    if options:
        raise ValueError(f"criterion: options go with a name, got {sorted(options)} with {criterion.name!r} itself")
    return criterion


def _check_options(name: str, factory: Callable[..., Criterion], options: Iterable[str]) -> None:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for option in options:
        if option not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"criterion {name!r}: unknown option {option!r}; known: {known}")


for _class in (Magnitude, Random, Movement, SoftMovement, Uncertainty):
    register_criterion(_class.name, _class)
