"""Exact selection in one layer: from its scores `[N, K]`, or a slice of its columns, under a granularity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ... import ops
from ..granularity import NM, InWeight

__all__ = ["choose", "choose_rows", "choose_sliced", "row_slices", "select", "select_rows", "spread"]


def spread(keep: int, parts: int) -> list[int]:
    """keep shared out as evenly as whole numbers allow, the earlier parts taking the remainder."""
    base, extra = divmod(keep, parts)
    return [base + (i < extra) for i in range(parts)]


def select(scores: Tensor, keep: int) -> Tensor:
    """scores of any shape -> bool mask of exactly keep True, the largest; ties go to the lower index."""
    return ops.topk_mask(scores.contiguous(), keep)


def row_slices(shape: Sequence[int], numbers: int, whole: int = 1) -> Iterator[slice]:
    """shape (N, K): slices of about so many numbers that cover all rows, each but the last of a multiple of whole rows
    and, where there are that many, of 64, so that products of a slice are those of the whole.
    """
    rows, columns = shape
    step = max(1, numbers // max(1, columns))
    for multiple in (math.lcm(whole, 64), whole):
        if step >= multiple:
            step = step // multiple * multiple
            break
    else:
        step = whole
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def select_rows(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """scores `[N, K]` -> bool mask with counts[i] in row i, its largest; ties go to the lower index."""
    kept = torch.tensor(counts, device=scores.device)
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = torch.arange(scores.shape[1], device=scores.device)[None] < kept[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ranked)


def choose(scores: Tensor, pattern: InWeight, keep: int, scope: str) -> Tensor:
    """scores `[N, K]` -> bool `[N, K]` with keep units of the pattern kept; scope "row" or "layer" (nm ignores
    both).
    """
    if isinstance(pattern, NM):
        return ops.nm_mask(scores, pattern.n, pattern.m)
    if scope == "row":
        return choose_rows(scores, pattern, spread(keep, len(scores) // pattern.blocksize[0]))
    return pattern.spread(select(pattern.sums(scores), keep))


def choose_rows(scores: Tensor, pattern: InWeight, counts: Sequence[int]) -> Tensor:
    """scores `[N, K]` -> bool `[N, K]` with counts[i] units of the pattern kept in its row i of units."""
    return pattern.spread(select_rows(pattern.sums(scores), counts))


SLICE = 2**17  # numbers: half a MiB of float32


def choose_sliced(
    scores: Callable[[slice], Tensor], like: Tensor, pattern: InWeight, keep: int, scope: str
) -> Tensor:
    """`choose` from scores that are made some rows at a time: scores(rows) float32 are those rows of `[N, K]`, the
    shape and device of like. All of them are held at once only where single weights of a whole layer are compared.
    """
    (rows, columns), (r, c) = like.shape, pattern.blocksize
    slices = row_slices(like.shape, SLICE, r)
    if not isinstance(pattern, NM) and scope != "row":
        units = like.new_empty(rows // r, columns // c, dtype=torch.float32)
        for part in slices:
            units[part.start // r : part.stop // r] = pattern.sums(scores(part))
        return pattern.spread(select(units, keep))
    mask = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
    counts = spread(keep, rows // r)
    for part in slices:
        if isinstance(pattern, NM):
            mask[part] = choose(scores(part), pattern, keep, scope)
        else:
            mask[part] = choose_rows(scores(part), pattern, counts[part.start // r : part.stop // r])
    return mask
