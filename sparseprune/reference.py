"""Floor 1: every op in plain torch: the truth in the tests and the fallback where no kernel runs.

Written for clarity and exactness, not for speed. Each function has the name of its op.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._registry import kernel


def _always(*args: Any) -> list[str]:
    return []


@kernel("apply_mask_", "reference", _always)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`. Zeroes w where mask is False."""
    w.masked_fill_(~mask, 0)


# Selection: exact order statistics and the masks they give.


def _flat(tensors: list[Tensor], magnitude: bool) -> Tensor:
    """One vector of everything, in list order; |x| where asked."""
    flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) != 1 else tensors[0].reshape(-1)
    return flat.abs() if magnitude else flat


def _reject_nan(op: str, *tensors: Tensor) -> None:
    if any(bool(torch.isnan(t).any()) for t in tensors):
        raise ValueError(
            f"{op}: NaN among the values, and NaN has no rank; find its source, or use torch.nan_to_num first"
        )


def _unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.reshape(t.shape).clone() for part, t in zip(parts, like)]


def _largest(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    if not tensors:
        return []
    flat = _flat(tensors, magnitude)
    _reject_nan(op, flat)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return _unflatten(mask, tensors)


@kernel("kth_magnitude", "reference", _always)
def kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """tensors: any shapes, one dtype; returns the k-th largest |x| over all of them, 1-based, 0-dim."""
    flat = _flat(tensors, magnitude=True)
    _reject_nan("kth_magnitude", flat)
    return torch.sort(flat, descending=True).values[k - 1].clone()


@kernel("topk_mask", "reference", _always)
def topk_mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """scores: any shapes, one dtype; returns bool masks of those shapes, k True in all, ties to the lower index."""
    return _largest("topk_mask", scores, k, magnitude=False)


@kernel("magnitude_mask", "reference", _always)
def magnitude_mask(tensors: list[Tensor], k: int) -> list[Tensor]:
    """As :func:`topk_mask`, on |x|."""
    return _largest("magnitude_mask", tensors, k, magnitude=True)


@kernel("cut_mask", "reference", _always)
def cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[Tensor]:
    """tensors: any shapes; True above the threshold and at the first ``ties`` entries equal to it, in list order."""
    if not tensors:
        return []
    flat = _flat(tensors, magnitude)
    _reject_nan("cut_mask", flat)
    equal = flat == threshold
    return _unflatten((flat > threshold) | (equal & (equal.cumsum(0) <= ties)), tensors)


@kernel("radix_histogram", "reference", _always)
def radix_histogram(tensors: list[Tensor], prefix: int, level: int, magnitude: bool) -> Tensor:
    """int64 [2049]: how many sortable keys that begin with ``prefix`` have each next digit; the last entry counts
    NaN.
    """
    shift, width = RADIX_DIGITS[level]
    counts = torch.zeros(RADIX_BINS + 1, dtype=torch.int64, device=tensors[0].device if tensors else None)
    for tensor in tensors:
        key = sortable_key(tensor.reshape(-1), magnitude)
        key = key[(key >> (shift + width)) == prefix]
        counts[:RADIX_BINS] += torch.bincount((key >> shift) & ((1 << width) - 1), minlength=RADIX_BINS)
        counts[RADIX_BINS] += torch.isnan(tensor).sum()
    return counts


#: (shift, width) in bits of the digit of each level, the highest first; keys have 32 bits.
RADIX_DIGITS = ((21, 11), (10, 11), (0, 10))
RADIX_BINS = 2048


def sortable_key(x: Tensor, magnitude: bool) -> Tensor:
    """x: `[n]` float32, bfloat16 or float16; returns int64 keys in [0, 2^32) that sort as x does (-0 counts as 0).

    The 16-bit types fill the upper half of a key.
    """
    x = (x.abs() if magnitude else torch.where(x == 0, torch.zeros_like(x), x)).contiguous()
    if x.dtype == torch.float32:
        bits = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    else:
        bits = (x.view(torch.int16).to(torch.int64) & 0xFFFF) << 16
    return bits if magnitude else torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


def key_value(key: int, magnitude: bool, dtype: torch.dtype) -> Tensor:
    """The value whose :func:`sortable_key` is ``key``, 0-dim."""
    bits = key if magnitude else (key - 0x80000000 if key >> 31 else 0xFFFFFFFF - key)
    signed = bits - (1 << 32) if bits >> 31 else bits
    if dtype == torch.float32:
        return torch.tensor(signed, dtype=torch.int32).view(dtype)
    return torch.tensor(signed >> 16, dtype=torch.int16).view(dtype)


@kernel("nm_mask", "reference", _always)
def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """scores: `[..., K]`, m divides K; returns bool `[..., K]`: the n largest of every m, ties to the lower index."""
    _reject_nan("nm_mask", scores)
    groups = scores.reshape(-1, m)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :n], True)
    return mask.reshape(scores.shape)


@kernel("block_scores", "reference", _always)
def block_scores(scores: Tensor, rows: int, cols: int) -> Tensor:
    """scores: `[N, K]`; returns `[N / rows, K / cols]`, the sum over each block, in float32 (float64 for float64)."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.reshape(scores.shape[0] // rows, rows, scores.shape[1] // cols, cols).sum(dim=(1, 3))


# Masking and the masked optimiser step.


@kernel("masked_copy", "reference", _always)
def masked_copy(w: Tensor, mask: Tensor) -> Tensor:
    """w, mask (bool): `[...]`; returns w with zeros where mask is False, contiguous."""
    return torch.where(mask, w, torch.zeros((), dtype=w.dtype, device=w.device)).contiguous()


@kernel("threshold_mask", "reference", _always)
def threshold_mask(w: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w: `[...]`; returns (bool |w| >= threshold, w where it is so and 0 elsewhere, the count as int64 0-dim)."""
    _reject_nan("threshold_mask", w)
    mask = (w.abs() >= threshold).contiguous()
    return mask, masked_copy(w, mask), mask.sum()


@kernel("mask_gradient_", "reference", _always)
def mask_gradient_(grad: Tensor, w: Tensor, mask: Tensor, score_grad: Tensor | None) -> None:
    """All `[...]`: score_grad += grad * w with the dense gradient, then grad is zeroed where mask is False."""
    if score_grad is not None:
        score_grad.add_(grad.to(score_grad.dtype) * w.to(score_grad.dtype))
    grad.masked_fill_(~mask, 0)


@kernel("masked_adamw_", "reference", _always)
def masked_adamw_(
    p: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mask: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """All `[...]`: one AdamW step (decoupled decay), computed in the dtype of the moments; p and moments 0 where
    masked.
    """
    wide = exp_avg.dtype
    g, value = grad.to(wide), p.to(wide) * (1 - lr * weight_decay)
    if mask is not None:
        g = g.masked_fill(~mask, 0)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    value = value - exp_avg / denominator * (lr / (1 - beta1**step))
    if mask is not None:
        for tensor in (value, exp_avg, exp_avg_sq):
            tensor.masked_fill_(~mask, 0)
    p.copy_(value)


# Sparse matmul.

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


def activate(y: Tensor, activation: str) -> Tensor:
    """y: `[...]`; activation one of ACTIVATIONS ("gelu" is exact, "gelu_tanh" its tanh form)."""
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "silu":
        return F.silu(y)
    raise ValueError(f"activation expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def _dense_linear(x: Tensor, w: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """x: `[..., K]`, w `[N_out, K]` of any floating dtypes; sums in float32 or wider; returns x's dtype."""
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    y = F.linear(x.to(wide), w.to(wide), None if bias is None else bias.to(wide))
    return activate(y, activation).to(x.dtype)


def csr_to_dense(crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """values `[nnz]` or blocks `[nblocks, r, c]`; returns `[N_out, k]`."""
    if values.dim() == 1:
        return csr_to_dense(crow_indices, col_indices, values.view(-1, 1, 1), k)
    _, r, c = values.shape
    rows, columns = crow_indices.numel() - 1, k // c
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=values.device), counts)
    blocks = values.new_zeros(rows * columns, r, c).index_put((row * columns + col_indices.long(),), values)
    return blocks.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)


@kernel("csr_linear", "reference", _always)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`; bias `[N_out]`; returns activation(x W^T + bias) `[..., N_out]`."""
    return _dense_linear(x, csr_to_dense(crow_indices, col_indices, values, x.shape[-1]), bias, activation)


@kernel("bsr_linear", "reference", _always)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; bsr of `[N_out, K]`, values `[nblocks, r, c]`; bias `[N_out]`; returns `[..., N_out]`."""
    return _dense_linear(x, csr_to_dense(crow_indices, col_indices, values, x.shape[-1]), bias, activation)


@kernel("nm_linear", "reference", _always)
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values, indices (uint8) `[N_out, K / m * n]`; bias `[N_out]`; returns `[..., N_out]`."""
    column = torch.arange(indices.shape[1], device=x.device) // n * m + indices.long()
    w = values.new_zeros(values.shape[0], x.shape[-1]).scatter(1, column, values)
    return _dense_linear(x, w, bias, activation)


@kernel("csr_linear_dx", "reference", _always)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; values `[nnz]` or blocks `[nblocks, r, c]`; returns dX = dY W, `[..., k]`."""
    w = csr_to_dense(crow_indices, col_indices, values, k)
    return _dense_linear(dy, w.t(), None, "none")


@kernel("masked_linear", "reference", _always)
def masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; w, mask (bool) `[N_out, K]`; bias `[N_out]`; returns `[..., N_out]`."""
    return _dense_linear(x, w.masked_fill(~mask, 0), bias, "none")


@kernel("masked_linear_dx", "reference", _always)
def masked_linear_dx(dy: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`; w, mask (bool) `[N_out, K]`; returns dy times the kept weights, `[..., K]`, in dy's dtype."""
    return _dense_linear(dy, w.masked_fill(~mask, 0).t(), None, "none")


@kernel("masked_linear_dw", "reference", _always)
def masked_linear_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N_out]`, x: `[..., K]`; returns `[N_out, K]` float32 or wider: dy x summed over tokens where kept."""
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    flat_dy, flat_x = dy.reshape(-1, mask.shape[0]).to(wide), x.reshape(-1, mask.shape[1]).to(wide)
    return (flat_dy.t() @ flat_x).masked_fill(~mask, 0)


@kernel("sddmm", "reference", _always)
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[nblocks, r, c]`: sum over tokens of dy[n, o] x[n, k] at the kept
    blocks.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    rows, columns = dy.shape[-1] // r, x.shape[-1] // c
    dw = dy.reshape(-1, rows * r).to(wide).t() @ x.reshape(-1, columns * c).to(wide)
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=x.device), counts)
    return dw.view(rows, r, columns, c).transpose(1, 2)[row, col_indices.long()]


@kernel("add_layer_norm", "reference", _always)
def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    return F.layer_norm(total, (x.shape[-1],), weight.to(wide), bias.to(wide), eps).to(x.dtype)


@kernel("rms_norm", "reference", _always)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x: `[..., D]`; weight `[D]`; returns x / sqrt(mean(x^2) + eps) * weight in the wider of the two dtypes."""
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return (normed * weight.to(wide)).to(torch.promote_types(x.dtype, weight.dtype))


@kernel("rounded_linear", "reference", _always)
def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; weight bfloat16 `[N, K]`; bias `[N]`; returns x W^T + bias `[..., N]` in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def packed_places(index: Tensor, offsets: Tensor, plan: Sequence[int]) -> Tensor:
    """int64 `[packed]`: where in the flat `[N_out * K]` weight each packed value lies; ``native.matmul.Packed`` has
    the order.
    """
    kind, rows, columns, height, k_block, row_block = plan[:6]
    device = index.device
    if kind == 1:  # bitmask: one bit a column, least significant first; values in row order
        bit = torch.arange(8, device=device)
        kept = (index.view(rows, -1).unsqueeze(2) >> bit & 1).flatten(1)[:, :columns]
        return kept.flatten().nonzero().flatten()
    # groups: row block, then K-block, then slot, then entry, then row within the group
    groups, k_blocks, per_block = -(-rows // height), -(-columns // k_block), row_block // height
    first_of, k_of = [], []
    for first in range(0, groups, per_block):
        here = min(groups, first + per_block) - first
        first_of.append(torch.full((here * k_blocks,), first, device=device))
        k_of.append(torch.arange(k_blocks, device=device).repeat_interleave(here))
    if not first_of:
        return torch.zeros(0, dtype=torch.int64, device=device)
    counts = (offsets[1:, 0] - offsets[:-1, 0]).long()
    group = (torch.cat(first_of) + offsets[:-1, 1].long()).repeat_interleave(counts)
    column = torch.cat(k_of).repeat_interleave(counts) * k_block + (index[: group.numel()].long() & 0xFFFF)
    row = group.unsqueeze(1) * height + torch.arange(height, device=device)
    return (row * columns + column.unsqueeze(1)).flatten()


def packed_to_dense(
    index: Tensor, offsets: Tensor, values: Tensor, scale: Tensor | None, plan: Sequence[int]
) -> Tensor:
    """The dense `[N_out, K]`, float32 or wider, of a packed form: what its kernel multiplies with."""
    rows, columns = plan[1], plan[2]
    places = packed_places(index, offsets, plan)
    wide = torch.promote_types(values.dtype, torch.float32)
    flat = torch.zeros(rows * columns, dtype=wide, device=values.device)
    flat[places] = values[: places.numel()].to(wide)
    return flat.view(rows, columns) if scale is None else flat.view(rows, columns) * scale.unsqueeze(1)


@kernel("packed_linear", "reference", _always)
def packed_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    """x: `[..., K]`; a packed weight `[N_out, K]`; residual `[..., N_out]`; returns activation(x W^T + bias) +
    residual.
    """
    w = packed_to_dense(index, offsets, values, scale, plan)
    wide = torch.promote_types(x.dtype, w.dtype)
    y = activate(F.linear(x.to(wide), w.to(wide), None if bias is None else bias.to(wide)), activation)
    return (y if residual is None else y + residual.to(wide)).to(x.dtype)


@kernel("gather_values", "reference", _always)
def gather_values(values: Tensor, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """values: any shape, canonical order; perm int32 `[packed]`, -1 where a packed place holds no value; returns
    `[packed]`.
    """
    flat = values.flatten()
    if flat.numel() == 0:
        return torch.zeros(perm.numel(), dtype=dtype, device=values.device)
    return torch.where(perm < 0, 0, flat[perm.clamp(min=0).long()]).to(dtype)


@kernel("packed_sddmm", "reference", _always)
def packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[n_values]` in canonical order, the gradient of the values of a
    packed form.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, dy.dtype), torch.float32)
    rows, columns = plan[1], plan[2]
    dw = (dy.reshape(-1, rows).to(wide).t() @ x.reshape(-1, columns).to(wide)).flatten()
    places = packed_places(index, offsets, plan)
    out = torch.zeros(n_values, dtype=wide, device=x.device)
    out[perm[: places.numel()].long()] = dw[places]
    return out


@kernel("trained_linear", "reference", _always)
def trained_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    perm: Tensor,
    plan: Sequence[int],
    t_index: Tensor,
    t_offsets: Tensor,
    t_perm: Tensor,
    t_plan: Sequence[int],
) -> Tensor:
    """x: `[..., K]`; canonical values of the packed structure of `[N_out, K]`; t_*: that of its transpose, for the
    backward.
    """
    packed = gather_values(values, perm, torch.promote_types(values.dtype, torch.float32))
    return packed_linear(x, packed, index, offsets, None, bias, None, plan, "none")
