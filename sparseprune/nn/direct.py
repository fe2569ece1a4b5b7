"""Whether a kernel of the compiled core may be called past torch's dispatcher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _native, backends

__all__ = ["is_plain", "is_tracing", "is_transformed", "runs_direct", "why_not_direct", "why_not_native"]


_PLAIN = (Tensor, nn.Parameter)


@functools.cache
def _questions() -> tuple[Callable[[], Any], ...]:
    """What torch asks itself before it calls a kernel: whether it traces, the functorch level, the dispatch modes and
    the function modes. In a torch that has one no longer, its answer sends every call through the dispatcher.

    Looked up once: a language model calls its layers hundreds of times a token, each time with cold caches.
    """
    found = []
    for name in (
        "_is_tracing", "_functorch.peek_interpreter_stack", "_len_torch_dispatch_stack", "_len_torch_function_stack",
    ):  # fmt: skip
        function: Any = torch._C
        for part in name.split("."):
            function = getattr(function, part, None)
        found.append(function if callable(function) else lambda: True)
    return tuple(found)


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a strided tensor on the CPU and no subclass: one whose memory a kernel may read."""
    return type(tensor) in _PLAIN and tensor.layout is torch.strided and tensor.is_cpu


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records the call."""
    return bool(_questions()[0]())


def is_transformed() -> bool:
    """Whether a functorch transform is active: tensors may then be wrappers without memory of their own. A graph asks
    once, while it is traced, when the transforms in it are active too.
    """
    functorch = getattr(torch._C, "_functorch", None)  # asked anew: this is called in graphs too
    level = getattr(functorch, "peek_interpreter_stack", None)
    return level is None or level() is not None


# What torch.compiler.assume_constant_result does, without the import of torch._dynamo, which takes long.
is_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_direct(*tensors: Tensor | None) -> str | None:
    """None where a kernel may be called directly, past torch's dispatcher; else what is in the way.

    The dispatcher is passed by only where nothing could tell the difference: plain CPU tensors, no gradient, no mode,
    no functorch level, no autocast, no tracing, no compilation.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return "the call is being compiled or traced"
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass"
        if tensor.layout is not torch.strided or not tensor.is_cpu:
            return f"needs strided CPU tensors, got {tensor.layout} on {tensor.device}"
        if tensor.is_neg():
            return "the sign of a tensor waits in its negative bit"
        if grad and tensor.requires_grad:
            return "a gradient is needed"
    _, functorch_level, dispatch_modes, function_modes = _questions()
    if dispatch_modes() or function_modes():
        return "a torch dispatch or function mode is active"
    if functorch_level() is not None:
        return "a functorch transform is active"
    if getattr(forward_ad, "_current_level", 0) >= 0:
        return "forward-mode differentiation is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is active"
    return None


def why_not_native(*tensors: Tensor | None) -> str | None:
    """:func:`why_not_direct`, and whether the compiled core is there and not passed over by SPARSEPRUNE_BACKEND."""
    if _native.C is None:
        return _native.why_no_c()
    reason = why_not_direct(*tensors)
    if reason is None and (forced := backends.forced_backend()) not in (None, "native"):
        return f"SPARSEPRUNE_BACKEND={forced} asks for another backend"
    return reason


def runs_direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel of the compiled core is called directly on these."""
    return why_not_native(*tensors) is None
