"""Exact selection: the k highest scores over many tensors, on one process or over several, and the floor under each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from .counts import kept_count, weighted_counts

if TYPE_CHECKING:
    from .units import UnitMap

__all__ = ["DEFAULT_FLOOR", "DistributedSelector", "Selector", "topk_units"]

#: The least density of a layer, as a share of the density of all, where the caller names none. Weights that are small
#: as a whole (a pooler after a contrastive training, say) lose every comparison with those of other layers, and a layer
#: without weights passes nothing on.
DEFAULT_FLOOR = 0.5


class Selector:
    """Exact top-k on one process. :class:`DistributedSelector` does the same over several."""

    def total(self, units: int) -> int:
        """The number of units over all processes."""
        return units

    def topk(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        """scores: `[...]` each; returns bool masks with k True in all, ties to the lower index."""
        device = scores[0].device
        wide = [s if s.dtype == scores[0].dtype else s.float() for s in scores]
        if any(s.dtype != wide[0].dtype for s in wide):
            wide = [s.float() for s in scores]
        masks = ops.topk_mask([s.detach().to(device).contiguous() for s in wide], k)
        return [mask.to(s.device) for mask, s in zip(masks, scores)]


class DistributedSelector(Selector):
    """Exact top-k over tensors that are spread over the processes of ``group``: only histograms are exchanged.

    Every process calls with the same number of tensors and the same k, counted over all of them. Ties go to the lower
    rank, then to the lower index.
    """

    def __init__(self, group: Any = None) -> None:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise ValueError("DistributedSelector: torch.distributed is not initialised; call init_process_group first")
        self.group = group

    def _reduce(self, counts: Tensor) -> None:
        torch.distributed.all_reduce(counts, group=self.group)

    def total(self, units: int) -> int:
        count = torch.tensor([units], dtype=torch.int64)
        self._reduce(count)
        return int(count)

    def topk(self, scores: Sequence[Tensor], k: int) -> list[Tensor]:
        if k == 0:
            return [torch.zeros(s.shape, dtype=torch.bool, device=s.device) for s in scores]
        listed = [s.detach().float().contiguous() for s in scores]
        select = ops.RadixSelect(k, dtype=torch.float32)
        rank, size = torch.distributed.get_rank(self.group), torch.distributed.get_world_size(self.group)
        return select.run(listed, self._reduce, rank, size)


def topk_units(
    maps: Sequence[UnitMap], scores: Sequence[Tensor], sparsity: float, scope: str,
    densities: Mapping[str, float] | None, selector: Selector, floor: float | None = 0.0,
) -> list[Tensor]:  # fmt: skip
    """scores: one tensor a map, of its shape; returns bool tensors, True = kept, exact in count. floor: see
    ``Plan.build``; it counts under scope "global" without densities.
    """
    units = [selector.total(m.units) for m in maps]
    if densities is not None:
        counts = weighted_counts(units, sparsity, [densities[m.layers[0]] for m in maps])
    elif scope == "layer":
        counts = [kept_count(n, sparsity) for n in units]
    else:
        return _topk_above(scores, units, kept_count(sum(units), sparsity), selector, floor)
    return [selector.topk([s], k)[0] for s, k in zip(scores, counts)]


def _topk_above(
    scores: Sequence[Tensor], units: Sequence[int], k: int, selector: Selector, floor: float | None
) -> list[Tensor]:
    """The k highest of all, but of each tensor at least ``floor * k / sum(units)`` of its own units, rounded down.

    floor None: :data:`DEFAULT_FLOOR`, and one unit of each tensor where k goes round.
    A tensor that falls short is held at its least and leaves the competition, which starts anew for the rest: their
    threshold rises, so that none that was short would come back.
    """
    kept = selector.topk(scores, k)
    if floor == 0:
        return kept
    share = DEFAULT_FLOOR if floor is None else floor
    least = [math.floor(share * k * n / max(1, sum(units))) for n in units]
    one = [max(count, min(1, n)) for count, n in zip(least, units)]
    if floor is None and sum(one) <= k:
        least = one
    for i, s in enumerate(scores):  # what an earlier stage has taken away cannot be kept
        least[i] = min(least[i], selector.total(int((s > -math.inf).sum())))
    held: set[int] = set()
    while True:
        short = [i for i in range(len(scores)) if i not in held and selector.total(int(kept[i].sum())) < least[i]]
        if not short:
            return kept
        held.update(short)
        for i in short:
            kept[i] = selector.topk([scores[i]], least[i])[0]
        free = [i for i in range(len(scores)) if i not in held]
        chosen = selector.topk([scores[i] for i in free], k - sum(least[i] for i in held))
        for i, mask in zip(free, chosen):
            kept[i] = mask
