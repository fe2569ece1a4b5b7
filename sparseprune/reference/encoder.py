"""The ops ``encoder`` and ``prompt`` in plain torch: the truth in tests, and the fallback where no kernel runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..activations import activate
from ..encoder_program import WHOLE, Attention, Keep, Linear, Norm, Program, Rotary, Round
from ..packing import Kind, to_dense
from .int8 import rounded_product


def _linear(step: Linear, program: Program, tensors: list[Tensor], x: Tensor, before: Tensor) -> Tensor:
    """before `[B, S, rows]`: what the step writes over, adds to or multiplies."""
    weight = program.weights[step.weight]
    scale = None if weight.scale < 0 else tensors[weight.scale]
    whole, values = weight.plan.kind == WHOLE, tensors[weight.values]
    index, offsets = (values if whole else tensors[i] for i in (weight.indices, weight.offsets))
    bias = None if step.bias < 0 else tensors[step.bias].to(x.dtype)
    x = x[..., step.from_row : step.from_row + weight.columns]
    if weight.plan.kind == Kind.QUADS:
        assert scale is not None
        y = rounded_product(x, index, offsets, values, scale, weight.plan).to(x.dtype)
        y = activate(y if bias is None else y + bias, step.activation)
    else:
        if whole:
            dense = values.view(-1)[: weight.rows * weight.columns].view(weight.rows, weight.columns).float()
            dense = dense if scale is None else dense * scale.unsqueeze(1)
        else:
            dense = to_dense(index, offsets, values, scale, weight.plan)
        y = activate(F.linear(x, dense.to(x.dtype), bias), step.activation)
    return y if step.combine == "replace" else before + y if step.combine == "add" else before * y


def _norm(step: Norm, tensors: list[Tensor], x: Tensor) -> Tensor:
    x = x[..., step.from_row : step.from_row + step.rows]
    weight, bias = tensors[step.weight].to(x.dtype), None if step.bias < 0 else tensors[step.bias].to(x.dtype)
    if step.centred:
        return F.layer_norm(x, (step.rows,), weight, bias, step.eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + step.eps) * weight
    return y if bias is None else y + bias


def _heads(x: Tensor, row: int, count: int, depth: int, every: int) -> Tensor:
    """x `[B, S, features]` -> a view `[B, S, count, depth]` of the heads from row on."""
    return x[..., row:].unfold(-1, depth, every or depth)[..., :count, :]


def _rotary(step: Rotary, tables: list[Tensor], x: Tensor) -> Tensor:
    """Of all of a buffer."""
    x = x.clone()
    heads = _heads(x, step.to_row, step.heads, step.depth, step.every)
    cos, sin = (tables[i].to(x.dtype).unsqueeze(-2) for i in (step.table, step.table + 1))
    a, b = heads.chunk(2, -1)
    heads.copy_(heads * cos + torch.cat([-b, a], -1) * sin)
    return x


def _attention(step: Attention, tables: list[Tensor], mask: Tensor, x: Tensor) -> Tensor:
    def heads(row: int, count: int) -> Tensor:
        part = _heads(x, row, count, step.depth, step.every).transpose(1, 2)
        return part.repeat_interleave(step.heads // count, 1)

    q, k, v = heads(step.q_row, step.heads), heads(step.k_row, step.kv_heads), heads(step.v_row, step.kv_heads)
    scores = q @ k.transpose(-1, -2) * step.factor
    if step.table >= 0:
        scores = scores + tables[step.table].to(x.dtype).transpose(-1, -2)
    allowed = mask[:, None, None, :]
    if step.window >= 0:
        place = torch.arange(x.shape[1], device=x.device)
        allowed = allowed & ((place[:, None] - place[None, :]).abs() <= step.window)
    if step.causal:
        allowed = allowed & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


def _keep(step: Keep, real: Tensor, x: Tensor, keys: Tensor, values: Tensor) -> None:
    for row, to in ((step.k_row, keys), (step.v_row, values)):
        new = _heads(x, row, step.heads, step.depth, step.every).transpose(1, 2).to(to.dtype)
        held = to[:, :, : x.shape[1]]
        held.copy_(torch.where(real[:, None, :, None], new, held))


@kernel("encoder", "reference", lambda *args: [])
def encoder(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> Tensor:
    """x: `[B, S, D]`; mask bool `[B, S]`, True where a token is real; returns `[B, S, features of the result]` in x's
    dtype, zero where the mask is False. Sums in float32 or wider.
    """
    return prompt(x, mask, [], [], tensors, tables, plan, scalars)


@kernel("prompt", "reference", lambda *args: [])
def prompt(
    x: Tensor, mask: Tensor | None, keys: list[Tensor], values: list[Tensor], tensors: list[Tensor],
    tables: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    """As :func:`encoder`; keys, values: `[B, heads, S or more, depth]` of each layer, written where a token is real, or
    none.
    """
    program = Program.decode(plan, scalars)
    wide = torch.promote_types(x.dtype, torch.float32)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    buffers = [x.new_zeros((*x.shape[:2], features), dtype=wide) for features in program.buffers]
    buffers[0] = x.to(wide).clone()

    def result(step: Linear | Norm | Attention) -> tuple[Tensor, int]:
        source = buffers[step.source]
        if isinstance(step, Linear):
            rows = program.weights[step.weight].rows
            before = buffers[step.to][..., step.to_row : step.to_row + rows]
            return _linear(step, program, tensors, source, before), rows
        if isinstance(step, Norm):
            return _norm(step, tensors, source), step.rows
        return _attention(step, tables, real, source), step.heads * step.depth

    for step in program.steps:
        if isinstance(step, Round):  # the product that reads it rounds it: the same numbers
            buffers[step.to] = buffers[step.source][..., step.from_row : step.from_row + step.rows].clone()
            continue
        if isinstance(step, Rotary):
            buffers[step.to] = _rotary(step, tables, buffers[step.to])
            continue
        if isinstance(step, Keep):
            if keys:
                _keep(step, real, buffers[step.source], keys[step.cache], values[step.cache])
            continue
        y, rows = result(step)
        buffers[step.to][..., step.to_row : step.to_row + rows] = y
    return buffers[program.result].masked_fill(~real.unsqueeze(-1), 0).to(x.dtype)
