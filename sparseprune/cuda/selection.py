"""Selection through the compiled CUDA kernels: exact, over many tensors, queued on the current stream.

A selection reads the values once a digit (three times in float32, twice in 16 bits), a mask twice more. Up to 120
tensors go through each launch, so their number does not matter for a model of usual depth. Nothing waits
for the device but the check for NaN, which has to raise; while a CUDA graph is recorded there is none, and a NaN gives
a NaN threshold and an empty mask instead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._registry import kernel
from ._environment import DTYPE_CODES, capturing, launching, why_not_cuda

DIGITS = ((21, 11), (10, 11), (0, 10))  # (shift, width) in bits, the highest first: reference.RADIX_DIGITS


class Selection:
    """A selection's state on the device and the launches that move it on. tensors: dense, one dtype, none empty."""

    def __init__(self, tensors: list[Tensor], magnitude: bool) -> None:
        self.tensors = tensors
        self.magnitude = magnitude
        self.code = DTYPE_CODES[tensors[0].dtype]
        # 16-bit values fill the upper half of a key: the third digit says nothing.
        self.digits = DIGITS if tensors[0].dtype == torch.float32 else DIGITS[:2]
        self.shift = self.digits[-1][0]
        with launching(tensors[0]) as (cuda, _):
            self.state = tensors[0].new_empty(cuda.SELECT_STATE_BYTES // 8, dtype=torch.int64)
            self.chunk, self.most = cuda.SELECT_CHUNK, cuda.SELECT_TENSORS
            self.bins = cuda.RADIX_BINS

    def launches(self, masks: list[Tensor] | None = None) -> Iterator[tuple[list[tuple[int, int, int]], int]]:
        """(address, length, address of the mask) of each launch's tensors, and the chunks of the launches before it."""
        before = 0
        for first in range(0, len(self.tensors), self.most):
            here = self.tensors[first : first + self.most]
            into = [0] * len(here) if masks is None else [m.data_ptr() for m in masks[first : first + self.most]]
            yield [(x.data_ptr(), x.numel(), mask) for x, mask in zip(here, into)], before
            before += sum(-(-x.numel() // self.chunk) for x in here)

    def find(self, op: str, k: int) -> None:
        """Finds the key of the k-th largest entry. ValueError on NaN."""
        counts = self.state.new_empty(self.bins + 1)
        with launching(self.state) as (cuda, stream):
            cuda.select_begin(self.state.data_ptr(), counts.data_ptr(), k, stream)
            for level, (shift, width) in enumerate(self.digits):
                for listed, _ in self.launches():
                    cuda.select_histogram(
                        listed, self.code, self.magnitude, shift, width,
                        self.state.data_ptr(), 0, level == 0, counts.data_ptr(), stream,
                    )  # fmt: skip
                cuda.select_digit(self.state.data_ptr(), counts.data_ptr(), width, stream)
        self._reject_nan(op, counts[-1])

    def _reject_nan(self, op: str, count: Tensor) -> None:
        if not capturing(self.state.device) and int(count):
            raise ValueError(
                f"{op}: NaN among the values, and NaN has no rank; find its source, or use torch.nan_to_num first"
            )

    def cut(self, threshold: Tensor, ties: int) -> None:
        """Takes a given threshold instead, and how many of the entries equal to it are kept."""
        with launching(self.state) as (cuda, stream):
            cuda.select_from_threshold(
                self.state.data_ptr(), threshold.data_ptr(), self.code, self.magnitude, self.shift, ties, stream
            )

    def value(self) -> Tensor:
        """The entry found, 0-dim."""
        out = self.tensors[0].new_empty(())
        with launching(out) as (cuda, stream):
            cuda.select_value(self.state.data_ptr(), self.code, self.magnitude, self.shift, out.data_ptr(), stream)
        return out

    def masks(self, op: str, seen: bool) -> list[Tensor]:
        """True over the threshold, and for the first of the entries equal to it, list order before flat index.

        seen: NaN has been ruled out before.
        """
        counts = self.state.new_empty(sum(-(-x.numel() // self.chunk) for x in self.tensors))
        nan = torch.zeros((), dtype=torch.int64, device=counts.device)
        masks = [torch.empty_like(x, dtype=torch.bool) for x in self.tensors]
        with launching(counts) as (cuda, stream):
            shared = self.code, self.magnitude, self.shift, self.state.data_ptr()
            for listed, before in self.launches():
                cuda.select_count_ties(listed, before, *shared, counts.data_ptr(), nan.data_ptr(), stream)
            cuda.select_scan(counts.data_ptr(), counts.numel(), stream)
            for listed, before in self.launches(masks):
                cuda.select_mask(listed, before, *shared, counts.data_ptr(), stream)
        if not seen:
            self._reject_nan(op, nan)
        return masks


def _filled(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors if tensor.numel()]


def _masks_of(op: str, tensors: list[Tensor], selection: Selection, seen: bool) -> list[Tensor]:
    """The selection's masks in the shapes of all tensors, the empty ones included."""
    found = iter(selection.masks(op, seen))
    return [next(found) if t.numel() else torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in tensors]


def _largest(op: str, tensors: list[Tensor], k: int, magnitude: bool) -> list[Tensor]:
    filled = _filled(tensors)
    if not filled:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    selection = Selection(filled, magnitude)
    selection.find(op, max(k, 1))
    if k == 0:
        return [torch.zeros(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    return _masks_of(op, tensors, selection, seen=True)


def _why_not_selection(tensors: list[Tensor], *rest: object) -> list[str]:
    return why_not_cuda(tensors)


@kernel("kth_magnitude", "cuda", _why_not_selection)
def kth_magnitude(tensors: list[Tensor], k: int) -> Tensor:
    """tensors: any shapes, one dtype; returns the k-th largest |x| over all of them, 1-based, 0-dim."""
    selection = Selection(_filled(tensors), magnitude=True)
    selection.find("kth_magnitude", k)
    return selection.value()


@kernel("topk_mask", "cuda", _why_not_selection)
def topk_mask(scores: list[Tensor], k: int) -> list[Tensor]:
    """scores: any shapes, one dtype; returns bool masks of those shapes, k True in all, ties to the lower index."""
    return _largest("topk_mask", scores, k, magnitude=False)


@kernel("magnitude_mask", "cuda", _why_not_selection)
def magnitude_mask(tensors: list[Tensor], k: int) -> list[Tensor]:
    """As :func:`topk_mask`, on |x|."""
    return _largest("magnitude_mask", tensors, k, magnitude=True)


def _why_not_cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[str]:
    return why_not_cuda(tensors, threshold)


@kernel("cut_mask", "cuda", _why_not_cut_mask)
def cut_mask(tensors: list[Tensor], threshold: Tensor, ties: int, magnitude: bool) -> list[Tensor]:
    """tensors: any shapes; True above the threshold and at the first ``ties`` entries equal to it, in list order."""
    filled = _filled(tensors)
    if not filled:
        return [torch.empty(t.shape, dtype=torch.bool, device=t.device) for t in tensors]
    selection = Selection(filled, magnitude)
    selection.cut(threshold.to(filled[0].dtype).contiguous(), ties)
    return _masks_of("cut_mask", tensors, selection, seen=False)


@kernel("radix_histogram", "cuda", _why_not_selection)
def radix_histogram(tensors: list[Tensor], prefix: int, level: int, magnitude: bool) -> Tensor:
    """int64 `[2049]`: how many keys that begin with ``prefix`` have each next digit; the last entry counts NaN."""
    shift, width = DIGITS[level]
    filled = _filled(tensors)
    with launching(tensors[0]) as (cuda, stream):
        counts = torch.zeros(cuda.RADIX_BINS + 1, dtype=torch.int64, device=tensors[0].device)
        for listed, _ in Selection(filled, magnitude).launches() if filled else ():
            cuda.select_histogram(
                listed, DTYPE_CODES[filled[0].dtype], magnitude, shift, width, 0, prefix, True, counts.data_ptr(),
                stream,
            )  # fmt: skip
    return counts
