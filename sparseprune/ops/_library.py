"""The op library ``torch.ops.sparseprune`` and what ops of several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends, reference
from ..activations import ACTIVATIONS
from ..tensor_state import note_sampled

LIBRARY = torch.library.Library("sparseprune", "DEF")


def define(
    schema: str, op: str, fake: Callable[..., Any], mutates: tuple[int, ...] = (), gradient: bool = False
) -> None:
    """Defines ``sparseprune::op`` with this schema; running it goes to the backend that :func:`backends.choose` names.

    ``mutates``: positions of the arguments that the op writes (a tensor, or a list of them). Kernels write through raw
    pointers, which autograd cannot see, so their version counters are raised here: a tensor saved for backward and then
    written raises. ``gradient``: what it gives is the gradient of sparse values, which a step follows, also in graphs
    that run no formula of ours.
    """

    def run(*args: Any) -> Any:
        result = backends.choose(op, *args).run(*args)
        for position in mutates:
            if args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        if gradient:
            note_sampled()
        return result

    LIBRARY.define(schema)
    LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparseprune::{op}", fake, lib=LIBRARY)


def check_mask(op: str, tensor: Tensor, mask: Tensor) -> None:
    """ValueError unless mask is a bool tensor of the tensor's shape and device."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask expected dtype torch.bool, got {mask.dtype}; use mask.bool()")
    if mask.shape != tensor.shape:
        raise ValueError(f"{op}: mask expected shape {list(tensor.shape)}, got {list(mask.shape)}")
    if mask.device != tensor.device:
        raise ValueError(
            f"{op}: mask expected on {tensor.device}, got {mask.device}; use mask.to({str(tensor.device)!r})"
        )


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active, outside of graphs."""
    return not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """NotImplementedError where forward-mode differentiation goes through one of them: its tangent would be lost."""
    if not in_forward_mode():
        return
    if any(t is not None and _has_tangent(t) for t in tensors):
        raise NotImplementedError(
            f"{op}: no forward-mode derivative (jvp, jacfwd); use reverse mode (backward, torch.autograd.grad), or "
            "make the model dense first: densify_(model)"
        )


def _has_tangent(tensor: Tensor) -> bool:
    try:
        return forward_ad.unpack_dual(tensor).tangent is not None
    except RuntimeError:  # of vmap inside jvp, where tensors do not tell
        return True


def output_for(x: Tensor, rows: Any) -> Tensor:
    """Empty `[..., rows]` for x `[..., K]`."""
    return x.new_empty((*x.shape[:-1], rows))


def check_linear(op: str, x: Tensor, rows: int, columns: int | None, bias: Tensor | None, activation: str) -> None:
    """ValueError unless x `[..., columns]`, bias `[rows]` and the activation suit a product."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point():
        raise ValueError(f"{op}: x expected a floating dtype, got {x.dtype}; use x.float()")
    if x.dim() < 1:
        raise ValueError(f"{op}: x expected shape [..., K], got a scalar")
    refuse_tangents(op, x, bias)
    if columns is not None and x.shape[-1] != columns:
        raise ValueError(f"{op}: x expected {columns} features in its last dimension, got shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{op}: bias expected shape [{rows}], got {list(bias.shape)}")


def autocast_input(x: Tensor) -> Tensor:
    """x as F.linear would take it: in the autocast dtype where autocast is on for its device."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would record an op on these, or may: where torch.func differentiates, tensors do not tell."""
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in tensors) or in_func_grad()


def widest(x: Tensor, dy: Tensor) -> torch.dtype:
    """What sums of products of these are kept in: float32 or wider."""
    return torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)


def in_func_grad() -> bool:
    """Whether ``torch.func`` differentiates (grad, vjp, jacrev), which takes no gradient that an op registers. A graph
    asks once, while it is traced, when the transforms in it are active too.
    """
    stack = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)
    return stack is not None and any(level.key().name == "Grad" for level in stack() or ())


# What torch.compiler.assume_constant_result does, without the import of torch._dynamo, which takes long.
in_func_grad._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kernels() -> Any:
    """What a call that has a gradient computes with: the ops, or the reference, which torch differentiates, where it
    takes no gradient of theirs.
    """
    return reference if in_func_grad() else torch.ops.sparseprune


def backward_kernels() -> Any:
    """What a backward computes with: the ops, or, where its own gradient is wanted (``create_graph=True``), the
    reference, which torch differentiates.
    """
    return reference if torch.is_grad_enabled() else torch.ops.sparseprune


def bias_grad(dy: Tensor, bias_dtype: torch.dtype) -> Tensor:
    """dy: `[..., N_out]`; returns its sum over tokens, `[N_out]`, added up in float32 or wider."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    # no flatten, which gradients of many outputs at once (is_grads_batched, jacobian(vectorize=True)) do not have
    return (dy if dy.dim() == 1 else dy.sum(tuple(range(dy.dim() - 1)), dtype=wide)).to(bias_dtype)
