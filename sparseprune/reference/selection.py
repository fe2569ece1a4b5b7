"""Exact order statistics and the masks they give, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from ._common import always, reject_nan


def _flat(tensors: list[Tensor], magnitude: bool) -> Tensor:
    """One vector of everything, in list order; |x| where asked."""
    flat = torch.cat([t.reshape(-1) for t in tensors]) if len(tensors) != 1 else tensors[0].reshape(-1)
    return flat.abs() if magnitude else flat


def _unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.reshape(t.shape).clone() for part, t in zip(parts, like)]


def _largest(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    if not tensors:
        return []
    flat = _flat(tensors, magnitude)
    reject_nan(op, flat)
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    return _unflatten(mask, tensors)


@kernel("kth_magnitude", "reference", always)
def kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """tensors: any shapes, one dtype; returns the k-th largest |x| over all of them, 1-based, 0-dim."""
    flat = _flat(tensors, magnitude=True)
    reject_nan("kth_magnitude", flat)
    return torch.sort(flat, descending=True).values[k - 1].clone()


@kernel("topk_mask", "reference", always)
def topk_mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """scores: any shapes, one dtype; returns bool masks of those shapes, k True in all, ties to the lower index."""
    return _largest("topk_mask", scores, k, magnitude=False)


@kernel("magnitude_mask", "reference", always)
def magnitude_mask(tensors: list[Tensor], k: int) -> list[Tensor]:
    """As :func:`topk_mask`, on |x|."""
    return _largest("magnitude_mask", tensors, k, magnitude=True)


@kernel("cut_mask", "reference", always)
def cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[Tensor]:
    """tensors: any shapes; True above the threshold and at the first ``ties`` entries equal to it, in list order."""
    if not tensors:
        return []
    flat = _flat(tensors, magnitude)
    reject_nan("cut_mask", flat)
    equal = flat == threshold
    return _unflatten((flat > threshold) | (equal & (equal.cumsum(0) <= ties)), tensors)


@kernel("radix_histogram", "reference", always)
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


@kernel("nm_mask", "reference", always)
def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """scores: `[..., K]`, m divides K; returns bool `[..., K]`: the n largest of every m, ties to the lower index."""
    reject_nan("nm_mask", scores)
    groups = scores.reshape(-1, m)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    mask.scatter_(1, torch.sort(groups, dim=1, descending=True, stable=True).indices[:, :n], True)
    return mask.reshape(scores.shape)


@kernel("block_scores", "reference", always)
def block_scores(scores: Tensor, rows: int, cols: int) -> Tensor:
    """scores: `[N, K]`; returns `[N / rows, K / cols]`, the sum over each block, in float32 (float64 for float64)."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.reshape(scores.shape[0] // rows, rows, scores.shape[1] // cols, cols).sum(dim=(1, 3))


# Masking and the masked optimiser step.
