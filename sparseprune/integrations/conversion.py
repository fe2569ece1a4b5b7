"""Encoded tensors among those of a transformers model: written, and read back one weight at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, build_glob_alternation

from .. import encodings, layouts
from ..checkpoint.structure import prefixed
from ..nn import MaskedLinear, SparseLinear
from ..nn.packed_only import PackedLinear, without_canonical
from .placeholder import spec_of, spec_tensor

__all__ = ["PARTS", "Decode", "decoded_state", "encoded_state", "noting_failures"]

PARTS = ("spec", "values", "index", "crow", "scale")
_failures: ContextVar[list[str] | None] = ContextVar("sparseprune_failures", default=None)
_PRUNED = 0.05  # share of zeros from which a dense layer's weight counts as pruned, and its values may be rounded


def encoded_state(model: nn.Module, value_dtype: str, given: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state dict with its sparse layers, and the pruned weights of dense ones, encoded; ``value_dtype``:
    "float32" leaves the kept ones as they are, "bfloat16" and "int8" round. ``given``: a state dict of this model whose
    tensors are taken instead of its own.

    ValueError where the tensors that are given for a sparse layer are missing or do not agree.
    """
    with without_canonical():
        state: dict[str, Tensor] = dict(model.state_dict() if given is None else given)
    owners: dict[int, int] = {}  # tied weights are left to transformers, which writes one of them
    for tensor in state.values():
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
            owners[tensor.data_ptr()] = owners.get(tensor.data_ptr(), 0) + 1
    how = None if value_dtype == "float32" else value_dtype
    for fqn, module in model.named_modules():
        if isinstance(module, SparseLinear):
            held = {name: state.pop(prefixed(fqn, name), None) for name in module.canonical_names}
            extra = [module.blocksize] if module.blocksize else []
            layout = module.layout_to_save(value_dtype) if isinstance(module, PackedLinear) else module.to_layout()
            if given is not None:
                layout = _given(fqn, layout, held)
            dense, quads = layout.to_dense().detach(), module.activations == "int8"
            _put(state, prefixed(fqn, "values"), encodings.encode(dense, how, extra, quads))
            continue
        for name, own in module.named_parameters(recurse=False):
            whole = prefixed(fqn, name)
            weight = own if given is None else state.get(whole)
            ours = isinstance(module, nn.Linear) and name == "weight"
            if weight is None or not (ours or weight.dim() == 3) or weight.is_meta or not weight.is_floating_point():
                continue
            kind = str(weight.dtype).removeprefix("torch.")
            zeros = float((weight == 0).float().mean()) if weight.numel() else 0.0
            if zeros < _PRUNED or owners.get(weight.data_ptr(), 0) != 1 or kind not in encodings.DTYPES:
                continue
            made = encodings.encode(weight.detach().reshape(-1, weight.shape[-1]), how)
            if made.nbytes < weight.numel() * weight.element_size():
                del state[whole]
                _put(state, whole, made)
    return state


def _given(fqn: str, layout: layouts.Layout, held: Mapping[str, Tensor | None]) -> layouts.Layout:
    """The layout with these tensors. ValueError unless all are there and agree."""
    found: dict[str, Any] = {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}
    try:
        if len(found) != len(held):
            raise ValueError(f"expected {', '.join(sorted(held))}, got {', '.join(sorted(found)) or 'none of them'}")
        layout = replace(layout, **found)
        layout.validate()
    except ValueError as error:
        raise ValueError(
            f"save_pretrained: state_dict, {fqn}: {error}; pass what model.state_dict() gives, or "
            "model.load_state_dict(state_dict) first and save without it"
        ) from None
    return layout


def _put(state: dict[str, Tensor], name: str, made: encodings.Encoded) -> None:
    state[f"{name}::spec"] = spec_tensor(made.spec())
    state.update({f"{name}::{part}": tensor for part, tensor in made.tensors.items()})


def decoded_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every encoded tensor dense again, under the name ``weight``, which a SparseLinear takes too.

    ValueError where parts are missing or do not agree, or the model has no such weight.
    """
    found = dict(state)
    parts: dict[str, dict[str, Tensor]] = {}
    for name in state:
        whole, separator, part = name.rpartition("::")
        if separator and part in PARTS:
            parts.setdefault(whole, {})[part] = found.pop(name)
    for whole, tensors in parts.items():
        fqn, _, name = whole.rpartition(".")
        name = "weight" if name == "values" else name
        try:
            module: Any = model.get_submodule(fqn)
            shape = (module.out_features, module.in_features) if name == "weight" else getattr(module, name).shape
        except AttributeError:
            raise ValueError(f"load_state_dict: {type(model).__name__} has no {prefixed(fqn, name)}") from None
        try:
            found[prefixed(fqn, name)] = _dense(tensors, tuple(shape))
        except ValueError as error:
            raise ValueError(f"load_state_dict: {whole}: {error}") from None
    return found


def _dense(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
    if "spec" not in parts:
        raise ValueError(f"expected its parts together, got {sorted(parts)}; use files that are not cut within a layer")
    spec = spec_of(parts["spec"].cpu())
    rows = 1
    for size in shape[:-1]:
        rows *= size
    if tuple(spec["shape"]) != (rows, shape[-1]):
        raise ValueError(f"expected shape {list(shape)} as in the model, got {spec['shape']}")
    held = {part: tensor.cpu() for part, tensor in parts.items() if part != "spec"}
    return encodings.decode(spec, held).view(shape)


@contextmanager
def noting_failures() -> Iterator[list[str]]:
    """Gives the list of what could not be decoded within it: transformers logs that, and raises an error without it."""
    failed: list[str] = []
    token = _failures.set(failed)
    try:
        yield failed
    finally:
        _failures.reset(token)


class Decode(ConversionOps):
    """The parts of one weight -> the weight, or the tensors of a SparseLinear, in the dtype that the model asks for."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # its being there keeps the parts from being cast

    def __deepcopy__(self, memo: Any) -> Decode:
        return Decode(self.hf_quantizer)

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = None, target_patterns: Any = None, *,
        full_layer_name: str = "", model: Any = None, missing_keys: Any = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        try:
            return self._decoded(input_dict, full_layer_name, model)
        except ValueError as error:
            failed = _failures.get()
            if failed is not None:
                failed.append(f"{full_layer_name}: {error}")
            raise

    def _decoded(self, input_dict: dict[str, Any], full_layer_name: str, model: Any) -> dict[str, Any]:
        parts = {}
        for pattern, tensors in input_dict.items():
            if len(tensors) != 1:
                raise ValueError(f"{pattern} expected one tensor, got {len(tensors)}")
            parts[pattern.removeprefix("::").removesuffix("$")] = tensors[0]
        fqn, _, name = full_layer_name.rpartition(".")
        module = model.get_submodule(fqn)
        reference = getattr(module, name)
        dtype = _wanted_dtype(model, full_layer_name, reference.dtype)
        where = next(iter(parts.values())).device
        if not isinstance(module, SparseLinear):
            dense = _dense(parts, tuple(reference.shape))
            if isinstance(module, MaskedLinear) and dense.shape != module.mask.shape:
                raise ValueError(f"expected {list(module.mask.shape)}, got {list(dense.shape)}")
            return {full_layer_name: dense.to(where, dtype)}
        dense = _dense(parts, (module.out_features, module.in_features))
        layout = layouts.from_dense(dense, module.layout, module.blocksize, module.nm)
        self.hf_quantizer.awaited.discard(full_layer_name)
        made = {prefixed(fqn, n): t.to(where) for n, t in layout.tensors().items()}
        made[full_layer_name] = made[full_layer_name].to(dtype)
        return made


def _wanted_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Some models keep some of their weights wider than the rest."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        pattern, by_group, _ = build_glob_alternation(list(plan))
        found = pattern.search(name)
        if found is not None and found.lastgroup is not None:
            return plan[by_group[found.lastgroup]]
    return dtype
