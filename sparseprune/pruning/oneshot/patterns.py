"""Which weights of a layer are kept together, and exact selection under that pattern.

A pattern works on the scores `[N, K]` of one layer, or on a slice of its columns, and keeps exactly the count asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Pattern", "choose", "select", "select_rows", "spread"]


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


def select_rows(scores: Tensor, keep: int) -> Tensor:
    """scores `[N, K]` -> bool mask with keep spread evenly over the rows, the largest of each; ties to the lower
    index.
    """
    counts = torch.tensor(spread(keep, scores.shape[0]), device=scores.device)
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked = torch.arange(scores.shape[1], device=scores.device)[None] < counts[:, None]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, ranked)


def choose(scores: Tensor, pattern: Pattern, keep: int, scope: str) -> Tensor:
    """scores `[N, K]` -> bool `[N, K]` with keep units of the pattern kept; scope "row" or "layer" (nm ignores
    both).
    """
    if pattern.kind == "nm":
        from ... import ops

        return ops.nm_mask(scores, pattern.n, pattern.m)
    units = pattern.reduce(scores)
    return pattern.expand(select_rows(units, keep) if scope == "row" else select(units, keep))


