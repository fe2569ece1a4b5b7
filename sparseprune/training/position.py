"""Where a run stands in its data: a resumed one reads on from there, with the random numbers it would have had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.batches import split_batch

__all__ = ["DataPosition", "first_inputs", "rewind"]


class DataPosition:
    """``epoch`` and ``batch`` (of it, those handed out), and the random state in which that epoch began."""

    def __init__(self) -> None:
        self.epoch = self.batch = 0
        self._epoch_rng: Tensor | None = None
        self._loader_rng: list[Tensor] = []

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches for ever, from this position on."""
        skip, after_skip = self.batch, torch.get_rng_state()
        generators = _generators(loader)
        while True:
            for part in (loader, getattr(loader, "sampler", None)):
                if part is not None and hasattr(part, "set_epoch"):
                    part.set_epoch(self.epoch)
            if skip:
                assert self._epoch_rng is not None
                torch.set_rng_state(self._epoch_rng)
                # A sampler that makes its generator only when it is read seeds it by the epoch.
                for generator, state in zip(generators, self._loader_rng):
                    generator.set_state(state)
            else:
                self._epoch_rng = torch.get_rng_state()
                self._loader_rng = [generator.get_state() for generator in generators]
            seen = 0
            for batch in loader:
                seen += 1
                if seen <= skip:
                    if seen == skip:
                        torch.set_rng_state(after_skip)
                    continue
                self.batch = seen
                yield batch
            if seen == 0:
                raise ValueError("fit: the training loader is empty; an iterator can be read only once")
            skip = 0
            self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The random state is this process's own; epoch and batch are those of all."""
        return {
            "epoch": self.epoch, "batch": self.batch, "epoch_rng": self._epoch_rng, "loader_rng": self._loader_rng,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch = state["epoch"], state["batch"]
        self._epoch_rng, self._loader_rng = state["epoch_rng"], [own.cpu() for own in state["loader_rng"]]


def rewind(loader: Any) -> None:
    """The next epoch of a loader that counts them is its first."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)


def first_inputs(loader: Iterable[Any] | None, count: int, device: torch.device, model: nn.Module) -> list[Any]:
    """Inputs of the loader's first batches; its order, and everything random, stays as it was."""
    if loader is None:
        return []
    rng = torch.get_rng_state()
    rewind(loader)
    found = [split_batch(batch, device, model).inputs for batch in islice(iter(loader), count)]
    torch.set_rng_state(rng)
    return found


def _generators(loader: Any) -> list[torch.Generator]:
    """Those that the order of a DataLoader hangs on: its own, its samplers', and those that accelerate made."""
    found: dict[int, torch.Generator] = {}
    parts, met = [loader], set()
    while parts:
        part = parts.pop()
        if part is None or id(part) in met:
            continue
        met.add(id(part))
        for name in ("generator", "synchronized_generator"):
            own = getattr(part, name, None)
            if isinstance(own, torch.Generator):
                found.setdefault(id(own), own)
        parts += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
    return list(found.values())
