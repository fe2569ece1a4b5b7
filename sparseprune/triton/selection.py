"""Selection as Triton kernels: exact, over many tensors without concatenating them; only the count of NaN goes to the
host.

A selection reads the values once a digit (twice in half precision, three times in float32) and twice more for a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from ._environment import guard, kernels, multiprocessors, why_not_triton
from .masking import as_bytes, reject_nan

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) in bits of each level's digit, the highest first
BINS = 2048
HISTOGRAM = {"BLOCK": 4096, "num_warps": 8}
CUT_BLOCK = 2048
CUT_WARPS = 4
GROUPED = {2: 512, 4: 256, 8: 64, 16: 16, 32: 4}  # M of N:M -> groups a program: M * M * groups stays within 4096


def _contiguous(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors if tensor.numel()]


def _levels(dtype: torch.dtype) -> int:
    """16-bit values fill the upper half of a key, so two digits settle them."""
    return 3 if dtype == torch.float32 else 2


def _count(tensors: list[Tensor], counts: Tensor, prefix: Tensor, level: int, magnitude: bool) -> None:
    """Adds one level's digits of all tensors to counts (int64 `[BINS + 1]`)."""
    shift, width = DIGITS[level]
    for x in tensors:
        blocks = -(-x.numel() // HISTOGRAM["BLOCK"])
        chunks = max(1, blocks // (8 * multiprocessors(x)))
        kernels("selection").radix_histogram_kernel[(-(-blocks // chunks),)](
            x, counts, prefix, x.numel(), chunks,
            SHIFT=shift, WIDTH=width, MAGNITUDE=magnitude, BINS=BINS, **HISTOGRAM,
        )  # fmt: skip


def _kth(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> tuple[Tensor, Tensor]:
    """tensors: contiguous, not empty; returns the k-th largest (0-dim) and how many equal to it are within k (`[1]`).
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    levels = _levels(dtype)
    counts = torch.zeros(levels, BINS + 1, dtype=torch.int64, device=device)
    state = torch.zeros(2, dtype=torch.int64, device=device)
    state[1].fill_(k)
    for level in range(levels):
        _count(tensors, counts[level], state, level, magnitude)
        width = DIGITS[level][1]
        kernels("selection").radix_select_kernel[(1,)](counts[level], state, WIDTH=width, BINS=BINS, num_warps=4)
    value = torch.empty(1, dtype=dtype, device=device)
    kernels("selection").key_value_kernel[(1,)](
        state, value, SHIFT=DIGITS[levels - 1][0], MAGNITUDE=magnitude, num_warps=1
    )
    reject_nan(op, counts[0, BINS])
    return value[0], state[1:]


def _cut(tensors: list[Tensor], threshold: Tensor, ties: Tensor, magnitude: bool) -> tuple[list[Tensor], Tensor]:
    """threshold: 0-dim, of the tensors' dtype; ties: int64 `[1]`; returns the bool masks, and the count of NaN."""
    full = [tensor.contiguous() for tensor in tensors]
    programs = [-(-x.numel() // CUT_BLOCK) for x in full]
    counted = torch.empty(sum(programs), dtype=torch.int32, device=threshold.device)
    bad = torch.zeros(1, dtype=torch.int64, device=threshold.device)
    pieces = list(torch.split(counted, programs))
    for x, piece, count in zip(full, pieces, programs):
        if count:
            kernels("selection").count_ties_kernel[(count,)](
                x, threshold, piece, bad, x.numel(), MAGNITUDE=magnitude, BLOCK=CUT_BLOCK, num_warps=CUT_WARPS
            )
    upto = torch.cumsum(counted, 0, dtype=torch.int64)
    masks = []
    for x, piece, count in zip(full, torch.split(upto, programs), programs):
        mask = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        if count:
            kernels("selection").cut_mask_kernel[(count,)](
                x, threshold, piece, ties, as_bytes(mask), x.numel(),
                MAGNITUDE=magnitude, BLOCK=CUT_BLOCK, num_warps=CUT_WARPS,
            )  # fmt: skip
        masks.append(mask)
    return masks, bad


def _largest(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    used = _contiguous(tensors)
    if not used:
        return [torch.zeros(x.shape, dtype=torch.bool, device=x.device) for x in tensors]
    with guard(used[0]):
        threshold, ties = _kth(op, used, max(k, 1), magnitude)
        if k == 0:
            return [torch.zeros(x.shape, dtype=torch.bool, device=x.device) for x in tensors]
        return _cut(tensors, threshold, ties, magnitude)[0]


def _why_not_select(tensors: list[Tensor], k: int) -> list[str]:
    return why_not_triton(tensors)


@kernel("kth_magnitude", "triton", _why_not_select)
def kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """tensors: any shapes, one dtype; returns the k-th largest |x| over all of them, 1-based, 0-dim.

    Waits for the stream once, to report NaN; not while a CUDA graph is captured, where NaN ranks above infinity.
    """
    used = _contiguous(tensors)
    with guard(used[0]):
        return _kth("kth_magnitude", used, k, magnitude=True)[0].clone()


@kernel("topk_mask", "triton", _why_not_select)
def topk_mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """scores: any shapes, one dtype; returns bool masks of those shapes, k True in all, ties to the lower index.

    Waits as :func:`kth_magnitude` does.
    """
    return _largest("topk_mask", scores, k, magnitude=False)


@kernel("magnitude_mask", "triton", _why_not_select)
def magnitude_mask(tensors: list[Tensor], k: int) -> list[Tensor]:
    """As :func:`topk_mask`, on |x|."""
    return _largest("magnitude_mask", tensors, k, magnitude=True)


def _why_not_cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[str]:
    reasons = why_not_triton(tensors)
    if tensors and threshold.device != tensors[0].device:
        reasons.append(f"needs the threshold on {tensors[0].device}, got {threshold.device}")
    return reasons


@kernel("cut_mask", "triton", _why_not_cut_mask)
def cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[Tensor]:
    """tensors: any shapes; True above the threshold and at the first ``ties`` entries equal to it, in list order.

    Waits for the stream once, to report NaN; not while a CUDA graph is captured, where NaN counts as below.
    """
    with guard(tensors[0]):
        allowed = torch.full((1,), ties, dtype=torch.int64, device=threshold.device)
        masks, bad = _cut(tensors, threshold.to(tensors[0].dtype), allowed, magnitude)
        reject_nan("cut_mask", bad)
        return masks


def _why_not_radix_histogram(tensors: list[Tensor], prefix: int, level: int, magnitude: bool) -> list[str]:
    return why_not_triton(tensors)


@kernel("radix_histogram", "triton", _why_not_radix_histogram)
def radix_histogram(tensors: list[Tensor], prefix: int, level: int, magnitude: bool) -> Tensor:
    """int64 `[2049]`: how many sortable keys that begin with ``prefix`` have each next digit; last, the count of NaN.
    """
    device = tensors[0].device
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=device)
    with guard(tensors[0]):
        wanted = torch.full((1,), prefix, dtype=torch.int64, device=device)
        _count(_contiguous(tensors), counts, wanted, level, magnitude)
    return counts


def _why_not_nm_mask(scores: Tensor, n: int, m: int) -> list[str]:
    reasons = why_not_triton(scores)
    if m not in GROUPED:
        reasons.append(f"needs M among {', '.join(map(str, GROUPED))}, got {m}")
    return reasons


@kernel("nm_mask", "triton", _why_not_nm_mask)
def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """scores: `[..., K]`, m divides K; returns bool `[..., K]`: the n largest of every m, ties to the lower index.

    Waits for the stream once, to report NaN; not while a CUDA graph is captured.
    """
    full = scores.contiguous()
    mask = torch.empty(full.shape, dtype=torch.bool, device=full.device)
    groups = full.numel() // m
    if groups:
        bad = torch.zeros(1, dtype=torch.int64, device=full.device)
        with guard(full):
            kernels("selection").nm_mask_kernel[(-(-groups // GROUPED[m]),)](
                full, as_bytes(mask), bad, groups, KEPT=n, OF=m, BLOCK=GROUPED[m], num_warps=4
            )
            reject_nan("nm_mask", bad)
    return mask


def _why_not_block_scores(scores: Tensor, rows: int, cols: int) -> list[str]:
    reasons = why_not_triton(scores)
    if cols > 1024:
        reasons.append(f"needs blocks of at most 1024 columns, got {cols}")
    elif scores.shape[1] // cols > 65535 * (1024 >> (cols - 1).bit_length()):
        reasons.append(f"needs fewer blocks in a row than a grid takes, got {scores.shape[1] // cols}")
    return reasons


@kernel("block_scores", "triton", _why_not_block_scores)
def block_scores(scores: Tensor, rows: int, cols: int) -> Tensor:
    """scores: `[N, K]`; returns float32 `[N / rows, K / cols]`, the sum over each block."""
    full = scores.contiguous()
    bands, blocks = full.shape[0] // rows, full.shape[1] // cols
    out = torch.empty(bands, blocks, dtype=torch.float32, device=full.device)
    if out.numel():
        wide = 1 << (cols - 1).bit_length()
        block = max(1, 1024 // wide)
        with guard(full):
            kernels("selection").block_scores_kernel[(bands, -(-blocks // block))](
                full, out, full.shape[1], blocks, rows, cols, COLS=wide, BLOCK=block, num_warps=4
            )
    return out
