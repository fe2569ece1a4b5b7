"""Which kernel a layer's call runs, and why not another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _native, backends
from ..device_memory import may_remember
from ..ops.linear import autocast_input
from .linear import SparseLinear
from .packed_only import PackedLinear
from .rounded import RoundedLinear
from .routes import Call, Route
from .sparsify.reports import why_dense
from .stacks import StackForward, stack_of, why_layers

__all__ = ["explain"]

_LEARNS = "  unpacked at every call; requires_grad_(False) on the layer spares that"


def explain(layer: nn.Module, input: Tensor | None = None, *more: Any, **options: Any) -> str:
    """Which kernel runs ``layer(input)`` now, under this grad mode and autocast, and why the others do not.

    layer: a :class:`SparseLinear`, a :class:`RoundedLinear` or any other ``nn.Linear``, which is dense, input: `[...,
    K]`; or the module that loops over a stack of layers (``report.stacks`` names it), and, where it has a program, all
    that it is called with. Returns lines of text: the layer, the kernel that runs, and the reasons against each other
    one. Nothing is computed. TypeError on another module, ValueError on an input that the layer does not take.
    """
    stack = stack_of(layer)
    if stack is not None:
        return _stack(stack, (*([] if input is None else [input]), *more), options)
    why = why_layers(layer)
    if why is not None:
        return f"{type(layer).__name__}: this stack runs layer by layer because {why}"
    if not isinstance(layer, SparseLinear | nn.Linear) or input is None or more or options:
        raise TypeError(
            "explain: expected a SparseLinear or an nn.Linear and its input, got "
            f"{_given(layer, input, len(more) + len(options))}; give a layer of the model, as "
            "model.get_submodule(name), or the module that loops over a stack of layers"
        )
    if input.dim() == 0 or input.shape[-1] != layer.in_features or not input.dtype.is_floating_point:
        raise ValueError(
            f"explain: input expected [..., {layer.in_features}] in floating point, got {list(input.shape)} in "
            f"{input.dtype}: the call is an error"
        )
    about = f" on x {list(input.shape)} {input.dtype} {input.device}"
    if isinstance(layer, SparseLinear):
        # The factors of a low-rank term reach the product as its residual, with the gradient they want.
        route = layer.route(input, layer.low_rank_a, layer.low_rank_b)
        lines = [f"SparseLinear({layer.extra_repr()})" + about, *_sparse(layer, input, route)]
        if layer.low_rank_a is not None:
            lines.append(f"and two dense F.linear of rank {layer.low_rank_a.shape[0]}, added to the result")
        return "\n".join(lines)
    lines = [f"{type(layer).__name__}({layer.extra_repr()})" + about]
    if not isinstance(layer, RoundedLinear):
        return "\n".join([*lines, *_dense(layer)])
    reason = layer.why_exact(input)
    if reason is not None:
        return "\n".join([*lines, f"dense: F.linear on the exact weight: {reason}"])
    tier = _native.require_c().tier()
    lines.append(f"direct call, past torch's dispatcher: native.rounded.rounded_linear, tier {tier}")
    return "\n".join([*lines, _checked(layer.weight)])


def _given(layer: nn.Module, input: Tensor | None, more: int) -> str:
    name = type(layer).__name__
    if not isinstance(layer, SparseLinear | nn.Linear):
        return name
    return f"{name} alone" if input is None else f"{name}, its input and {more} more"


def _stack(stack: StackForward, inputs: tuple[Any, ...], options: dict[str, Any]) -> str:
    found = stack.answered_by(*inputs, **options)
    layers = len(stack.owner.get_submodule(stack.name)._modules)
    about = f"{type(stack.owner).__name__}, {layers} layers in {stack.name!r}: "
    if isinstance(found, str):
        return about + f"one by one: {found}"
    steps = len(found.program.steps)
    return about + f"one native call of {steps} steps, tier {_native.require_c().tier()}, reads {found.nbytes} bytes"


def _dense(layer: nn.Linear) -> list[str]:
    """Why a layer is dense: how many zeros there are to gain from, and what sparsify_ found."""
    weight, lines = layer.weight, ["dense: F.linear"]
    if weight.layout is torch.strided and not weight.is_meta and weight.numel():
        zeros = 1.0 - float(torch.count_nonzero(weight.detach())) / weight.numel()
        lines[0] += f"; {zeros:.4f} of its weight is zero"
    reason = why_dense(layer)
    lines.append(f"  left dense by sparsify_: {reason}" if reason else "  sparsify_ has not looked at it")
    return lines


def _checked(weight: Tensor) -> str:
    frozen = not weight.requires_grad and not weight.is_inference()
    text = "frozen: trusted by the version counter" if frozen else "compared with what was packed at every call"
    return f"  weight {text}" + ("" if frozen else "; requires_grad_(False) on the layer spares that")


def _checked_values(layer: SparseLinear) -> str:
    if isinstance(layer, PackedLinear):
        return "  kept packed: there is nothing else that could change"
    return _checked(layer.values)


def _sparse(layer: SparseLinear, input: Tensor, route: Route) -> list[str]:
    if route.call is Call.DIRECT and route.form is not None:
        if route.form.unpacked:
            return [f"F.linear on the unpacked weight: dense from {layer.dense_from} rows on", _checked(layer.values)]
        packed = layer._packed(route.form)
        return [
            f"direct call, past torch's dispatcher: native.linear.linear, tier {_native.require_c().tier()}",
            f"  packed: {packed.nbytes} bytes, plan {packed.plan}, values {packed.values.dtype}",
            _checked_values(layer),
        ]
    if route.call is Call.REFUSED:
        return [f"nothing, the call is a RuntimeError: {route.why}, and only packed forms are kept"]
    if route.call is Call.UNPACKED:
        text = f"F.linear on the unpacked weight: dense from {layer.dense_from} rows on"
        return [text, "  unpacked once, since its values want no gradient" if may_remember(layer.values) else _LEARNS]
    lines = [f"through torch's dispatcher: {route.why}"]
    x, bias = autocast_input(input), layer.bias
    if route.call is Call.TRAINED:
        forward, backward = layer._structure(layer._forms.forward), layer._structure(layer._forms.backward)
        parts = (p for s in (forward, backward) for p in (s.index, s.offsets, s.perm, s.plan))
        return [*lines, backends.explain_op("trained_linear", x, layer.values, bias, *parts)]
    if route.form is not None and route.form.unpacked:
        return [*lines, f"F.linear on the unpacked weight: dense from {layer.dense_from} rows on"]
    if route.form is not None:
        p = layer._packed(route.form)
        told = backends.explain_op(
            "packed_linear", x, p.values, p.index, p.offsets, p.scale, bias, None, p.plan, layer.activation
        )
        return [*lines, told, _checked_values(layer)]
    return [*lines, *_by_layout(layer, x)]


def _by_layout(layer: SparseLinear, x: Tensor) -> list[str]:
    """The op of the layer's layout and, where gradients will be asked for, those of its backward."""
    values, bias = layer.values, layer.bias
    dy = x.new_empty((*x.shape[:-1], layer.out_features))
    calls: list[tuple[str, tuple]]
    if layer.layout == "nm":
        assert layer.nm is not None
        calls = [
            ("nm_linear", (x, values, layer.indices, *layer.nm, bias, layer.activation)),
            ("nm_linear_dx", (dy, values, layer.indices, *layer.nm, layer.in_features)),
            ("nm_sddmm", (x, dy, layer.indices, *layer.nm)),
        ]
    else:
        indices = layer.crow_indices, layer.col_indices
        calls = [
            (f"{layer.layout}_linear", (x, *indices, values, bias, layer.activation)),
            ("csr_linear_dx", (dy, *indices, values, layer.in_features)),
            ("sddmm", (x, dy, *indices, *(layer.blocksize or (1, 1)))),
        ]
    told = [backends.explain_op(calls[0][0], *calls[0][1])]
    if torch.is_grad_enabled() and x.requires_grad:
        told.append("backward, for the input: " + backends.explain_op(calls[1][0], *calls[1][1]))
    if torch.is_grad_enabled() and values.requires_grad:
        told.append("backward, for the values: " + backends.explain_op(calls[2][0], *calls[2][1]))
    return told
