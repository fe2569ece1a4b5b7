"""Watches the game: who is winning, when the discriminator may rest, when it is blind, when it has to start again."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["Balance", "Monitor"]


class Monitor:
    """Exponential mean of the discriminator's pair accuracy, with the decisions taken on it.

    ``rest``: above ``strong`` the discriminator skips its update, so that the student can catch up. ``blind``: below
    0.55 it has nothing to say. ``stuck``: it has rested for ``patience`` steps on end, so its verdict carries no
    gradient.
    """

    def __init__(self, decay: float = 0.95, strong: float = 0.95, blind: float = 0.55, patience: int = 200):
        self.decay, self.strong, self.blind_below, self.patience = decay, strong, blind, patience
        self.mean, self.count, self.rested, self.warned = 0.0, 0, 0, False

    @property
    def accuracy(self) -> float:
        """The mean so far, bias-corrected; 0.5 before the first observation."""
        return self.mean / (1 - self.decay**self.count) if self.count else 0.5

    def observe(self, accuracy: float) -> None:
        self.count += 1
        self.mean = self.decay * self.mean + (1 - self.decay) * accuracy
        self.rested = self.rested + 1 if self.rest else 0

    @property
    def rest(self) -> bool:
        return self.count >= 10 and self.accuracy > self.strong

    @property
    def blind(self) -> bool:
        return self.count >= 50 and self.accuracy < self.blind_below

    @property
    def stuck(self) -> bool:
        return self.rested >= self.patience

    def reset(self) -> None:
        self.mean, self.count, self.rested = 0.0, 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count, "rested": self.rested, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count = float(state["mean"]), int(state["count"])
        self.rested, self.warned = int(state["rested"]), bool(state["warned"])


class Balance:
    """The adversarial weight: kappa * ||grad_h(L_KD + L_hid)|| / ||grad_h L_adv||, a bias-corrected mean, clamped.

    Gradients are those with respect to the features h, so that whatever the scale of the discriminator the adversarial
    term pulls on the features with the share ``kappa`` of the distillation's pull.
    """

    def __init__(self, kappa: float, decay: float = 0.9, limit: float = 1e4):
        self.kappa, self.decay, self.limit = kappa, decay, limit
        self.mean, self.count = 0.0, 0

    def observe(self, distillation: float, adversarial: float) -> None:
        ratio = self.kappa * distillation / (adversarial + 1e-12)
        if math.isfinite(ratio):
            self.count += 1
            self.mean = self.decay * self.mean + (1 - self.decay) * min(ratio, self.limit)

    @property
    def weight(self) -> float:
        return self.mean / (1 - self.decay**self.count) if self.count else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.count = float(state["mean"]), int(state["count"])
