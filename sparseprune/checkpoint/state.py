"""A model's state apart from the model: dense tensors by name, and the structure that load brings back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..layouts import Layout
from ..nn import MaskedLinear, RoundedLinear, SparseLinear
from ..nn.fusion import is_fused
from ..nn.packed_only import PackedLinear, without_canonical
from ..nn.replace import replace_
from ..nn.stacks import layered_prompts, stacks_in_use
from ..packing import VALUE_DTYPES
from .error import CheckpointError
from .structure import Structure, prefixed

__all__ = ["INFERENCE", "State", "check_value_dtype", "gather", "how", "options_of", "round_as_", "unwrapped"]

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
#: Instead of a dtype of kept values: each layer's own, of inference.
INFERENCE = "inference"


@dataclass
class State:
    """``tensors``: name -> dense tensor, no two of them the same one; ``structure``: the rest, nothing encoded yet."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    structure: Structure = field(default_factory=Structure)


@contextlib.contextmanager
def unwrapped(model: nn.Module) -> Iterator[nn.Module]:
    """The model inside what torch.compile, data parallelism and torch's checkpoint_wrapper put around it, whose names
    are those of the file. Parts that were wrapped by themselves stand there plain meanwhile.
    """
    model = _inside(model)
    wrapped = [
        (parent, name, child, inner)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and (inner := _inside(child)) is not child
    ]
    for parent, name, _, inner in wrapped:
        parent._modules[name] = inner
    try:
        yield model
    finally:
        for parent, name, child, inner in wrapped:
            if parent._modules[name] is inner:  # else load has put another layer there, which is not wrapped
                parent._modules[name] = child


def _inside(model: nn.Module) -> nn.Module:
    inner: nn.Module | None = model
    while inner is not None:
        model = inner
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:  # by name: to import the compiler takes seconds
            inner = next((model._modules[name] for name in _WRAPPED if name in model._modules), None)
    return model


def check_value_dtype(value_dtype: str) -> None:
    """CheckpointError unless kept values can be stored so."""
    if value_dtype not in (*VALUE_DTYPES, INFERENCE):
        known = ", ".join((*VALUE_DTYPES, INFERENCE))
        raise CheckpointError(f"save: value_dtype expected one of {known}, got {value_dtype!r}")


def gather(model: nn.Module, value_dtype: str = "float32") -> State:
    """Every tensor of the model's state dict, a SparseLinear's as its dense weight, and how the layers ran.
    value_dtype: what kept values will be stored as.

    CheckpointError on state that is no plain tensor with memory, and on layers that keep only rounded values.
    """
    check_value_dtype(value_dtype)
    with unwrapped(model) as inside, without_canonical():
        return _gather(inside, value_dtype)


def _gather(model: nn.Module, value_dtype: str) -> State:
    structure = Structure(
        fused=is_fused(model), programs=stacks_in_use(model), layered_prompts=layered_prompts(model)
    )
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    dense: dict[int, Tensor] = {}  # a layer under two names has one weight
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear):
            for name in module.canonical_names:
                found.pop(prefixed(fqn, name), None)
            if id(module) not in dense:
                _check_plain(prefixed(fqn, "values"), module.like)
                dense[id(module)] = _exact(fqn, module, value_dtype).to_dense()
            found[prefixed(fqn, "weight")] = dense[id(module)]
            structure.sparse[fqn] = how(module)
        elif isinstance(module, MaskedLinear):
            structure.masked.append(fqn)
        elif isinstance(module, RoundedLinear):
            structure.rounded[fqn] = [module.rows, module.value_dtype]
        if isinstance(module, SparseLinear | nn.Linear):
            structure.linears[fqn] = [module.out_features, module.in_features]
    state = State(structure=structure)
    first: dict[tuple[Any, ...], str] = {}
    for name, value in found.items():
        _check_plain(name, value)
        tensor = value.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            structure.ties[name] = first[key]
            continue
        first[key] = name
        state.tensors[name] = tensor
    return state


def _exact(fqn: str, layer: SparseLinear, value_dtype: str) -> Layout:
    if not isinstance(layer, PackedLinear):
        return layer.to_layout()
    if value_dtype == INFERENCE:
        value_dtype = layer.value_dtype
    why = layer.why_not_save(value_dtype)
    if why is not None:
        raise CheckpointError(f"save: {fqn}: {why}")
    return layer.layout_to_save(value_dtype)


def _check_plain(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise CheckpointError(f"save: {name} expected a tensor, got {type(value).__name__}; it cannot be stored")
    if nn.parameter.is_lazy(value):
        raise CheckpointError(f"save: {name} expected a size, got a lazy one; run the model once first")
    if is_traceable_wrapper_subclass(value):
        raise CheckpointError(
            f"save: {name} expected a plain tensor, got {type(value).__name__}; gather or dequantise it first"
        )
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise CheckpointError(
            f"save: {name} expected a strided tensor with memory, got {value.layout} {value.dtype} on {value.device}"
        )


def how(layer: SparseLinear) -> dict[str, Any]:
    """How a SparseLinear ran: everything but its tensors, plain JSON."""
    return {
        "layout": layer.layout,
        "blocksize": list(layer.blocksize) if layer.blocksize else None,
        "nm": list(layer.nm) if layer.nm else None,
        "activation": layer.activation,
        "value_dtype": layer.value_dtype,
        **({"activations": layer.activations} if layer.activations != "float32" else {}),
        "tokens": list(layer.tokens),
        "dense_from": layer.dense_from,
        # Without this key an activation was that of a fusion, in files from before.
        **({"own_activation": True} if layer.activation != "none" else {}),
    }


def options_of(ran: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of SparseLinear, beside its tensors, that :func:`how` wrote down."""
    return {
        "activation": ran["activation"] if ran.get("own_activation") else "none",
        "value_dtype": ran["value_dtype"],
        "activations": ran.get("activations", "float32"),
        "tokens": ran["tokens"],
        "dense_from": ran.get("dense_from"),
    }


def round_as_(model: nn.Module, rounded: Mapping[str, list[Any]]) -> None:
    """Puts a RoundedLinear wherever :attr:`Structure.rounded` says so, one for a layer under two names."""
    replacements: dict[int, nn.Module] = {}
    for fqn, (rows, value_dtype) in rounded.items():
        linear = model.get_submodule(fqn)
        if isinstance(linear, nn.Linear):
            replacements[id(linear)] = RoundedLinear.from_linear(linear, rows, value_dtype)
    replace_(model, replacements)
