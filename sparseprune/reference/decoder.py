"""The op ``decoder`` in plain torch: the truth in its tests, and the fallback where no kernel runs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..activations import activate
from ..decoder_program import WHOLE, Attention, Linear, Norm, Program, RowNorm
from ..packing import Kind, to_dense
from .int8 import rounded_product


def _normed(norm: RowNorm, tensors: list[Tensor], x: Tensor) -> Tensor:
    if norm.weight < 0:
        return x
    weight = tensors[norm.weight][: x.shape[-1]]
    bias = None if norm.bias < 0 else tensors[norm.bias][: x.shape[-1]]
    if norm.centred:
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight
    return x if bias is None else x + bias


def _linear(step: Linear, program: Program, tensors: list[Tensor], x: Tensor) -> Tensor:
    weight = program.weights[step.weight]
    x = x[..., step.from_row :]
    columns = weight.columns
    x = x[..., :columns] * x[..., columns : 2 * columns] if step.gated else x[..., :columns]
    scale = None if weight.scale < 0 else tensors[weight.scale]
    values = tensors[weight.values]
    x = _normed(step.norm, tensors, x)
    bias = None if step.bias < 0 else tensors[step.bias][: weight.rows]
    if weight.plan.kind in (Kind.BITMASK8, Kind.QUADS):
        assert scale is not None
        y = rounded_product(x, tensors[weight.indices], tensors[weight.offsets], values, scale, weight.plan)
        return activate(y if bias is None else y + bias, step.activation)
    if weight.plan.kind == WHOLE:
        w = values.view(-1)[: weight.rows * columns].view(weight.rows, columns).float()
        w = w if scale is None else w * scale.unsqueeze(1)
    else:
        w = to_dense(tensors[weight.indices], tensors[weight.offsets], values, scale, weight.plan)
    return activate(F.linear(x, w, bias), step.activation)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, turned: int) -> Tensor:
    """x `[B, heads, T, depth]`; cos, sin `[B or 1, T, turned or more]`."""
    if not turned:
        return x
    cos, sin = cos[:, None, :, :turned], sin[:, None, :, :turned]
    front, rest = x[..., :turned], x[..., turned:]
    a, b = front.chunk(2, -1)
    return torch.cat([front * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def _attention(
    step: Attention, tensors: list[Tensor], x: Tensor, keys: Tensor, values: Tensor, past: int,
    masks: list[Tensor], tables: list[Tensor],
) -> Tensor:  # fmt: skip
    batch, tokens, _ = x.shape

    def heads(begin: int, every: int, count: int) -> Tensor:
        head, feature = torch.arange(count, device=x.device), torch.arange(step.depth, device=x.device)
        place = begin + every * head.unsqueeze(1) + feature
        return x[..., place.flatten()].view(batch, tokens, count, step.depth).transpose(1, 2)

    cos, sin = tables[2 * step.table : 2 * step.table + 2] if step.turned else (x, x)
    q = _turned(_normed(step.q_norm, tensors, heads(*step.q, step.heads)), cos, sin, step.turned)
    k = _turned(_normed(step.k_norm, tensors, heads(*step.k, step.kv_heads)), cos, sin, step.turned)
    keys[:, :, past : past + tokens] = k
    values[:, :, past : past + tokens] = heads(*step.v, step.kv_heads)
    if step.mask >= 0:
        seen = masks[step.mask]
    else:
        seen = torch.ones(1, tokens, past + tokens, dtype=torch.bool, device=x.device).tril(past)
    group, length = step.heads // step.kv_heads, seen.shape[2]
    k, v = (t[:, :, :length].repeat_interleave(group, 1) for t in (keys, values))
    scores = (q @ k.transpose(2, 3) * step.factor).masked_fill(~seen.unsqueeze(1), float("-inf"))
    shares = torch.softmax(scores, -1).masked_fill(~seen.any(-1)[:, None, :, None], 0.0)
    return (shares @ v).transpose(1, 2).reshape(batch, tokens, -1)


@kernel("decoder", "reference", lambda *arguments: [])
def decoder(
    x: Tensor, keys: list[Tensor], values: list[Tensor], past: int, masks: list[Tensor], tables: list[Tensor],
    tensors: list[Tensor], plan: list[int], scalars: list[float],
) -> Tensor:  # fmt: skip
    """x: `[B, T, D]`; keys, values: `[B, kv heads, room, depth]` of each layer, written at [past, past + T); returns
    `[B, T, features of the result]`.
    """
    program = Program.decode(plan, scalars)
    wide = x.to(torch.float32)
    buffers = [wide.new_zeros((*x.shape[:2], features)) for features in program.buffers]
    buffers[0] = wide.clone()
    for step in program.steps:
        source, to = buffers[step.source], buffers[step.to]
        if isinstance(step, Linear):
            y = _linear(step, program, tensors, source)
            if step.add:
                y = y + to[..., step.to_row : step.to_row + y.shape[-1]]
        elif isinstance(step, Norm):
            y = _normed(step.norm, tensors, source[..., step.from_row : step.from_row + step.rows])
        else:
            y = _attention(step, tensors, source, keys[step.cache], values[step.cache], past, masks, tables)
        to[..., step.to_row : step.to_row + y.shape[-1]] = y
    return buffers[program.result].to(x.dtype)
