"""Sparse matmul ops: y = activation(x W^T + bias) for csr, bsr, nm, masked and packed weights, and what their
gradients need.

x: `[..., K]`, K read from x; the result `[..., N_out]` has x's dtype; sums are float32 (float64 where x or values are).
Under autocast x is cast as ``F.linear`` casts it. activation: "none" | "relu" | "gelu" | "gelu_tanh" | "silu".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import layouts, reference
from ..native.matmul import VALUE_DTYPES, Packed, nm_as_csr, pack_structure, quantise
from ..reference import ACTIVATIONS, activate
from ._library import LIBRARY, check_mask, define

__all__ = [
    "add_layer_norm",
    "bsr_linear",
    "csr_linear",
    "layout_linear",
    "masked_linear",
    "nm_linear",
    "pack",
    "packed_linear",
    "repack",
    "rms_norm",
    "rounded_linear",
    "sddmm",
    "trained_linear",
]

_OPS = torch.ops.sparseprune


def _out(x: Tensor, rows: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


def _check(op: str, x: Tensor, rows: int, columns: int | None, bias: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if not x.is_floating_point():
        raise ValueError(f"{op}: x expected a floating dtype, got {x.dtype}; use x.float()")
    if x.dim() < 1:
        raise ValueError(f"{op}: x expected shape [..., K], got a scalar")
    if columns is not None and x.shape[-1] != columns:
        raise ValueError(f"{op}: x expected {columns} features in its last dimension, got shape {list(x.shape)}")
    if bias is not None and tuple(bias.shape) != (rows,):
        raise ValueError(f"{op}: bias expected shape [{rows}], got {list(bias.shape)}")


def _autocast(x: Tensor) -> Tensor:
    """x as F.linear would take it: in the autocast dtype where autocast is on for its device."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _run(op: Callable[..., Tensor], activation: str, tracked: tuple[Tensor | None, ...], *args: Any) -> Tensor:
    """Runs ``op(*args, activation)``; where gradients are wanted the activation stands behind it, for torch to
    differentiate.
    """
    if activation != "none" and _needs_grad(*tracked):
        return activate(op(*args, "none"), activation)
    return op(*args, activation)


def _activation_grad(dy: Tensor, again: Callable[[], Tensor], activation: str) -> Tensor:
    """dy through the activation; ``again`` recomputes what went into it."""
    if activation == "none":
        return dy
    with torch.enable_grad():
        z = again().detach().requires_grad_(True)
        return torch.autograd.grad(activate(z, activation), z, dy)[0]


def _bias_grad(dy: Tensor, bias_dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(dy.dtype, torch.float32)
    return dy.reshape(-1, dy.shape[-1]).sum(0, dtype=wide).to(bias_dtype)


# csr and bsr


def _fake_csr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _out(x, crow.shape[0] - 1)


def _fake_bsr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    return _out(x, (crow.shape[0] - 1) * values.shape[1])


def _fake_dx(dy: Tensor, crow: Tensor, col: Tensor, values: Tensor, k: int) -> Tensor:
    return _out(dy, k)


def _fake_sddmm(x: Tensor, dy: Tensor, crow: Tensor, col: Tensor, r: int, c: int) -> Tensor:
    return x.new_empty((col.shape[0], r, c), dtype=_wide(x, dy))


def _wide(x: Tensor, dy: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)


_COMPRESSED = "Tensor x, Tensor crow_indices, Tensor col_indices, Tensor values, Tensor? bias, str activation"
define(f"csr_linear({_COMPRESSED}) -> Tensor", "csr_linear", _fake_csr)
define(f"bsr_linear({_COMPRESSED}) -> Tensor", "bsr_linear", _fake_bsr)
define(
    "csr_linear_dx(Tensor dy, Tensor crow_indices, Tensor col_indices, Tensor values, int k) -> Tensor",
    "csr_linear_dx",
    _fake_dx,
)
define(
    "sddmm(Tensor x, Tensor dy, Tensor crow_indices, Tensor col_indices, int r, int c) -> Tensor", "sddmm", _fake_sddmm
)


def _save_compressed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, crow, col, values, bias, ctx.activation = inputs
    ctx.save_for_backward(x, crow, col, values, bias)


def _compressed_backward(op: str) -> Callable[..., tuple]:
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, crow, col, values, bias = ctx.saved_tensors
        dy = _activation_grad(dy, lambda: getattr(_OPS, op)(x, crow, col, values, bias, "none"), ctx.activation)
        wants_x, _, _, wants_values, wants_bias, _ = ctx.needs_input_grad
        dx = _OPS.csr_linear_dx(dy, crow, col, values, x.shape[-1]) if wants_x else None
        dvalues = None
        if wants_values:
            r, c = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
            dvalues = _OPS.sddmm(x, dy, crow, col, r, c).reshape(values.shape).to(values.dtype)
        dbias = _bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
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
    x = _autocast(x)
    _check("csr_linear", x, crow_indices.shape[0] - 1, None, bias, activation)
    if values.shape != col_indices.shape:
        raise ValueError(f"csr_linear: values expected shape {list(col_indices.shape)}, got {list(values.shape)}")
    return _run(_OPS.csr_linear, activation, (x, values, bias), x, crow_indices, col_indices, values, bias)


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
    x = _autocast(x)
    if values.dim() != 3 or values.shape[0] != col_indices.shape[0]:
        raise ValueError(f"bsr_linear: values expected [{col_indices.shape[0]}, r, c], got {list(values.shape)}")
    _, r, c = values.shape
    _check("bsr_linear", x, (crow_indices.shape[0] - 1) * r, None, bias, activation)
    if x.shape[-1] % c:
        raise ValueError(f"bsr_linear: blocksize ({r}, {c}) must divide in_features, got {x.shape[-1]}; pad or use csr")
    return _run(_OPS.bsr_linear, activation, (x, values, bias), x, crow_indices, col_indices, values, bias)


# nm


def _fake_nm(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    return _out(x, values.shape[0])


define(
    "nm_linear(Tensor x, Tensor values, Tensor indices, int n, int m, Tensor? bias, str activation) -> Tensor",
    "nm_linear",
    _fake_nm,
)


def _save_nm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, indices, ctx.n, ctx.m, bias, ctx.activation = inputs
    ctx.save_for_backward(x, values, indices, bias)


def _nm_backward(ctx: Any, dy: Tensor) -> tuple:
    x, values, indices, bias = ctx.saved_tensors
    dy = _activation_grad(dy, lambda: _OPS.nm_linear(x, values, indices, ctx.n, ctx.m, bias, "none"), ctx.activation)
    wants_x, wants_values, _, _, _, wants_bias, _ = ctx.needs_input_grad
    crow, col = nm_as_csr(indices, ctx.n, ctx.m)
    dx = _OPS.csr_linear_dx(dy, crow, col, values.flatten(), x.shape[-1]).to(x.dtype) if wants_x else None
    dvalues = _OPS.sddmm(x, dy, crow, col, 1, 1).reshape(values.shape).to(values.dtype) if wants_values else None
    dbias = _bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
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
    x = _autocast(x)
    _check("nm_linear", x, values.shape[0], None, bias, activation)
    if x.shape[-1] % m or values.shape[1] != x.shape[-1] // m * n or indices.shape != values.shape:
        raise ValueError(
            f"nm_linear: values and indices expected [N_out, K / m * n] with K = {x.shape[-1]}, n = {n}, m = {m}, "
            f"got {list(values.shape)} and {list(indices.shape)}"
        )
    return _run(_OPS.nm_linear, activation, (x, values, bias), x, values, indices, n, m, bias)


def layout_linear(x: Tensor, layout: layouts.Layout, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x: `[..., K]`; any layout of `[N_out, K]`; returns `[..., N_out]` through the op of that layout."""
    if x.shape[-1] != layout.shape[1]:
        raise ValueError(f"{layout.layout}_linear: x expected {layout.shape[1]} features, got shape {list(x.shape)}")
    if isinstance(layout, layouts.CSR):
        return csr_linear(x, layout.crow_indices, layout.col_indices, layout.values, bias, activation)
    if isinstance(layout, layouts.BSR):
        return bsr_linear(x, layout.crow_indices, layout.col_indices, layout.values, bias, activation)
    return nm_linear(x, layout.values, layout.indices, layout.n, layout.m, bias, activation)


def sddmm(
    x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, blocksize: tuple[int, int] | None = None
) -> Tensor:
    """Sampled dense-dense product: the gradient of the kept weights only.

    x: `[..., K]`; dy: `[..., N_out]`; returns `[nnz]`, or `[nblocks, r, c]` with blocksize: sum over tokens of
    dy[n, o] x[n, k] at the kept entries, in float32 or wider. Not differentiable itself.
    """
    if x.shape[:-1] != dy.shape[:-1]:
        raise ValueError(f"sddmm: x and dy expected the same tokens, got {list(x.shape)} and {list(dy.shape)}")
    r, c = blocksize or (1, 1)
    if dy.shape[-1] != (crow_indices.shape[0] - 1) * r:
        raise ValueError(f"sddmm: dy expected {(crow_indices.shape[0] - 1) * r} features, got {dy.shape[-1]}")
    blocks = _OPS.sddmm(x, dy, crow_indices, col_indices, r, c)
    return blocks.flatten() if blocksize is None else blocks


# masked

define(
    "masked_linear(Tensor x, Tensor w, Tensor mask, Tensor? bias) -> Tensor",
    "masked_linear",
    lambda x, w, mask, bias: _out(x, w.shape[0]),
)
define(
    "masked_linear_dx(Tensor dy, Tensor w, Tensor mask) -> Tensor",
    "masked_linear_dx",
    lambda dy, w, mask: _out(dy, w.shape[1]),
)
define(
    "masked_linear_dw(Tensor dy, Tensor x, Tensor mask) -> Tensor",
    "masked_linear_dw",
    lambda dy, x, mask: x.new_empty(mask.shape, dtype=_wide(x, dy)),
)


def _save_masked(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _masked_backward(ctx: Any, dy: Tensor) -> tuple:
    x, w, mask, bias = ctx.saved_tensors
    wants_x, wants_w, _, wants_bias = ctx.needs_input_grad
    dx = _OPS.masked_linear_dx(dy, w, mask).to(x.dtype) if wants_x else None
    dw = _OPS.masked_linear_dw(dy, x, mask).to(w.dtype) if wants_w else None
    dbias = _bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
    return dx, dw, None, dbias


torch.library.register_autograd("sparseprune::masked_linear", _masked_backward, setup_context=_save_masked, lib=LIBRARY)


def masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: `[..., K]`; w, mask (bool, True = kept): `[N_out, K]`; bias `[N_out]`; returns x (w * mask)^T + bias.

    Differentiable in x, w and bias; the gradient of w is zero where the mask is False. A dense matmul: no faster than
    F.linear.
    """
    x = _autocast(x)
    check_mask("masked_linear", w, mask)
    _check("masked_linear", x, w.shape[0], w.shape[1], bias, "none")
    return _OPS.masked_linear(x, w, mask, bias)


# packed


def pack(layout: layouts.Layout, tokens: int = 128, values: str = "float32", transpose: bool = False) -> Packed:
    """Packs a valid layout for its kernel: once, at load; never saved.

    tokens: the N it is tuned for (every N works); values: "float32" | "bfloat16" | "int8" (with one scale an output);
    transpose: pack W^T, for the gradient of x. ValueError on a structure that the kernel must not see.
    """
    if values not in VALUE_DTYPES:
        raise ValueError(f"pack: values expected one of {', '.join(VALUE_DTYPES)}, got {values!r}")
    layout.validate()
    if isinstance(layout, layouts.NM):
        crow, col = nm_as_csr(layout.indices, layout.n, layout.m)
        blocksize = (1, 1)
    else:
        crow, col = layout.crow_indices, layout.col_indices
        blocksize = layout.blocksize if isinstance(layout, layouts.BSR) else (1, 1)
    packed = pack_structure(layout.shape, blocksize, crow, col, tokens, transpose, VALUE_DTYPES[values])
    return repack(packed, layout.values)


def repack(packed: Packed, values: Tensor) -> Packed:
    """The same structure with fresh canonical values (``layout.values``, any shape): one gather."""
    values = values.detach()
    if packed.values.dtype == torch.int8:
        return quantise(packed, values)
    fresh = _OPS.gather_values(values, packed.perm, packed.values.dtype)
    return Packed(packed.plan, packed.index, packed.offsets, packed.perm, fresh)


define(
    "gather_values(Tensor values, Tensor perm, ScalarType dtype) -> Tensor",
    "gather_values",
    lambda values, perm, dtype: values.new_empty(perm.shape, dtype=dtype),
)
define(
    "packed_linear(Tensor x, Tensor values, Tensor index, Tensor offsets, Tensor? scale, Tensor? bias, "
    "Tensor? residual, int[] plan, str activation) -> Tensor",
    "packed_linear",
    lambda x, values, index, offsets, scale, bias, residual, plan, activation: _out(x, plan[1]),
)
define(
    "packed_sddmm(Tensor x, Tensor dy, Tensor index, Tensor offsets, Tensor perm, int[] plan, int n_values) -> Tensor",
    "packed_sddmm",
    lambda x, dy, index, offsets, perm, plan, n_values: x.new_empty((n_values,), dtype=_wide(x, dy)),
)


def packed_linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x: `[..., K]`; returns activation(x W^T + bias) + residual, `[..., N_out]`. For inference: RuntimeError where a
    gradient would be needed (:func:`trained_linear` has one).
    """
    x = _autocast(x)
    if _needs_grad(x, bias, residual):
        raise RuntimeError("packed_linear has no gradient; use trained_linear, or torch.no_grad()")
    rows, columns = packed.shape
    _check("packed_linear", x, rows, columns, bias, activation)
    if residual is not None and residual.shape != (*x.shape[:-1], rows):
        raise ValueError(f"packed_linear: residual expected {[*x.shape[:-1], rows]}, got {list(residual.shape)}")
    return _OPS.packed_linear(
        x, packed.values, packed.index, packed.offsets, packed.scale, bias, residual, packed.plan, activation
    )


define(
    "trained_linear(Tensor x, Tensor values, Tensor? bias, Tensor index, Tensor offsets, Tensor perm, int[] plan, "
    "Tensor t_index, Tensor t_offsets, Tensor t_perm, int[] t_plan) -> Tensor",
    "trained_linear",
    lambda x, values, bias, index, offsets, perm, plan, t_index, t_offsets, t_perm, t_plan: _out(x, plan[1]),
)


def _save_trained(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, values, bias, index, offsets, perm, ctx.plan, t_index, t_offsets, t_perm, ctx.t_plan = inputs
    ctx.save_for_backward(x, values, index, offsets, perm, t_index, t_offsets, t_perm)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _trained_backward(ctx: Any, dy: Tensor) -> tuple:
    x, values, index, offsets, perm, t_index, t_offsets, t_perm = ctx.saved_tensors
    dx = dvalues = dbias = None
    if ctx.needs_input_grad[0]:
        wide = torch.promote_types(values.dtype, torch.float32)
        packed = _OPS.gather_values(values, t_perm, wide)
        dx = _OPS.packed_linear(dy, packed, t_index, t_offsets, None, None, None, ctx.t_plan, "none").to(x.dtype)
    if ctx.needs_input_grad[1]:
        flat = _OPS.packed_sddmm(x, dy, index, offsets, perm, ctx.plan, values.numel())
        dvalues = flat.view(values.shape).to(values.dtype)
    if ctx.needs_input_grad[2]:
        dbias = _bias_grad(dy, ctx.bias_dtype)
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
    x = _autocast(x)
    rows, columns = packed.shape
    _check("trained_linear", x, rows, columns, bias, activation)
    if packed_t.shape != (columns, rows):
        raise ValueError(f"trained_linear: packed_t expected the shape {[columns, rows]}, got {list(packed_t.shape)}")
    y = _OPS.trained_linear(
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


define(
    "add_layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps) -> Tensor",
    "add_layer_norm",
    lambda x, residual, weight, bias, eps: torch.empty_like(x, memory_format=torch.contiguous_format),
)


def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype. For inference; where a
    gradient is needed it is composed from torch's own ops.
    """
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"add_layer_norm: weight and bias expected [{x.shape[-1]}], got {list(weight.shape)}")
    if _needs_grad(x, residual, weight, bias):
        total = x if residual is None else x + residual
        return torch.nn.functional.layer_norm(total, (x.shape[-1],), weight, bias, eps)
    return _OPS.add_layer_norm(x, residual, weight, bias, eps)


define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm",
    lambda x, weight, eps: x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype)),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x: `[..., D]`; weight `[D]`; returns x / sqrt(mean(x^2) + eps) * weight in the wider of the two dtypes (Zhang and
    Sennrich, 2019). For inference; where a gradient is needed it is composed from torch's own ops. ValueError where the
    weight is not as long as x's last dimension, and on a scalar.
    """
    if x.dim() < 1:
        raise ValueError("rms_norm: x expected shape [..., D], got a scalar")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight expected [{x.shape[-1]}], got {list(weight.shape)}")
    if _needs_grad(x, weight):
        return reference.rms_norm(x, weight, eps)
    return _OPS.rms_norm(x, weight, eps)


define(
    "rounded_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "rounded_linear",
    lambda x, weight, bias: _out(x, weight.shape[0]),
)


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: `[..., K]`; weight bfloat16 `[N_out, K]`, dense; bias `[N_out]`; returns x W^T + bias, `[..., N_out]`, sums in
    float32: for few tokens, where reading the weight is what takes the time. For inference: RuntimeError where a
    gradient would be needed. ValueError on shapes that do not fit and on a weight of another dtype.
    """
    if _needs_grad(x, weight, bias):
        raise RuntimeError("rounded_linear has no gradient; use F.linear, or torch.no_grad()")
    if weight.dim() != 2 or weight.dtype != torch.bfloat16:
        raise ValueError(f"rounded_linear: weight expected bfloat16 [N, K], got {weight.dtype} {list(weight.shape)}")
    _check("rounded_linear", x, weight.shape[0], weight.shape[1], bias, "none")
    return _OPS.rounded_linear(x, weight.contiguous(), bias)
