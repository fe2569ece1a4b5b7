"""The processes that train together: means that come out alike on all of them. Alone, everything is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .masks import MaskSet

__all__ = ["Processes"]

_BUCKET = 8 * 2**20  # elements an exchange: 32 MiB of float32


class Processes:
    """The processes of ``group`` (None: all) that hold the same model. ``index`` is this one's number, ``size`` how
    many they are: 1, with every method free, where torch.distributed is not initialised or ``active`` is False.

    Every method is called by all of them, in the same order. Sums are formed once and handed out, so that the results
    are equal to the bit everywhere.
    """

    def __init__(self, group: Any = None, active: bool = True) -> None:
        ready = active and torch.distributed.is_available() and torch.distributed.is_initialized()
        self.group = group
        self.size = torch.distributed.get_world_size(group) if ready else 1
        self.index = torch.distributed.get_rank(group) if ready else 0

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its mean over the processes, a bucket an exchange."""

        def mean(flat: Tensor) -> None:
            torch.distributed.all_reduce(flat, group=self.group)
            flat /= self.size

        self._exchange(tensors, mean)

    def sum_(self, tensor: Tensor) -> None:
        """Replaces it by its sum over the processes."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)

    def mean_gradients_(self, parameters: Sequence[nn.Parameter]) -> None:
        """Averages ``.grad``: one that is None counts as zero where another process has it, and stays None where none
        has.
        """
        if self.size == 1:
            return
        there = torch.tensor([p.grad is not None for p in parameters], device=parameters[0].device).float()
        self.mean_([there])
        found = [p for p, share in zip(parameters, there.tolist()) if share > 0]
        for p in found:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.mean_([p.grad for p in found if p.grad is not None])

    def numbers(self, values: Mapping[str, float], device: torch.device) -> dict[str, float]:
        """The mean of each number, with the same keys everywhere; NaN where one process has NaN."""
        if self.size == 1:
            return dict(values)
        listed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        self.mean_([listed])
        return dict(zip(values, listed.tolist()))

    def extremes(self, value: float, device: torch.device) -> tuple[float, float]:
        """(lowest, highest) over the processes."""
        if self.size == 1:
            return value, value
        both = torch.tensor([-value, value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.group)
        return -float(both[0]), float(both[1])

    def copy_first_(self, tensors: Iterable[Tensor]) -> None:
        """Every process takes the values of the first."""

        def copy(flat: Tensor) -> None:
            source = 0 if self.group is None else torch.distributed.get_global_rank(self.group, 0)
            torch.distributed.broadcast(flat, source, group=self.group)

        self._exchange(tensors, copy)

    def _exchange(self, tensors: Iterable[Tensor], agree: Callable[[Tensor], None]) -> None:
        """``agree`` makes a flat tensor the same everywhere, in place; called for a bucket of neighbours at a time."""
        if self.size == 1:
            return
        for bucket in _buckets([t for t in tensors if t.numel()]):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            agree(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket])):
                tensor.detach().copy_(part.view(tensor.shape))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order. Anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value, group=self.group)
        return found

    def check_masks(self, masks: Mapping[str, Tensor], who: str) -> None:
        """RuntimeError, on every process, where the masks are not the same everywhere."""
        if self.size == 1:
            return
        digest = int(MaskSet(masks).mask_hash()[:12], 16)  # 48 bits: exact in float64
        low, high = self.extremes(digest, next(iter(masks.values())).device)
        if low != high:
            raise RuntimeError(
                f"{who}: the masks differ between the processes; each must prune the same model with the same "
                "settings, and leave weights and gradients as they were handed to it"
            )


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one kind together, up to the size of a bucket."""
    found: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        last = found[-1][-1] if found else None
        fits = last is not None and last.dtype == tensor.dtype and last.device == tensor.device
        if not fits or size + tensor.numel() > _BUCKET:
            found.append([])
            size = 0
        found[-1].append(tensor)
        size += tensor.numel()
    return found
