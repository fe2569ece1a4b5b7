"""Which weights of a layer are kept together, and exact selection under that pattern.

A pattern works on the scores `[N, K]` of one layer, or on a slice of its columns, and keeps exactly the count asked
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern", "choose", "choose_sliced", "row_slices", "select", "select_rows", "spread"]


@dataclass(frozen=True)
class Pattern:
    """kind: "element", "block" (r x c kept or dropped as one) or "nm" (n kept of every m along the input)."""

    kind: str = "element"
    r: int = 1
    c: int = 1
    n: int = 0
    m: int = 0

    @property
    def width(self) -> int:
        """Columns that have to be decided together."""
        return self.m if self.kind == "nm" else self.c

    def units(self, shape: torch.Size) -> int:
        """Blocks of a layer: what a count is a count of. Elements for "element" and "nm"."""
        return shape.numel() // (self.r * self.c)

    def reduce(self, scores: Tensor) -> Tensor:
        """scores `[N, K]` -> `[N/r, K/c]` sums."""
        if self.r == self.c == 1:
            return scores
        rows, columns = scores.shape
        return scores.reshape(rows // self.r, self.r, columns // self.c, self.c).sum((1, 3))

    def expand(self, mask: Tensor) -> Tensor:
        """mask `[N/r, K/c]` -> `[N, K]`."""
        if self.r == self.c == 1:
            return mask
        return mask.repeat_interleave(self.r, 0).repeat_interleave(self.c, 1)


def spread(keep: int, parts: int) -> list[int]:
    """keep shared out as evenly as whole numbers allow, the earlier parts taking the remainder."""
    base, extra = divmod(keep, parts)
    return [base + (i < extra) for i in range(parts)]


def select(scores: Tensor, keep: int) -> Tensor:
    """scores of any shape -> bool mask of exactly keep True, the largest; ties go to the lower index."""
    from ... import ops

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


def choose(scores: Tensor, pattern: Pattern, keep: int, scope: str) -> Tensor:
    """scores `[N, K]` -> bool `[N, K]` with keep units of the pattern kept; scope "row" or "layer" (nm ignores
    both).
    """
    if pattern.kind == "nm":
        from ... import ops

        return ops.nm_mask(scores, pattern.n, pattern.m)
    units = pattern.reduce(scores)
    chosen = select_rows(units, spread(keep, units.shape[0])) if scope == "row" else select(units, keep)
    return pattern.expand(chosen)


SLICE = 2**17  # numbers: half a MiB of float32


def choose_sliced(
    scores: Callable[[slice], Tensor], like: Tensor, pattern: Pattern, keep: int, scope: str
) -> Tensor:
    """`choose` from scores that are made some rows at a time: scores(rows) float32 are those rows of `[N, K]`, the
    shape and device of like. All of them are held at once only where single weights of a whole layer are compared.
    """
    rows, columns = like.shape
    slices = row_slices(like.shape, SLICE, pattern.r)
    if pattern.kind != "nm" and scope != "row":
        units = like.new_empty(rows // pattern.r, columns // pattern.c, dtype=torch.float32)
        for part in slices:
            units[part.start // pattern.r : part.stop // pattern.r] = pattern.reduce(scores(part))
        return pattern.expand(select(units, keep))
    mask = torch.empty_like(like, dtype=torch.bool, memory_format=torch.contiguous_format)
    counts = spread(keep, rows // pattern.r)
    for part in slices:
        if pattern.kind == "nm":
            mask[part] = choose(scores(part), pattern, keep, scope)
        else:
            kept = counts[part.start // pattern.r : part.stop // pattern.r]
            mask[part] = pattern.expand(select_rows(pattern.reduce(scores(part)), kept))
    return mask
