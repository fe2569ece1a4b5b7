"""Floor 1: every op in plain torch: the truth in the tests and the fallback where no kernel runs.

Written for clarity and exactness, not for speed. Each function has the name of its op.
"""

from __future__ import annotations

import math
from typing import Any

import torch
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
    """x: `[n]` float32, bfloat16 or float16; returns int64 keys in [0, 2^32) that sort as x does (-0 counts as 0)."""
    wide = x.float()
    bits = (wide.abs() if magnitude else wide + 0.0).contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return bits if magnitude else torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


def key_value(key: int, magnitude: bool, dtype: torch.dtype) -> Tensor:
    """The value whose :func:`sortable_key` is ``key``, 0-dim."""
    bits = key if magnitude else (key - 0x80000000 if key >> 31 else 0xFFFFFFFF - key)
    signed = bits - (1 << 32) if bits >> 31 else bits
    return torch.tensor(signed, dtype=torch.int32).view(torch.float32).to(dtype)


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
