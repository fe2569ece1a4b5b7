"""Which Linears are pruned and sparsified: the default filter, what it leaves out, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .adapters import adapter_reasons, own_name
from .linear import SparseLinear
from .other_weights import other_weights

__all__ = [
    "HEAD_NAMES",
    "FilterFn",
    "Selection",
    "matching_filter",
    "own_forward",
    "prunable_linears",
    "select_linears",
    "take_fast_path_",
    "take_slow_path_",
    "why_no_weight",
]

#: ``filter_fn(module, fqn) -> bool``, asked only about Linears.
FilterFn = Callable[[nn.Linear, str], bool]

#: Last components of a name that mark a model's head.
HEAD_NAMES = frozenset({"classifier", "score", "lm_head", "qa_outputs"})

_SHOWN = 20
_SPARSE = "a SparseLinear already; densify_(model) gives it back its Linear"
_UNSHARDED = "prune before wrapping, or within FSDP.summon_full_params(model)"


@dataclass(frozen=True)
class Selection:
    """What a filter chose. ``selected``: fqn -> Linear, in the model's order; ``skipped``: fqn -> why not;
    ``other_weights``: larger weights that no Linear holds, and their share of all parameters (``layers.*.experts.up``).
    """

    selected: dict[str, nn.Linear]
    skipped: dict[str, str]
    other_weights: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.selected)} Linears selected, {len(self.skipped)} left out"]
        lines += [f"  {fqn or '(the model)'}: {why}" for fqn, why in self.skipped.items()]
        lines += [f"  no Linear: {name}: {what}" for name, what in self.other_weights.items()]
        return "\n".join(lines)


def prunable_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> dict[str, nn.Linear]:
    """What pruning and sparsifying touch: fqn -> module, in the model's order; see :func:`select_linears`."""
    return select_linears(model, filter_fn).selected


def select_linears(model: nn.Module, filter_fn: FilterFn | None = None) -> Selection:
    """Every Linear of the model (weight `[N, K]`), selected or left out with a reason.

    Without ``filter_fn`` the default leaves out weights tied to another module, peft's adapters, and the head:
    ``get_output_embeddings()``, a last name component in :data:`HEAD_NAMES`, or a classification head's ``out_proj``.
    ``filter_fn(module, fqn)`` replaces that choice. Left out in any case is what cannot be pruned as a Linear:
    ``nn.MultiheadAttention.out_proj``, whose weight is read past its forward; weights that a parametrization computes,
    that are quantised, sharded, sparse already, not real floating point, not initialised or on the meta device; and
    the second of two selected Linears that share one weight.

    A model that is itself a Linear is listed under the name ``""``. Raises ValueError on a model or filter_fn of
    another kind and, listing the candidates, when nothing is selected.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"select_linears: expected an nn.Module, got {type(model).__name__}; pass the model itself")
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(
            f"filter_fn expected a function (module, fqn) -> bool or None, got {filter_fn!r}; for name patterns pass "
            "sparseprune.nn.filters.matching_filter(model, ['*.ffn.*'])"
        )
    linears = {fqn: module for fqn, module in model.named_modules() if isinstance(module, nn.Linear)}
    impossible = _impossible(model, linears)
    unwanted = _default_reasons(model, linears) if filter_fn is None else {}
    selected: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    owner: dict[tuple[object, ...], str] = {}
    for fqn, linear in linears.items():
        reason = impossible.get(fqn) or unwanted.get(fqn)
        if reason is None and filter_fn is not None and not filter_fn(linear, fqn):
            reason = "filter_fn said no"
        if reason is None and _key(linear.weight) in owner:
            reason = f"shares its weight with {owner[_key(linear.weight)]!r}, which is selected"
        if reason is not None:
            skipped[fqn] = reason
            continue
        owner[_key(linear.weight)] = fqn
        selected[fqn] = linear
    skipped |= _replaced(model)
    others = other_weights(model)
    if not selected:
        raise ValueError(_nothing(model, skipped, set(linears) <= set(impossible), others))
    return Selection(selected, skipped, others)


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
                "nn.MultiheadAttention reads out_proj.weight itself and never calls the module; expose_linears_(model) "
                "gives it Linears"
            )
    for fqn, linear in linears.items():
        why = why_no_weight(linear)
        if why is not None:
            reasons[fqn] = why
    return reasons


def why_no_weight(linear: nn.Linear) -> str | None:
    """Why the weight cannot be read and written as a plain matrix `[N, K]`; None where it can."""
    weight = linear._parameters.get("weight")
    expected = (linear.out_features, linear.in_features)
    if weight is None:
        if "weight_orig" in linear._parameters and "weight_mask" in linear._buffers:
            return (
                "its weight is the product of weight_orig and weight_mask, of torch.nn.utils.prune; first "
                "torch.nn.utils.prune.remove(layer, 'weight'), which writes the zeros into the weight"
            )
        if {"weight_orig", "weight_g"} & linear._parameters.keys():
            return (
                "its weight is computed at every call, by torch.nn.utils.spectral_norm or weight_norm; remove it first "
                "(remove_spectral_norm, remove_weight_norm)"
            )
        if isinstance(linear.__dict__.get("weight"), Tensor):
            return f"its weight is a view into another parameter (a flat one of FSDP, say); {_UNSHARDED}"
        return (
            "its weight is computed, not stored (a parametrization); first "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if isinstance(weight, UninitializedParameter):
        return "its weight is not initialised; run one batch first"
    if weight.layout is not torch.strided:
        return f"its weight is stored as {weight.layout}, expected dense; set it to nn.Parameter(weight.to_dense())"
    if is_traceable_wrapper_subclass(weight):
        return f"its weight is a {type(weight).__name__}, no plain tensor; prune before quantising or sharding"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}, not floating point" + (
            "" if weight.is_complex() else "; prune before quantising"
        )
    if weight.element_size() == 1:
        return f"its weight is {weight.dtype}, which has no arithmetic; prune before quantising"
    if weight.is_meta:
        return "its weight is on the meta device; load the model first"
    if tuple(weight.shape) != expected:
        return f"its weight expected {list(expected)}, got {list(weight.shape)}, a shard perhaps; {_UNSHARDED}"
    if torch._debug_has_internal_overlap(weight) == 1:
        return "several entries of its weight are one place in memory (an expanded tensor); clone it first"
    if not hasattr(linear, "bias"):
        return f"it has lost its bias (to a flat parameter of FSDP, say); {_UNSHARDED}"
    return None


def _replaced(model: nn.Module) -> dict[str, str]:
    """fqn -> what has taken a Linear's place, for modules that are none."""
    found = {}
    for fqn, module in model.named_modules():
        if isinstance(module, SparseLinear):
            found[fqn] = _SPARSE
        elif not isinstance(module, nn.Linear) and hasattr(module, "_packed_params") and hasattr(module, "in_features"):
            found[fqn] = f"{type(module).__module__}.{type(module).__name__}, quantised; prune before quantising"
    return found


def _default_reasons(model: nn.Module, linears: dict[str, nn.Linear]) -> dict[str, str]:
    holders = _holders(model)
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    reasons = adapter_reasons(model)
    for fqn, linear in linears.items():
        if fqn in reasons:
            continue
        weight = linear._parameters.get("weight")
        others = [] if weight is None else [name for name in holders.get(_key(weight), []) if name != fqn]
        name = own_name(model, fqn)
        parent, _, last = name.rpartition(".")
        if output is not None and output in (linear, model.get_submodule(name)):
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
        return (tensor.device, tensor.data_ptr(), tensor.numel()) if tensor.data_ptr() else (id(tensor),)
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


def _nothing(model: nn.Module, skipped: dict[str, str], impossible: bool, others: dict[str, str]) -> str:
    name = type(model).__name__
    hidden = [f"  no Linear: {weight}: {what}" for weight, what in list(others.items())[:_SHOWN]]
    if not skipped:
        return "\n".join([
            f"select_linears: {name} has no nn.Linear to prune or sparsify; expose_linears_(model) gives Linears to "
            f"Conv1D and nn.MultiheadAttention{':' if hidden else ''}", *hidden,
        ])  # fmt: skip
    lines = [f"  {fqn or '(the model itself)'}: {why}" for fqn, why in list(skipped.items())[:_SHOWN]]
    if len(skipped) > _SHOWN:
        lines.append(f"  and {len(skipped) - _SHOWN} more")
    remedy = "none of these can be selected" if impossible else "pass filter_fn(module, fqn). Candidates"
    sparse = sum(why == _SPARSE for why in skipped.values())
    if sparse:
        rest = "" if sparse == len(skipped) else ", the others are left out"
        remedy = f"{sparse} Linears are sparse already{rest}; call densify_(model) first, then prune_ or sparsify_"
    return "\n".join([f"select_linears: nothing selected in {name}; {remedy}:", *lines, *hidden])


def own_forward(linear: nn.Linear) -> str | None:
    """Why this Linear computes something else than a Linear does; None where it does not."""
    if "forward" in vars(linear):
        return "its forward was replaced, which a sparse layer would lose"
    kind = type(linear)
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    for name in ("forward", "__call__"):
        if getattr(kind, name) is not getattr(nn.Linear, name) and not ours:
            return f"{kind.__name__} has a {name} of its own, which a sparse layer would lose"
    return None
