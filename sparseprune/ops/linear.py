"""Sparse matmul ops: y = activation(x W^T + bias) for csr, bsr, nm and packed weights, and their gradients.

x: `[..., K]`, K read from x; the result `[..., N_out]` has x's dtype; sums are float32 (float64 where x or values are).
Under autocast x is cast as ``F.linear`` casts it. activation: "none" | "relu" | "gelu" | "gelu_tanh" | "silu".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import layouts
from ..activations import activate
from ..packing import Packed, Plan, check_length
from ..tensor_state import gradients_at, place_of
from . import packing, sddmm  # noqa: F401  (their ops stand in the backward formulas)
from ._library import (
    LIBRARY,
    autocast_input,
    backward_kernels,
    bias_grad,
    check_linear,
    define,
    kernels,
    needs_grad,
    output_for,
    refuse_tangents,
)

__all__ = [
    "bsr_linear",
    "csr_linear",
    "inferred_linear",
    "layout_linear",
    "nm_linear",
    "packed_linear",
    "trained_linear",
]

_OPS = torch.ops.sparseprune


def _run(name: str, activation: str, tracked: tuple[Tensor | None, ...], *args: Any) -> Tensor:
    """Runs the op of this name on ``*args, activation``; where gradients are wanted the activation stands behind it,
    for torch to differentiate.
    """
    refuse_tangents("linear", *tracked)
    op = getattr(kernels(), name)
    if activation != "none" and needs_grad(*tracked):
        return activate(op(*args, "none"), activation)
    return op(*args, activation)


def _activation_grad(dy: Tensor, again: Callable[[], Tensor], activation: str) -> Tensor:
    """dy through the activation; ``again`` recomputes what went into it."""
    if activation == "none":
        return dy
    twice = torch.is_grad_enabled()
    with torch.enable_grad():
        z = again()
        if not (twice and z.requires_grad):
            z = z.detach().requires_grad_(True)
        return torch.autograd.grad(activate(z, activation), z, dy, create_graph=twice)[0]


# csr and bsr


def _fake_csr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return output_for(x, crow.shape[0] - 1)


def _fake_bsr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return output_for(x, (crow.shape[0] - 1) * values.shape[1])


def _fake_dx(dy: Tensor, crow: Tensor, col: Tensor, values: Tensor, k: int) -> Tensor:
    return output_for(dy, k)


_COMPRESSED = "Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, str activation"
define(f"csr_linear({_COMPRESSED}) -> Tensor", "csr_linear", _fake_csr)
define(f"bsr_linear({_COMPRESSED}) -> Tensor", "bsr_linear", _fake_bsr)
define(
    "csr_linear_dx(Tensor dy, Tensor crow_indices, Tensor col_indices, Tensor values, int k) -> Tensor",
    "csr_linear_dx",
    _fake_dx,
)


def _save_compressed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, crow, col, values, bias, ctx.activation = inputs
    ctx.place = place_of(values)  # here, for hooks of saved tensors may give the backward copies
    ctx.save_for_backward(x, crow, col, values, bias)


def _compressed_backward(op: str) -> Callable[..., tuple]:
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, crow, col, values, bias = ctx.saved_tensors
        dy = _activation_grad(dy, lambda: getattr(_OPS, op)(x, crow, col, values, bias, "none"), ctx.activation)
        wants_x, _, _, wants_values, wants_bias, _ = ctx.needs_input_grad
        run = backward_kernels()
        dx = run.csr_linear_dx(dy, crow, col, values, x.shape[-1]) if wants_x else None
        dvalues = None
        if wants_values:
            r, c = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
            with gradients_at(ctx.place):
                dvalues = run.sddmm(x, dy, crow, col, r, c).reshape(values.shape).to(values.dtype)
        dbias = bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
        return (None if dx is None else dx.to(x.dtype)), None, None, dvalues, dbias, None

    return backward


for _name in ("csr_linear", "bsr_linear"):
    torch.library.register_autograd(
        f"sparseprune::{_name}", _compressed_backward(_name), setup_context=_save_compressed, lib=LIBRARY
    )


def csr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """x: `[..., K]`; csr weight `[N_out, K]`: crow_indices int32 `[N_out + 1]`, col_indices int32 `[nnz]`, values
    `[nnz]`; bias `[N_out]`. Returns `[..., N_out]`. Differentiable in x, values and bias. The indices must be valid
    (``layouts.CSR.validate``).
    """
    x = autocast_input(x)
    check_linear("csr_linear", x, crow_indices.shape[0] - 1, None, bias, activation)
    if values.shape != col_indices.shape:
        raise ValueError(f"csr_linear: values expected shape {list(col_indices.shape)}, got {list(values.shape)}")
    return _run("csr_linear", activation, (x, values, bias), x, crow_indices, col_indices, values, bias)


def bsr_linear(
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """x: `[..., K]`; bsr weight `[N_out, K]`: crow_indices int32 `[N_out / r + 1]`, col_indices int32 `[nblocks]`,
    values `[nblocks, r, c]`; bias `[N_out]`. Returns `[..., N_out]`. Differentiable in x, values and bias.
    """
    x = autocast_input(x)
    if values.dim() != 3 or values.shape[0] != col_indices.shape[0]:
        raise ValueError(f"bsr_linear: values expected [{col_indices.shape[0]}, r, c], got {list(values.shape)}")
    _, r, c = values.shape
    check_linear("bsr_linear", x, (crow_indices.shape[0] - 1) * r, None, bias, activation)
    if x.shape[-1] % c:
        raise ValueError(f"bsr_linear: blocksize ({r}, {c}) must divide in_features, got {x.shape[-1]}; pad or use csr")
    return _run("bsr_linear", activation, (x, values, bias), x, crow_indices, col_indices, values, bias)


# nm


def _fake_nm(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    return output_for(x, values.shape[0])


define(
    "nm_linear(Tensor x, Tensor values, Tensor indices, int n, int m, Tensor? bias, str activation) -> Tensor",
    "nm_linear",
    _fake_nm,
)


define(
    "nm_linear_dx(Tensor dy, Tensor values, Tensor indices, int n, int m, int k) -> Tensor",
    "nm_linear_dx",
    lambda dy, values, indices, n, m, k: output_for(dy, k),
)


def _save_nm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, indices, ctx.n, ctx.m, bias, ctx.activation = inputs
    ctx.place = place_of(values)
    ctx.save_for_backward(x, values, indices, bias)


def _nm_backward(ctx: Any, dy: Tensor) -> tuple:
    x, values, indices, bias = ctx.saved_tensors
    dy = _activation_grad(dy, lambda: _OPS.nm_linear(x, values, indices, ctx.n, ctx.m, bias, "none"), ctx.activation)
    wants_x, wants_values, _, _, _, wants_bias, _ = ctx.needs_input_grad
    run = backward_kernels()
    dx = run.nm_linear_dx(dy, values, indices, ctx.n, ctx.m, x.shape[-1]).to(x.dtype) if wants_x else None
    dvalues = None
    if wants_values:
        with gradients_at(ctx.place):
            dvalues = run.nm_sddmm(x, dy, indices, ctx.n, ctx.m).to(values.dtype)
    dbias = bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
    return dx, dvalues, None, None, None, dbias, None


torch.library.register_autograd("sparseprune::nm_linear", _nm_backward, setup_context=_save_nm, lib=LIBRARY)


def nm_linear(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    n: int,
    m: int,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """x: `[..., K]`; nm weight: values and indices (uint8, place within the group of m) `[N_out, K / m * n]`; bias
    `[N_out]`. Returns `[..., N_out]`. Differentiable in x, values and bias.
    """
    x = autocast_input(x)
    check_linear("nm_linear", x, values.shape[0], None, bias, activation)
    if x.shape[-1] % m or values.shape[1] != x.shape[-1] // m * n or indices.shape != values.shape:
        raise ValueError(
            f"nm_linear: values and indices expected [N_out, K / m * n] with K = {x.shape[-1]}, n = {n}, m = {m}, "
            f"got {list(values.shape)} and {list(indices.shape)}"
        )
    return _run("nm_linear", activation, (x, values, bias), x, values, indices, n, m, bias)


def layout_linear(x: Tensor, layout: layouts.Layout, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x: `[..., K]`; any layout of `[N_out, K]`; returns `[..., N_out]` through the op of that layout."""
    if x.shape[-1] != layout.shape[1]:
        raise ValueError(f"{layout.layout}_linear: x expected {layout.shape[1]} features, got shape {list(x.shape)}")
    if isinstance(layout, layouts.CSR):
        return csr_linear(x, layout.crow_indices, layout.col_indices, layout.values, bias, activation)
    if isinstance(layout, layouts.BSR):
        return bsr_linear(x, layout.crow_indices, layout.col_indices, layout.values, bias, activation)
    return nm_linear(x, layout.values, layout.indices, layout.n, layout.m, bias, activation)


# packed

define(
    "packed_linear(Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor? scale, Tensor? bias, "
    "Tensor? residual, int[] plan, str activation) -> Tensor",
    "packed_linear",
    lambda x, values, index, offsets, scale, bias, residual, plan, activation: output_for(x, Plan(*plan).rows),
)


def packed_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x: `[..., K]`; returns activation(x W^T + bias) + residual, `[..., N_out]`. For inference: RuntimeError where a
    gradient would be needed (:func:`trained_linear` has one).
    """
    x = autocast_input(x)
    if needs_grad(x, bias, residual):
        raise RuntimeError("packed_linear has no gradient; use trained_linear, or torch.no_grad()")
    rows, columns = packed.shape
    check_linear("packed_linear", x, rows, columns, bias, activation)
    if residual is not None and residual.shape != (*x.shape[:-1], rows):
        raise ValueError(f"packed_linear: residual expected {[*x.shape[:-1], rows]}, got {list(residual.shape)}")
    return _OPS.packed_linear(
        x, packed.values, packed.index, packed.offsets, packed.scale, bias, residual, packed.plan, activation
    )


define(
    "inferred_linear(Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor perm, Tensor? bias, "
    "Tensor? residual, int[] plan, ScalarType dtype, bool dense, str activation) -> Tensor",
    "inferred_linear",
    lambda x, values, index, offsets, perm, bias, residual, plan, *rest: output_for(x, Plan(*plan).rows),
)


def inferred_linear(
    x: Tensor,
    values: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    dense: bool = False,
) -> Tensor:
    """:func:`packed_linear` from canonical values and a structure, ``packed``, whose own values are not read: for
    graphs that outlive the values. What is packed is kept with the structure until the values have changed.
    ``dense``: multiply with the unpacked weight, for many tokens. RuntimeError where a gradient would be needed.
    """
    x = autocast_input(x)
    if needs_grad(x, values, bias, residual):
        raise RuntimeError("inferred_linear has no gradient; use trained_linear, or torch.no_grad()")
    rows, columns = packed.shape
    check_linear("inferred_linear", x, rows, columns, bias, activation)
    if residual is not None and residual.shape != (*x.shape[:-1], rows):
        raise ValueError(f"inferred_linear: residual expected {[*x.shape[:-1], rows]}, got {list(residual.shape)}")
    check_length("inferred_linear", values, packed)
    return _OPS.inferred_linear(
        x, values, packed.index, packed.offsets, packed.perm, bias, residual, packed.plan, packed.values.dtype, dense,
        activation,
    )  # fmt: skip


define(
    "trained_linear(Tensor x, Tensor values, Tensor? bias, Tensor index, Tensor offsets, Tensor perm, int[] plan, "
    "Tensor t_index, Tensor t_offsets, Tensor t_perm, int[] t_plan) -> Tensor",
    "trained_linear",
    lambda x, values, bias, index, offsets, perm, plan, *transposed: output_for(x, Plan(*plan).rows),
)


def _save_trained(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bias, index, offsets, perm, ctx.plan, t_index, t_offsets, t_perm, ctx.t_plan = inputs
    ctx.place = place_of(values)
    ctx.save_for_backward(x, values, index, offsets, perm, t_index, t_offsets, t_perm)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _trained_backward(ctx: Any, dy: Tensor) -> tuple:
    x, values, index, offsets, perm, t_index, t_offsets, t_perm = ctx.saved_tensors
    dx = dvalues = dbias = None
    run = backward_kernels()
    if ctx.needs_input_grad[0]:
        wide = torch.promote_types(values.dtype, torch.float32)
        packed = run.gather_values(values, t_perm, wide)
        dx = run.packed_linear(dy, packed, t_index, t_offsets, None, None, None, ctx.t_plan, "none").to(x.dtype)
    if ctx.needs_input_grad[1]:
        with gradients_at(ctx.place):
            flat = run.packed_sddmm(x, dy, index, offsets, perm, ctx.plan, values.numel())
        dvalues = flat.view(values.shape).to(values.dtype)
    if ctx.needs_input_grad[2]:
        dbias = bias_grad(dy, ctx.bias_dtype)
    return dx, dvalues, dbias, None, None, None, None, None, None, None, None


torch.library.register_autograd(
    "sparseprune::trained_linear", _trained_backward, setup_context=_save_trained, lib=LIBRARY
)


def trained_linear(
    x: Tensor,
    values: Tensor,
    packed: Packed,
    packed_t: Packed,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """x: `[..., K]`; values: the canonical values (``layout.values``) of the weight whose structure ``pack(layout)``
    and ``pack(layout, transpose=True)`` hold; returns activation(x W^T + bias) + residual, `[..., N_out]`.

    Differentiable in x, values, bias and residual; the values enter the packed forms by one gather inside the op.
    """
    x = autocast_input(x)
    rows, columns = packed.shape
    check_linear("trained_linear", x, rows, columns, bias, activation)
    if packed_t.shape != (columns, rows):
        raise ValueError(f"trained_linear: packed_t expected the shape {[columns, rows]}, got {list(packed_t.shape)}")
    check_length("trained_linear", values, packed)
    refuse_tangents("trained_linear", values, residual)
    y = kernels().trained_linear(
        x,
        values,
        bias,
        packed.index,
        packed.offsets,
        packed.perm,
        packed.plan,
        packed_t.index,
        packed_t.offsets,
        packed_t.perm,
        packed_t.plan,
    )
    y = activate(y, activation)
    return y if residual is None else y + residual
