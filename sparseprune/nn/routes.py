"""Which way a call of a SparseLinear takes: the one place that decides, for ``forward`` and for ``explain``."""

from __future__ import annotations

import functools
import math
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native, backends, native
from .direct import is_plain, is_tracing, is_transformed, why_not_native
from .forms import Form, Forms

__all__ = ["GRADIENT", "Call", "Route", "choose_packed_route", "choose_route", "in_graph"]


class Call(Enum):
    """What a route calls."""

    DIRECT = "the compiled core, past torch's dispatcher"
    PACKED = "packed_linear"
    INFERRED = "inferred_linear, which a compiled graph can hold"
    TRAINED = "trained_linear, which has gradients"
    CANONICAL = "the op of the layout, which can do everything"
    UNPACKED = "torch's dense product on a GPU, with the weight unpacked"
    REFUSED = "nothing: the tensors that it needs are not there"


#: Why a layer of packed forms alone refuses a call, where it is no matter of the input.
GRADIENT = "a gradient is needed"


class Route(NamedTuple):
    """The way of one call: what it calls, the form it multiplies with (None: that of training, or the layout itself),
    and why it is not direct.
    """

    call: Call
    form: Form | None
    why: str = ""


def choose_route(
    input: Tensor,
    others: tuple[Tensor | None, ...],
    values: Tensor,
    bias: Tensor | None,
    forms: Forms,
    dense_from: int | None,
    training: bool,
) -> Route:
    """input: `[..., K]`; others: what else takes part, as a residual; values, bias, forms, dense_from, training: the
    layer's own. What it says holds for this grad mode, autocast and graph, now.
    """
    why = why_not_native(input, bias, values, *others)
    if why is None:
        if input.dtype in native.linear.DTYPES and values.dtype in native.linear.DTYPES:
            return _direct(_form_for(input, forms, dense_from))
        why = f"needs float32, bfloat16 or float16, got {input.dtype} and values in {values.dtype}"
    _refuse_onnx()
    if not torch.compiler.is_compiling() and is_tracing():  # which keeps all but parameters and buffers as constants
        return Route(Call.CANONICAL, None, f"{why}; what is loaded into the traced module may have another structure")
    why_not_packed = _why_not_packed(input, values)
    needs_grad = _needs_grad(input, *others, bias, values)
    if why_not_packed:
        why = f"{why}; {why_not_packed}" if why_not_packed not in why else why
        plain = not (needs_grad or training or in_graph() or is_transformed() or backends.forced_backend())
        if values.device.type == "cuda" and plain and _dense(input, dense_from):
            return Route(Call.UNPACKED, None, why)
        return Route(Call.CANONICAL, None, why)
    graph = in_graph()
    if needs_grad or training:
        if graph and not forms.known(forms.forward, forms.backward):
            return Route(
                Call.CANONICAL, None, f"{why}; call train() before compiling, to pack what training reads"
            )
        return Route(Call.TRAINED, None, why)
    form = _form_for(input, forms, dense_from)
    if graph and not forms.known(form._replace(unpacked=False)):
        return Route(Call.CANONICAL, None, f"{why}; call the layer once before compiling, to pack it")
    return Route(Call.INFERRED if graph else Call.PACKED, form, why)


def choose_packed_route(
    input: Tensor, others: tuple[Tensor | None, ...], bias: Tensor | None, forms: Forms, like: Tensor
) -> Route:
    """:func:`choose_route` for a layer that has its packed forms alone. like: empty, of the dtype of its values."""
    form, why = forms.for_rows(math.prod(input.shape[:-1])), why_not_native(input, bias, *others)
    if why is None and input.dtype in native.linear.DTYPES and like.device.type == "cpu":
        return _direct(form)
    _refuse_onnx()
    if _needs_grad(input, *others, bias):
        return Route(Call.REFUSED, None, GRADIENT)
    why = why or f"needs float32, bfloat16 or float16, got {input.dtype}"
    if like.device.type == "cuda" and not is_transformed():
        return Route(Call.PACKED, form, why)
    why_not_packed = _why_not_packed(input, like)
    if why_not_packed:
        return Route(Call.CANONICAL, None, f"{why}; {why_not_packed}" if why_not_packed not in why else why)
    return Route(Call.PACKED, form, why)


def _refuse_onnx() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError("ONNX export expected dense layers, got a SparseLinear: densify_(model) first")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@functools.cache
def _direct(form: Form) -> Route:
    return Route(Call.DIRECT, form)


def in_graph() -> bool:
    """Whether the call is being compiled or traced: it then packs nothing itself."""
    return torch.compiler.is_compiling() or is_tracing()


def _form_for(input: Tensor, forms: Forms, dense_from: int | None) -> Form:
    """What inference multiplies with: the unpacked weight from ``dense_from`` rows on, else a packed form."""
    return forms.unpacked if _dense(input, dense_from) else forms.for_rows(math.prod(input.shape[:-1]))


def _dense(input: Tensor, dense_from: int | None) -> bool:
    return dense_from is not None and math.prod(input.shape[:-1]) >= dense_from


def _why_not_packed(input: Tensor, values: Tensor) -> str:
    """Why no packed form serves this call; empty where one does."""
    if _native.C is None:
        return _native.why_no_c() or ""
    if not is_plain(values):
        return f"packs strided CPU tensors, got values as {type(values).__name__} on {values.device}"
    if is_transformed():
        return "a functorch transform is active"
    if input.device.type != "cpu" or torch.float64 in (input.dtype, values.dtype):
        return f"packs for the CPU and up to float32, got {input.dtype} on {input.device}, values {values.dtype}"
    forced = backends.forced_backend()
    return "" if forced in (None, "native") else f"SPARSEPRUNE_BACKEND={forced} asks for another backend"
