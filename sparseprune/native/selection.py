"""Selection through the compiled core: many tensors read in place, as if they were one."""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import require_c
from .._registry import kernel
from ..reference import RADIX_BINS, RADIX_DIGITS
from ._inputs import DTYPE_CODES, why_not_cpu

_ALL_TIES = (1 << 63) - 1


def _why_not_list(tensors: list[Tensor], *rest: object) -> list[str]:
    reasons = why_not_cpu(*tensors)
    if not tensors:
        reasons.append("needs at least one tensor")
    return reasons


def _nan(op: str) -> ValueError:
    return ValueError(
        f"{op}: NaN among the values, and NaN has no rank; find its source, or use torch.nan_to_num first"
    )


class _Pieces:
    """Contiguous tensors of one list (kept alive here) and the first four arguments that describe them to the core."""

    def __init__(self, tensors: list[Tensor], magnitude: bool) -> None:
        self.tensors = [t.contiguous() for t in tensors]
        self.arguments = (
            [t.data_ptr() for t in self.tensors],
            [t.numel() for t in self.tensors],
            DTYPE_CODES[tensors[0].dtype],
            magnitude,
        )


def _key_bits(key: int, dtype: torch.dtype, magnitude: bool) -> int:
    """The bit pattern, as a signed integer of the dtype's width, of the value with this sort key."""
    bits = key if magnitude or key >= 0 else (key ^ 0x7FFFFFFF)
    return bits if dtype == torch.float32 else bits >> 16


def select(op: str, tensors: list[Tensor], k: int, magnitude: bool, force_radix: bool = False) -> tuple[int, int, int]:
    """(sort key, how many are larger, how many are equal) of the k-th largest. ValueError on NaN."""
    pieces = _Pieces(tensors, magnitude)
    key, above, equal, nans = require_c().kth(*pieces.arguments, k, force_radix)
    if nans:
        raise _nan(op)
    return key, above, equal


@kernel("kth_magnitude", "native", _why_not_list)
def kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """tensors: any shapes, one dtype; returns the k-th largest |x|, 0-dim."""
    dtype = tensors[0].dtype
    key, _, _ = select("kth_magnitude", tensors, k, magnitude=True)
    width = torch.int32 if dtype == torch.float32 else torch.int16
    return torch.tensor(_key_bits(key, dtype, True), dtype=width).view(dtype)


def _cut(op: str, tensors: list[Tensor], key: int, ties: int, magnitude: bool) -> list[Tensor]:
    pieces = _Pieces(tensors, magnitude)
    masks = [torch.empty(t.shape, dtype=torch.bool) for t in tensors]
    if not require_c().cut_mask(*pieces.arguments, key, ties, [m.data_ptr() for m in masks]):
        raise _nan(op)
    return masks


def _largest(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    total = sum(t.numel() for t in tensors)
    if total == 0:
        return [torch.empty(t.shape, dtype=torch.bool) for t in tensors]
    key, above, equal = select(op, tensors, max(k, 1), magnitude)  # k = 0 still looks for NaN
    if k == 0:
        return [torch.zeros(t.shape, dtype=torch.bool) for t in tensors]
    return _cut(op, tensors, key, _ALL_TIES if k == above + equal else k - above, magnitude)


@kernel("topk_mask", "native", _why_not_list)
def topk_mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """scores: any shapes, one dtype; returns bool masks, k True in all, ties to the lower index."""
    return _largest("topk_mask", scores, k, magnitude=False)


@kernel("magnitude_mask", "native", _why_not_list)
def magnitude_mask(tensors: list[Tensor], k: int) -> list[Tensor]:
    """As :func:`topk_mask`, on |x|."""
    return _largest("magnitude_mask", tensors, k, magnitude=True)


@kernel("cut_mask", "native", _why_not_list)
def cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[Tensor]:
    """tensors: any shapes; True above the threshold and at the first ``ties`` entries equal to it."""
    dtype = tensors[0].dtype
    if dtype == torch.float32:
        bits = int(threshold.view(torch.int32))
    else:
        bits = int(threshold.view(torch.int16)) << 16
    if bits == -(1 << 31):
        bits = 0
    return _cut("cut_mask", tensors, bits if bits >= 0 else bits ^ 0x7FFFFFFF, ties, magnitude)


@kernel("radix_histogram", "native", _why_not_list)
def radix_histogram(tensors: list[Tensor], prefix: int, level: int, magnitude: bool) -> Tensor:
    """int64 [2049]: counts of the next digit of the keys that begin with ``prefix``; the last entry counts NaN."""
    pieces = _Pieces(tensors, magnitude)
    counts = torch.zeros(RADIX_BINS + 1, dtype=torch.int64)
    nans = require_c().radix_histogram(*pieces.arguments, prefix, *RADIX_DIGITS[level], counts.data_ptr())
    counts[RADIX_BINS] = nans
    return counts


def _why_not_nm_mask(scores: Tensor, n: int, m: int) -> list[str]:
    reasons = why_not_cpu(scores)
    if m > 256:
        reasons.append(f"needs m of at most 256, got {m}")
    return reasons


@kernel("nm_mask", "native", _why_not_nm_mask)
def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """scores: `[..., K]`, m divides K; returns bool `[..., K]`: the n largest of every m, ties to the lower index."""
    scores = scores.contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool)
    code = DTYPE_CODES[scores.dtype]
    if require_c().nm_mask(scores.data_ptr(), code, scores.numel() // m, n, m, mask.data_ptr()):
        raise _nan("nm_mask")
    return mask


@kernel("block_scores", "native", lambda scores, rows, cols: why_not_cpu(scores))
def block_scores(scores: Tensor, rows: int, cols: int) -> Tensor:
    """scores: `[N, K]`; returns float32 `[N / rows, K / cols]`, the sum over each block."""
    scores = scores.contiguous()
    height, width = scores.shape
    sums = torch.empty(height // rows, width // cols)
    require_c().block_scores(scores.data_ptr(), DTYPE_CODES[scores.dtype], height, width, rows, cols, sums.data_ptr())
    return sums
