"""Weights that no Linear holds: experts as one tensor, Conv1D, embeddings. Pruning passes them over, so that a density
of the Linears says nothing about them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from .expose import is_conv1d
from .linear import SparseLinear
from .packed_only import PackedLinear

__all__ = ["count_parameters", "describe_weights", "other_weights"]

#: Share of all parameters from which on a group of weights is listed.
_SIZEABLE = 0.01


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters, tied ones once, those of a SparseLinear counted dense."""
    return _total(model, _parameters(model))


def other_weights(model: nn.Module) -> dict[str, str]:
    """Name of a parameter of two or more dimensions that is no weight of a Linear -> what it is and its share of the
    model's parameters (see :func:`describe_weights`).
    """
    found = _parameters(model)
    total = _total(model, found)
    others = []
    for fqn, (module, name, parameter) in found.items():
        ours = isinstance(module, SparseLinear) or (isinstance(module, nn.Linear) and name == "weight")
        if not ours and not isinstance(parameter, UninitializedParameter) and parameter.dim() >= 2:
            others.append((fqn, tuple(parameter.shape), _what(module)))
    return describe_weights(others, total)


def describe_weights(weights: Iterable[tuple[str, tuple[int, ...], str]], total: int) -> dict[str, str]:
    """weights: (name, shape, what it is) each; total: entries of the whole model. Names that differ in the number of a
    layer only are one line, ``layers.*.experts.gate_up_proj``; lines below a hundredth of the total are left out.
    """
    groups: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for fqn, shape, what in weights:
        groups.setdefault(re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", fqn), []).append((shape, what))
    lines = {}
    for pattern, members in groups.items():
        share = sum(torch.Size(shape).numel() for shape, _ in members) / max(1, total)
        if share < _SIZEABLE:
            continue
        shapes = list(dict.fromkeys(shape for shape, _ in members))
        shown = ", ".join(str(list(shape)) for shape in shapes[:3]) + (", ..." if len(shapes) > 3 else "")
        whats = ", ".join(dict.fromkeys(what for _, what in members if what))
        times = f"{len(members)} x " if len(members) > 1 else ""
        lines[pattern] = f"{times}{shown}{f' of {whats}' if whats else ''}, {share:.3f} of all parameters"
    return lines


def _what(module: nn.Module) -> str:
    name = type(module).__name__
    if is_conv1d(module) or isinstance(module, nn.MultiheadAttention):
        return f"{name} (expose_linears_ gives it Linears)"
    return name


def _parameters(model: nn.Module) -> dict[str, tuple[nn.Module, str, Tensor]]:
    """Name -> the module that holds it, its name there, and the parameter; a tied one under its first name.

    A Linear's weight comes before what is tied to it: a head that shares an embedding is no weight elsewhere.
    """
    found: dict[int, tuple[str, tuple[nn.Module, str, Tensor]]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            linear = isinstance(module, nn.Linear) and name == "weight"
            if id(parameter) not in found or linear:
                found[id(parameter)] = (f"{prefix}.{name}" if prefix else name, (module, name, parameter))
    return dict(found.values())


def _total(model: nn.Module, parameters: dict[str, tuple[nn.Module, str, Tensor]]) -> int:
    packed = [m for m in model.modules() if isinstance(m, PackedLinear)]  # their values are no parameters
    found = sum(_entries(module, name, p) for module, name, p in parameters.values())
    return found + sum(m.out_features * m.in_features for m in packed)


def _entries(module: nn.Module, name: str, parameter: Tensor) -> int:
    if isinstance(module, SparseLinear) and name == "values":
        return module.out_features * module.in_features
    return 0 if isinstance(parameter, UninitializedParameter) else parameter.numel()
