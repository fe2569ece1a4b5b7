"""What a run falls back on: the last good state where a loss is not finite, the best one where healing got worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Best", "Guard", "not_finite"]

_SNAPSHOT_EVERY = 50
_BAD_STEPS = 3
_RESTORES = 3


class Guard:
    """Counts steps that are not finite; after three in a row the run goes back to ``snapshot`` with half the learning
    rate (``lr_scale``), three times at the most.
    """

    def __init__(self) -> None:
        self.bad = self.restores = 0
        self.lr_scale = 1.0
        self.snapshot: dict[str, Any] | None = None

    def wants_snapshot(self, step: int) -> bool:
        return step % _SNAPSHOT_EVERY == 0 and self.bad == 0

    def bad_step(self) -> bool:
        """Counts one; True: go back to the snapshot."""
        self.bad += 1
        return self.bad >= _BAD_STEPS

    def restore(self, where: str, seen: str, lr: float) -> dict[str, Any]:
        """The snapshot to go back to. RuntimeError, with what was ``seen``, when there is none or enough was tried."""
        self.restores += 1
        if self.restores > _RESTORES or self.snapshot is None:
            raise RuntimeError(
                f"{where} after {self.restores - 1} restores ({seen}); lower lr ({lr * self.lr_scale:g}) or clip"
            )
        self.bad = 0
        return self.snapshot

    def check_stepped(self, stepped: bool, steps: int, who: str) -> None:
        """At the end of a run: RuntimeError where no step was finite, of fewer than it takes to give up."""
        if not stepped:
            raise RuntimeError(
                f"{who}.fit: expected a step whose losses are finite, got none in {steps}; check the data, lower lr or "
                "clip"
            )

    def state_dict(self) -> dict[str, Any]:
        """Without the snapshot, which a checkpoint holds as the state itself."""
        return {name: getattr(self, name) for name in ("bad", "restores", "lr_scale")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


def not_finite(losses: Mapping[str, float]) -> dict[str, float]:
    """Those of the losses that are no finite number."""
    return {key: value for key, value in losses.items() if not math.isfinite(value)}


class Best:
    """The best healed state so far, by accuracy and then by loss; ``waited``: evaluations since."""

    def __init__(self) -> None:
        self.key: list[float] | None = None
        self.step = self.waited = 0
        self.state: dict[str, Tensor] = {}

    def offer(self, found: Mapping[str, float], step: int, model: nn.Module) -> None:
        """found: figures of the validation split; a loss that is NaN is worse than any other."""
        usable = not math.isnan(found["loss"])
        key = [found.get("accuracy", 0.0), -found["loss"]] if usable else [-math.inf, -math.inf]
        if self.key is None or key > self.key:
            self.key, self.step, self.waited = key, step, 0
            self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("key", "step", "waited", "state")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
