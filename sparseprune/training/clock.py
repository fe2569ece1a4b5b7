"""How far a run is: its steps, its seconds, and the share of the whole that is over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sized
from typing import Any

import torch

from ..pruning.processes import Processes
from .config import MOST_EPOCHS, DistillConfig

__all__ = ["Clock", "steps_of"]


def steps_of(config: DistillConfig, loader: Iterable[Any], who: str) -> int:
    """Optimiser steps of a whole run on this loader. ValueError on one that is empty, or has no length to go by."""
    if config.steps is not None:
        return config.steps
    if not isinstance(loader, Sized):
        raise ValueError(f"{who}.fit: the loader has no length; set {type(config).__name__}(steps=...)")
    size = len(loader)
    if size == 0:
        raise ValueError(f"{who}.fit: the training loader is empty")
    least = min(config.min_steps, round(MOST_EPOCHS * size / config.accumulate))
    return max(1, least, round(config.epochs * size / config.accumulate))


class Clock:
    """``step`` of ``total``; ``elapsed`` seconds; ``progress`` from 0 to 1, by the steps or, with ``max_seconds``, by
    the time where that is further. ``heal_from``: the progress at which the masks were frozen, None before.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self.max_seconds = max_seconds
        self.step = self.total = 0
        self.elapsed = self.progress = 0.0
        self.heal_from: float | None = None
        self._began = 0.0

    def start(self, total: int) -> None:
        """Goes on from ``elapsed``; total: steps of the whole run."""
        self.total, self._began = total, time.monotonic() - self.elapsed

    def read(self, processes: Processes, device: torch.device) -> None:
        """Moves ``elapsed`` and ``progress`` to now, the same on all processes."""
        self.elapsed = time.monotonic() - self._began
        share = self.step / self.total
        if self.max_seconds is not None:
            self.elapsed = processes.extremes(self.elapsed, device)[1]
            share = max(share, self.elapsed / self.max_seconds)
        self.progress = min(1.0, share)

    def lr_factor(self, warmup: float) -> float:
        """Linear warm-up, constant while the masks move, then from 1 down to 0.02 while the rest heals."""
        p = self.progress
        if self.heal_from is None:
            return min(1.0, (p + 1e-3) / max(warmup, 1e-3))
        share = (p - self.heal_from) / max(1e-9, 1 - self.heal_from)
        return max(0.02, min(1.0, 20 * share + 0.05) * (1 - share))

    def cut_short(self) -> str | None:
        """What to say where the time was over before the steps were; None where it was not."""
        if self.progress < 1 or self.step >= self.total:
            return None
        return f"stopped by max_seconds after {self.step} of {self.total} steps"

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("step", "elapsed", "progress", "heal_from")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
