"""What a Pruner looks at from step to step: whether the model, the optimiser and a state are still those of its run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..nn.filters import why_no_weight
from .plan import Plan

__all__ = ["accumulates", "check_frozen", "granularities", "inner_of", "linears_of", "skips", "unscaled"]


def linears_of(model: nn.Module, names: Iterable[str], masks: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """names: of the Linears being pruned; masks: bool `[N, K]` of those that have one. RuntimeError where one has been
    replaced, hidden (by a parametrization, by sharding) or cut in the meantime: a mask would do nothing to it.
    """
    modules = dict(model.named_modules())
    found = {fqn: modules[fqn] for fqn in names if isinstance(modules.get(fqn), nn.Linear)}
    missing = [fqn for fqn in names if fqn not in found]
    if missing:
        raise RuntimeError(
            f"Pruner: {', '.join(missing[:5])} of the model is no Linear any more; finalize before sparsify_"
        )
    for fqn, linear in found.items():
        weight = linear._parameters.get("weight")
        if weight is None or is_traceable_wrapper_subclass(weight):
            raise RuntimeError(
                f"Pruner: {fqn or 'the model'} has changed since the Pruner was made: {why_no_weight(linear)}; or "
                "finalize before that"
            )
        if fqn in masks and masks[fqn].shape != weight.shape:
            raise RuntimeError(
                f"Pruner: weight of {fqn or 'the model'} expected {list(masks[fqn].shape)}, the shape of its mask, got "
                f"{list(weight.shape)}; finalize before shrink_, and make a new Pruner to prune further"
            )
    return found


def granularities(plan: Plan) -> dict[str, str]:
    """fqn -> what its mask goes by."""
    return {fqn: repr(part.granularity) for part in plan.parts for fqn in part.layers}


def check_frozen(state: Mapping[str, Any], plan: Plan, final_density: float) -> None:
    """ValueError on a state whose masks are final, and not those that this plan ends with: they would never be chosen
    anew. state: of ``Pruner.state_dict``.
    """
    if not state["frozen"]:
        return
    if not abs(state["density"] - final_density) <= 1e-9:
        raise ValueError(
            f"Pruner: a state of this final density ({final_density!r}) expected, got one whose masks are final at "
            f"{state['density']!r}; to prune further make a new Pruner on the model and load no state"
        )
    expected, got = granularities(plan), state.get("granularities") or dict.fromkeys(state["masks"])
    other = [fqn for fqn in expected if fqn not in got or got[fqn] not in (None, expected[fqn])]
    if other:
        what = f"{expected[other[0]]} in {other[0] or 'the model'}"
        raise ValueError(
            f"Pruner: a state of these layers and granularities ({what}) expected, got one whose masks are final with "
            f"{got.get(other[0], 'none')} there; make the Pruner as it was, or a new one without the state"
        )


def inner_of(optimizer: Any) -> Any:
    """The optimiser itself, of a wrapper such as accelerate's."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


def accumulates(wrapper: Any) -> bool:
    """Whether an optimiser that accelerate has wrapped only gathers gradients at present: its ``step`` does nothing."""
    return not getattr(getattr(wrapper, "gradient_state", None), "sync_gradients", True)


# To a fused optimiser a GradScaler hands the scale, and whether a gradient has overflown, for the length of the step,
# and leaves the rest to it; other optimisers get unscaled gradients, and no step where one has.


def skips(optimizer: Optimizer) -> bool:
    """Whether this step of the optimiser will do nothing, for a gradient has overflown."""
    overflown = getattr(optimizer, "found_inf", None)
    return overflown is not None and bool(overflown)


def unscaled(gradients: dict[str, Tensor], optimizer: Optimizer) -> dict[str, Tensor]:
    """The gradients without the scale that a GradScaler has left in them."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return gradients
    return {fqn: gradient / scale.to(gradient.device) for fqn, gradient in gradients.items()}
