"""Which Linears are pruned and sparsified: the default filter, what it leaves out, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

__all__ = [
    "HEAD_NAMES",
    "FilterFn",
    "Selection",
    "matching_filter",
    "prunable_linears",
    "select_linears",
    "take_fast_path_",
    "take_slow_path_",
]

#: ``filter_fn(module, fqn) -> bool``, asked only about Linears.
FilterFn = Callable[[nn.Linear, str], bool]

#: Last components of a name that mark a model's head.
HEAD_NAMES = frozenset({"classifier", "score", "lm_head", "qa_outputs"})

_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """What a filter chose. ``selected``: fqn -> Linear, in the model's order; ``skipped``: fqn -> why not."""

    selected: dict[str, nn.Linear]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.selected)} Linears selected, {len(self.skipped)} left out"]
        lines += [f"  {fqn or '(the model)'}: {why}" for fqn, why in self.skipped.items()]
        return "\n".join(lines)


def prunable_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, nn.Linear]:
    """What pruning and sparsifying touch: fqn -> module, in the model's order; see :func:`select_linears`."""
    return select_linears(model, filter_fn).selected


def select_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> Selection:
    """Every Linear of the model (weight `[N, K]`), selected or left out with a reason.

    Without ``filter_fn`` the default leaves out weights tied to another module and the head:
    ``get_output_embeddings()``, a last name component in :data:`HEAD_NAMES`, or a classification head's ``out_proj``.
    ``filter_fn(module, fqn)`` replaces that choice. Left out in any case is what cannot be pruned as a Linear:
    ``nn.MultiheadAttention.out_proj``, whose weight is read past its forward; weights that a parametrization computes,
    that are not floating point, not initialised or on the meta device; and the second of two selected Linears that
    share one weight.

    A model that is itself a Linear is listed under the name ``""``. Raises ValueError, listing the candidates, when
    nothing is selected.
    """
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    impossible = _impossible(model, linears)
    unwanted = _default_reasons(model, linears) if filter_fn is None else {}
    selected: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    owner: dict[int, str] = {}
    for fqn, linear in linears.items():
        reason = impossible.get(fqn) or unwanted.get(fqn)
        if reason is None and filter_fn is not None and not filter_fn(linear, fqn):
            reason = "filter_fn said no"
        if reason is None and id(linear.weight) in owner:
            reason = f"shares its weight with {owner[id(linear.weight)]!r}, which is selected"
        if reason is not None:
            skipped[fqn] = reason
            continue
        owner[id(linear.weight)] = fqn
        selected[fqn] = linear
    if not selected:
        raise ValueError(_nothing(model, skipped))
    return Selection(selected, skipped)


def matching_filter(model: nn.Module, patterns: Sequence[str] | None) -> FilterFn | None:
    """A filter_fn that narrows the default choice to names that match one of ``patterns`` (as in a shell: ``*.ffn.*``).

    None or no patterns: None, the default choice. ValueError, listing the names, where a pattern matches none.
    """
    if not patterns:
        return None
    names = list(select_linears(model).selected)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise ValueError(f"layers: the pattern {pattern!r} matches no prunable Linear; there are {shown}")
    chosen = {name for pattern in patterns for name in fnmatch.filter(names, pattern)}
    return lambda module, fqn: fqn in chosen


def take_slow_path_(model: nn.Module) -> list[str]:
    """Makes every ``nn.TransformerEncoderLayer`` call its Linears; returns the names of the layers changed.

    In eval such a layer hands ``linear1.weight`` and ``linear2.weight`` to one fused dense kernel and never calls the
    modules, so a sparse layer put in their place would not run. Outputs stay the same, up to rounding.
    :func:`take_fast_path_` undoes it.
    """
    changed = []
    for fqn, module in model.named_modules():
        name = _fast_path(module)
        if name is not None and _BEFORE not in module.__dict__ and getattr(module, name):
            module.__dict__[_BEFORE] = getattr(module, name)
            setattr(module, name, 0)
            if isinstance(module, nn.TransformerEncoderLayer):
                changed.append(fqn)
    return changed


def take_fast_path_(model: nn.Module) -> None:
    """Undoes :func:`take_slow_path_`."""
    for module in model.modules():
        if _BEFORE in module.__dict__:
            name = _fast_path(module)
            assert name is not None
            setattr(module, name, module.__dict__.pop(_BEFORE))


def _fast_path(module: nn.Module) -> str | None:
    return next((name for kind, name in _FAST_PATH.items() if isinstance(module, kind)), None)


# The attribute that opens the fast path, and the one that remembers what it was.
_FAST_PATH: dict[type[nn.Module], str] = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
_BEFORE = "_sparseprune_fast_path"


def _impossible(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, str]:
    reasons = {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[f"{fqn}.out_proj" if fqn else "out_proj"] = (
                "nn.MultiheadAttention reads out_proj.weight itself and never calls the module; use_linears_(model) "
                "gives it Linears"
            )
    for fqn, linear in linears.items():
        weight = linear._parameters.get("weight")
        if weight is None:
            reasons[fqn] = "its weight is computed, not stored (a parametrization, or a pruned layer's weight_orig)"
        elif isinstance(weight, UninitializedParameter):
            reasons[fqn] = "its weight is not initialised; run one batch first"
        elif not weight.is_floating_point():
            reasons[fqn] = f"its weight is {weight.dtype}, not floating point"
        elif weight.is_meta:
            reasons[fqn] = "its weight is on the meta device; load the model first"
    return reasons


def _default_reasons(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, str]:
    holders = _holders(model)
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    reasons = {}
    for fqn, linear in linears.items():
        weight = linear._parameters.get("weight")
        others = [] if weight is None else [name for name in holders.get(_key(weight), []) if name != fqn]
        parent, _, last = fqn.rpartition(".")
        if linear is output:
            reasons[fqn] = "the model's output embedding"
        elif last in HEAD_NAMES:
            reasons[fqn] = "a head"
        elif last == "out_proj" and _is_classification_head(model.get_submodule(parent), parent):
            reasons[fqn] = "a classification head's out_proj"
        elif others:
            reasons[fqn] = f"its weight is tied to {others[0]!r}"
    return reasons


def _is_classification_head(module: nn.Module, fqn: str) -> bool:
    return fqn.rpartition(".")[2] in HEAD_NAMES or "ClassificationHead" in type(module).__name__


def _key(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same memory; a parameter without memory of its own is only itself."""
    if isinstance(tensor, UninitializedParameter) or tensor.is_meta or tensor.numel() == 0:
        return (id(tensor),)
    try:
        return (tensor.device, tensor.data_ptr(), tensor.numel())
    except RuntimeError:  # a tensor subclass without storage
        return (id(tensor),)


def _holders(model: nn.Module) -> dict[tuple[object, ...], list[str]]:
    """Memory -> names of the modules that hold it as a parameter; a module met under two names counts once."""
    holders: dict[tuple[object, ...], list[str]] = {}
    for fqn, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(parameter, torch.Tensor):
                holders.setdefault(_key(parameter), []).append(fqn)
    return holders


def _nothing(model: nn.Module, skipped: dict[str, str]) -> str:
    name = type(model).__name__
    if not skipped:
        return f"select_linears: {name} has no nn.Linear to prune or sparsify; use_linears_ unpacks Conv1D, attention"
    lines = [f"  {fqn or '(the model itself)'}: {why}" for fqn, why in list(skipped.items())[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"  and {len(skipped) - _SHOWN} more")
    return "\n".join([f"select_linears: nothing selected in {name}; pass filter_fn(module, fqn). Candidates:", *lines])
