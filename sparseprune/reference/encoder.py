"""The op ``encoder`` in plain torch: the truth in its tests, and the fallback where no kernel runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..activations import activate
from ..encoder_program import Attention, Linear, Norm, Program, Rotary, Round, Step
from ..packing import Kind, to_dense
from .int8 import rounded_product


def _linear(step: Linear, program: Program, tensors: list[Tensor], x: Tensor, before: Tensor) -> Tensor:
    """before `[B, S, rows]`: what the step writes over, adds to or multiplies."""
    weight = program.weights[step.weight]
    scale = None if weight.scale < 0 else tensors[weight.scale]
    index, offsets, values = (tensors[i] for i in (weight.indices, weight.offsets, weight.values))
    bias = None if step.bias < 0 else tensors[step.bias].to(x.dtype)
    x = x[..., step.from_row : step.from_row + weight.columns]
    if weight.plan.kind == Kind.QUADS:
        assert scale is not None
        y = rounded_product(x, index, offsets, values, scale, weight.plan).to(x.dtype)
        y = activate(y if bias is None else y + bias, step.activation)
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


def _rotary(step: Rotary, tables: list[Tensor], x: Tensor) -> Tensor:
    heads = x.unflatten(-1, (step.heads, step.depth))
    cos, sin = (tables[i].to(x.dtype).unsqueeze(1) for i in (step.table, step.table + 1))
    a, b = heads.chunk(2, -1)
    return (heads * cos + torch.cat([-b, a], -1) * sin).flatten(-2)


def _attention(step: Attention, tables: list[Tensor], mask: Tensor, x: Tensor) -> Tensor:
    def heads(row: int, count: int) -> Tensor:
        part = x[..., row : row + count * step.depth].unflatten(-1, (count, step.depth)).transpose(1, 2)
        return part.repeat_interleave(step.heads // count, 1)

    q, k, v = heads(step.q_row, step.heads), heads(step.k_row, step.kv_heads), heads(step.v_row, step.kv_heads)
    scores = q @ k.transpose(-1, -2) * step.factor
    if step.table >= 0:
        scores = scores + tables[step.table].to(x.dtype).transpose(-1, -2)
    allowed = mask[:, None, None, :]
    if step.window >= 0:
        place = torch.arange(x.shape[1], device=x.device)
        allowed = allowed & ((place[:, None] - place[None, :]).abs() <= step.window)
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(-2)


@kernel("encoder", "reference", lambda *args: [])
def encoder(
    x: Tensor, mask: Tensor | None, tensors: list[Tensor], tables: list[Tensor], plan: list[int], scalars: list[float]
) -> Tensor:
    """x: `[B, S, D]`; mask bool `[B, S]`, True where a token is real; returns `[B, S, features of the result]` in x's
    dtype, zero where the mask is False. Sums in float32 or wider.
    """
    program = Program.decode(plan, scalars)
    wide = torch.promote_types(x.dtype, torch.float32)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    buffers = [x.new_zeros((*x.shape[:2], features), dtype=wide) for features in program.buffers]
    buffers[0] = x.to(wide).clone()

    def result(step: Step) -> tuple[Tensor, int]:
        source = buffers[step.to if isinstance(step, Rotary) else step.source]
        if isinstance(step, Linear):
            rows = program.weights[step.weight].rows
            before = buffers[step.to][..., step.to_row : step.to_row + rows]
            return _linear(step, program, tensors, source, before), rows
        if isinstance(step, Norm):
            return _norm(step, tensors, source), step.rows
        if isinstance(step, Rotary):
            rows = step.heads * step.depth
            return _rotary(step, tables, source[..., step.to_row : step.to_row + rows]), rows
        if isinstance(step, Attention):
            return _attention(step, tables, real, source), step.heads * step.depth
        raise TypeError(f"encoder: no such step: {type(step).__name__}")

    for step in program.steps:
        if isinstance(step, Round):  # the product that reads it rounds it: the same numbers
            buffers[step.to] = buffers[step.source][..., step.from_row : step.from_row + step.rows].clone()
            continue
        y, rows = result(step)
        buffers[step.to][..., step.to_row : step.to_row + rows] = y
    return buffers[program.result].masked_fill(~real.unsqueeze(-1), 0).to(x.dtype)
