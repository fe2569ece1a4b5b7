"""What timing a layer needs, whatever is timed: copies that come from memory, and no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CACHED", "FEW", "MIN_RATIO", "copies_in_turn", "rows_for", "without_grad"]

MIN_RATIO = 1.1  # over dense, from which on another form is taken

# A decode step passes over the whole model between two calls of a layer. Its weights are then in memory unless all of
# them fit what one program can count on of the last cache, however large a shared one says it is.
# Timing a call right after a flush would count the interpreter's own misses; copies of the layer in turn do not.
FEW = 8  # rows of x, up to which reading the weight is what takes the time
CACHED = 32 << 20
_IN_TURN = 64 << 20
_MOST = 1024


def copies_in_turn(nbytes: int) -> int:
    """How many copies of a weight of this size, called in turn, come from memory every time; of a tiny one, whose call
    is not long for its bytes, no more than a thousand.
    """
    return min(_MOST, max(1, _IN_TURN // max(1, nbytes)))


def rows_for(weight: Tensor, count: int) -> Tensor:
    """x `[count, K]` for a weight `[N, K]`, always the same: the caller's random state stays."""
    return torch.randn(count, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)


def copies_on_gpu(nbytes: int, kept: int, cache: int) -> int:
    """The same on a GPU with an L2 cache of ``cache`` bytes, for each of two contestants: a dense weight of ``nbytes``,
    of which at most 2 GiB are made, and what is ``kept`` of it.
    """
    return max(1, min(3 * cache // max(1, kept), (2 << 30) // max(1, nbytes)))


def without_grad(call: Callable[[], object]) -> Callable[[], object]:
    """The call under ``torch.no_grad()``."""

    def run() -> object:
        with torch.no_grad():
            return call()

    return run
