"""Selection ops: exact thresholds and masks over one tensor, a list of them, or tensors spread over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import torch
from torch import Tensor

from ..reference import RADIX_BINS, RADIX_DIGITS, key_value
from ._library import define

__all__ = [
    "RadixSelect",
    "block_scores",
    "cut_mask",
    "kth_magnitude",
    "magnitude_mask",
    "nm_mask",
    "radix_histogram",
    "topk_mask",
]


def _masks(tensors: list[Tensor], *rest: object) -> list[Tensor]:
    return [t.new_empty(t.shape, dtype=torch.bool) for t in tensors]


define("kth_magnitude(Tensor[] tensors, int k) -> Tensor", "kth_magnitude", lambda tensors, k: tensors[0].new_empty(()))
define("topk_mask(Tensor[] scores, int k) -> Tensor[]", "topk_mask", _masks)
define("magnitude_mask(Tensor[] tensors, int k) -> Tensor[]", "magnitude_mask", _masks)
define("cut_mask(Tensor[] tensors, Tensor threshold, int ties, bool magnitude) -> Tensor[]", "cut_mask", _masks)
define(
    "radix_histogram(Tensor[] tensors, int prefix, int level, bool magnitude) -> Tensor",
    "radix_histogram",
    lambda tensors, prefix, level, magnitude: tensors[0].new_empty((RADIX_BINS + 1,), dtype=torch.int64),
)
define(
    "nm_mask(Tensor scores, int n, int m) -> Tensor",
    "nm_mask",
    lambda scores, n, m: scores.new_empty(scores.shape, dtype=torch.bool),
)
define(
    "block_scores(Tensor scores, int rows, int cols) -> Tensor",
    "block_scores",
    lambda scores, rows, cols: scores.new_empty(
        (scores.shape[0] // rows, scores.shape[1] // cols),
        dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32,
    ),
)


def _listed(op: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """The tensors as a list, detached; ValueError unless they share one floating dtype and one device."""
    listed = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    for i, tensor in enumerate(listed):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{op}: expected a tensor or a list of tensors, got {type(tensor).__name__} at position {i}"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: expected a floating dtype, got {tensor.dtype} at position {i}; use .float()")
        if tensor.dtype != listed[0].dtype:
            raise ValueError(
                f"{op}: expected one dtype, got {listed[0].dtype} and {tensor.dtype} (position {i}); use .float()"
            )
        if tensor.device != listed[0].device:
            raise ValueError(
                f"{op}: expected one device, got {listed[0].device} and {tensor.device} (position {i}); "
                "move them together or sum histograms with RadixSelect"
            )
    return [t.detach() for t in listed]


def _check_count(op: str, k: int, lowest: int, tensors: list[Tensor]) -> None:
    total = sum(t.numel() for t in tensors)
    if not lowest <= k <= total:
        raise ValueError(f"{op}: k expected in [{lowest}, {total}], the number of entries, got {k}")


def kth_magnitude(w: Tensor | Sequence[Tensor], k: int) -> Tensor:
    """w: `[...]` or a list of tensors of one floating dtype; returns the k-th LARGEST ``|w|`` over all, 0-dim, w's
    dtype.

    k counts from 1. Exact, inf included, nothing is concatenated. Raises ValueError on NaN and on k outside [1, numel].
    """
    listed = _listed("kth_magnitude", w)
    _check_count("kth_magnitude", k, 1, listed)
    return torch.ops.sparseprune.kth_magnitude(listed, k)


@overload
def topk_mask(scores: Tensor, k: int) -> Tensor: ...
@overload
def topk_mask(scores: Sequence[Tensor], k: int) -> list[Tensor]: ...
def topk_mask(scores: Tensor | Sequence[Tensor], k: int) -> Tensor | list[Tensor]:
    """scores: `[...]` or a list of them; returns bool masks of the same shapes, tensor in tensor out, list in list out.

    Exactly k entries are True over the whole list: the largest signed scores, ties to the lower index (list order, then
    flat index). Raises ValueError on NaN and on k outside [0, numel].
    """
    listed = _listed("topk_mask", scores)
    _check_count("topk_mask", k, 0, listed)
    masks = torch.ops.sparseprune.topk_mask(listed, k)
    return masks[0] if isinstance(scores, Tensor) else masks


@overload
def magnitude_mask(w: Tensor, k: int) -> Tensor: ...
@overload
def magnitude_mask(w: Sequence[Tensor], k: int) -> list[Tensor]: ...
def magnitude_mask(w: Tensor | Sequence[Tensor], k: int) -> Tensor | list[Tensor]:
    """As :func:`topk_mask`, with ``|w|`` for the scores: the k entries of the largest magnitude are True."""
    listed = _listed("magnitude_mask", w)
    _check_count("magnitude_mask", k, 0, listed)
    masks = torch.ops.sparseprune.magnitude_mask(listed, k)
    return masks[0] if isinstance(w, Tensor) else masks


@overload
def cut_mask(scores: Tensor, threshold: Tensor, ties: int, magnitude: bool = False) -> Tensor: ...
@overload
def cut_mask(scores: Sequence[Tensor], threshold: Tensor, ties: int, magnitude: bool = False) -> list[Tensor]: ...
def cut_mask(
    scores: Tensor | Sequence[Tensor], threshold: Tensor, ties: int, magnitude: bool = False
) -> Tensor | list[Tensor]:
    """scores: `[...]` or a list; threshold: 0-dim; returns bool masks: scores above the threshold, and the first
    ``ties`` entries equal to it (list order, then flat index). ``magnitude``: on ``|scores|``. Raises ValueError on
    NaN.
    """
    listed = _listed("cut_mask", scores)
    if threshold.dim() or (listed and threshold.dtype != listed[0].dtype):
        raise ValueError(
            "cut_mask: threshold expected 0-dim of the scores' dtype, "
            f"got shape {list(threshold.shape)} of {threshold.dtype}"
        )
    if ties < 0:
        raise ValueError(f"cut_mask: ties expected to be at least 0, got {ties}")
    masks = torch.ops.sparseprune.cut_mask(listed, threshold.detach(), ties, magnitude)
    return masks[0] if isinstance(scores, Tensor) else masks


def radix_histogram(tensors: Tensor | Sequence[Tensor], prefix: int, level: int, magnitude: bool) -> Tensor:
    """One round of :class:`RadixSelect`. Returns int64 `[2049]`: the counts of each next digit of the keys that begin
    with ``prefix``, and as the last entry the number of NaN. Histograms of several processes may be summed.
    """
    listed = _listed("radix_histogram", tensors)
    if not listed:
        raise ValueError("radix_histogram: expected at least one tensor, which may be empty, to know the device")
    if listed[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"radix_histogram: expected float32, bfloat16 or float16, got {listed[0].dtype}; use .float()")
    if not 0 <= level < len(RADIX_DIGITS):
        raise ValueError(f"radix_histogram: level expected in [0, {len(RADIX_DIGITS)}), got {level}")
    return torch.ops.sparseprune.radix_histogram(listed, prefix, level, magnitude)


class RadixSelect:
    """The exact k-th largest over tensors that no single process holds, from summed histograms: nothing else is
    exchanged.

    ::

        select = RadixSelect(k, dtype=torch.float32, magnitude=True)   # k counts over all processes, from 1
        while not select.done:                                         # three rounds
            counts = select.histogram(own_tensors)                     # int64 [2049]
            torch.distributed.all_reduce(counts)
            select.update(counts)
        masks = cut_mask(own_tensors, select.threshold, select.own_ties(rank, counts_of_ranks), magnitude=True)

    :meth:`run` does the loop and the ties with any ``reduce`` that sums an int64 tensor over the processes in place.

    Attributes after the last round: ``threshold`` (0-dim, dtype), ``above`` (entries over it), ``equal`` (entries equal
    to it), ``ties`` (``k - above``: how many of the equal ones are kept), all counted over every process.
    """

    def __init__(self, k: int, dtype: torch.dtype = torch.float32, magnitude: bool = False) -> None:
        if k < 1:
            raise ValueError(f"RadixSelect: k expected to be at least 1, got {k}")
        self.k, self.dtype, self.magnitude = k, dtype, magnitude
        self.level, self.prefix, self.above, self.equal = 0, 0, 0, 0
        self.own_equal = 0
        self._own: Tensor | None = None

    @property
    def done(self) -> bool:
        """True once the threshold is known."""
        return self.level == len(RADIX_DIGITS)

    @property
    def ties(self) -> int:
        """How many of the entries equal to the threshold belong to the k largest, over all processes."""
        return self.k - self.above

    @property
    def threshold(self) -> Tensor:
        """The k-th largest value, 0-dim, on the CPU. RuntimeError before the last round."""
        if not self.done:
            raise RuntimeError(f"RadixSelect: threshold is known after {len(RADIX_DIGITS)} rounds, {self.level} done")
        return key_value(self.prefix, self.magnitude, self.dtype)

    def histogram(self, tensors: Tensor | Sequence[Tensor]) -> Tensor:
        """This process's counts for the current round, int64 `[2049]`; sum them over the processes, then
        :meth:`update`.
        """
        counts = radix_histogram(tensors, self.prefix, self.level, self.magnitude)
        self._own = counts.clone()
        return counts

    def update(self, counts: Tensor) -> None:
        """Takes the summed counts. ValueError on NaN anywhere and on a k larger than the number of entries."""
        values = counts.tolist()
        if values[RADIX_BINS]:
            raise ValueError(f"RadixSelect: {values[RADIX_BINS]} NaN among the scores, and NaN has no rank")
        above = self.above
        for digit in range(RADIX_BINS - 1, -1, -1):
            if above + values[digit] >= self.k:
                break
            above += values[digit]
        else:
            raise ValueError(
                f"RadixSelect: k expected in [1, {above}], the number of entries over all processes, got {self.k}"
            )
        self.above, self.equal = above, values[digit]
        self.own_equal = int(self._own[digit]) if self._own is not None else 0
        self.prefix = (self.prefix << RADIX_DIGITS[self.level][1]) | digit
        self.level += 1

    def own_ties(self, before: int) -> int:
        """How many of this process's equal entries are kept when the processes before it hold ``before`` equal
        entries.
        """
        return max(0, min(self.own_equal, self.ties - before))

    def run(
        self, tensors: Sequence[Tensor], reduce: Callable[[Tensor], object], rank: int, world_size: int
    ) -> list[Tensor]:
        """This process's masks: over all processes exactly k True, ties to the lower rank, then the lower index.

        ``reduce`` sums an int64 tensor over the processes in place, e.g. ``torch.distributed.all_reduce``; it is called
        four times, also by a process whose list holds only empty tensors.
        """
        while not self.done:
            counts = self.histogram(tensors)
            reduce(counts)
            self.update(counts)
        equal = torch.zeros(world_size, dtype=torch.int64, device=tensors[0].device)
        equal[rank] = self.own_equal
        reduce(equal)
        ties = self.own_ties(int(equal[:rank].sum()))
        return cut_mask(tensors, self.threshold.to(tensors[0].device), ties, self.magnitude)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """scores: `[..., K]`, m divides K; returns bool `[..., K]` that keeps the n largest signed scores of every m along
    K.

    Ties go to the lower index. ``nm_mask([[3, 1, 2, 2]], 2, 4)`` is ``[[True, False, True, False]]``. Raises ValueError
    on NaN.
    """
    (listed,) = _listed("nm_mask", scores)
    if not 1 <= n <= m:
        raise ValueError(f"nm_mask: n expected in [1, m], got n={n}, m={m}; N:M keeps N of every M")
    if scores.dim() < 1 or scores.shape[-1] % m:
        raise ValueError(f"nm_mask: m={m} must divide the last dimension of scores {list(scores.shape)}")
    return torch.ops.sparseprune.nm_mask(listed, n, m)


def block_scores(scores: Tensor, blocksize: tuple[int, int]) -> Tensor:
    """scores: `[N, K]`; blocksize (r, c) divides (N, K); returns `[N / r, K / c]`: the sum of the scores of each block.

    Sums are in float32, which is also the result's dtype (float64 for float64).
    """
    (listed,) = _listed("block_scores", scores)
    rows, cols = blocksize
    if scores.dim() != 2 or rows < 1 or cols < 1 or scores.shape[0] % rows or scores.shape[1] % cols:
        raise ValueError(
            f"block_scores: blocksize {tuple(blocksize)} must divide a 2-D scores tensor, got {list(scores.shape)}; "
            "choose a divisor or pad"
        )
    return torch.ops.sparseprune.block_scores(listed, rows, cols)
