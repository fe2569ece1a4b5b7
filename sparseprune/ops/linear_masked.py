"""The op of a dense weight under a mask, y = x (w * mask)^T + bias, and its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._library import (
    LIBRARY,
    autocast_input,
    backward_kernels,
    bias_grad,
    check_linear,
    check_mask,
    define,
    kernels,
    output_for,
    refuse_tangents,
    widest,
)

__all__ = ["masked_linear"]

_OPS = torch.ops.sparseprune

define(
    "masked_linear(Tensor x, Tensor w, Tensor mask, Tensor? bias) -> Tensor",
    "masked_linear",
    lambda x, w, mask, bias: output_for(x, w.shape[0]),
)
define(
    "masked_linear_dx(Tensor dy, Tensor w, Tensor mask) -> Tensor",
    "masked_linear_dx",
    lambda dy, w, mask: output_for(dy, w.shape[1]),
)
define(
    "masked_linear_dw(Tensor dy, Tensor x, Tensor mask) -> Tensor",
    "masked_linear_dw",
    lambda dy, x, mask: x.new_empty(mask.shape, dtype=widest(x, dy)),
)


def _save_masked(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _masked_backward(ctx: Any, dy: Tensor) -> tuple:
    x, w, mask, bias = ctx.saved_tensors
    wants_x, wants_w, _, wants_bias = ctx.needs_input_grad
    run = backward_kernels()
    dx = run.masked_linear_dx(dy, w, mask).to(x.dtype) if wants_x else None
    dw = run.masked_linear_dw(dy, x, mask).to(w.dtype) if wants_w else None
    dbias = bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
    return dx, dw, None, dbias


torch.library.register_autograd("sparseprune::masked_linear", _masked_backward, setup_context=_save_masked, lib=LIBRARY)


class _StraightThrough(torch.autograd.Function):
    """masked_linear, but for the gradient of w, which goes straight through the mask."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
        return _OPS.masked_linear(x, w, mask, bias)

    setup_context = staticmethod(_save_masked)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, w, mask, bias = ctx.saved_tensors
        wants_x, wants_w, _, wants_bias = ctx.needs_input_grad
        dx = backward_kernels().masked_linear_dx(dy, w, mask).to(x.dtype) if wants_x else None
        dw = None
        if wants_w:
            wide, tokens = widest(x, dy), x.shape[:-1].numel()
            rows = dy.reshape(tokens, dy.shape[-1]).to(wide)
            dw = (rows.t() @ x.reshape(tokens, x.shape[-1]).to(wide)).to(w.dtype)
        dbias = bias_grad(dy, bias.dtype) if wants_bias and bias is not None else None
        return dx, dw, None, dbias


def masked_linear(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None = None, straight_through: bool = False
) -> Tensor:
    """x: `[..., K]`; w, mask (bool, True = kept): `[N_out, K]`; bias `[N_out]`; returns x (w * mask)^T + bias.

    Differentiable in x, w and bias; the gradient of w is zero where the mask is False, or with ``straight_through``
    that of w * mask everywhere, which tells what a weight that is gone would change (Bengio et al. 2013). On a CPU it
    is sparse where the mask keeps up to 0.3; elsewhere a dense matmul, no faster than F.linear.
    """
    x = autocast_input(x)
    check_mask("masked_linear", w, mask)
    refuse_tangents("masked_linear", w)
    check_linear("masked_linear", x, w.shape[0], w.shape[1], bias, "none")
    run = _StraightThrough.apply if straight_through else kernels().masked_linear
    return run(x, w, mask, bias)
