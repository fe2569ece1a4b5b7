"""What a run wrote down: one record a step, one an evaluation, one an event."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]


@dataclass
class History:
    """Plain lists of plain dicts, ready for JSON.

    steps: step, epoch, progress, phase ("prune" or "heal"), density, sparsity, loss, ce, kd, hidden, adversarial,
    weight (lambda), discriminator_loss, discriminator_accuracy, lr, gradient_norm. evaluations: step, phase, density,
    loss, accuracy. events: step, event and what belongs to it.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "evaluations": self.evaluations, "events": self.events}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        return cls(list(data["steps"]), list(data["evaluations"]), list(data["events"]))
