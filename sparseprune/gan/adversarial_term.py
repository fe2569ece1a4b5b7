"""The trainer's adversarial term: it plays a game a batch and gives what the student's loss gains by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..pruning.processes import Processes
from ..training.clock import Clock
from .config import GANConfig
from .game import Game, new_game

__all__ = ["AdversarialTerm"]

_BALANCE_EVERY = 8


class AdversarialTerm:
    """An :class:`~sparseprune.training.student_loss.ExtraTerm`. ``note`` takes an event for the history."""

    def __init__(self, config: GANConfig, device: torch.device, note: Callable[[str], None]):
        self.config, self.device, self.note = config, device, note
        self.game: Game | None = None
        self._told_idle = False
        self._processes = Processes(active=False)

    def meet(self, processes: Processes) -> None:
        self._processes = processes

    def __call__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], entry: Tensor | None, mask: Tensor | None,
        distance: Tensor, clock: Clock,
    ) -> tuple[Tensor, dict[str, float], str | None]:  # fmt: skip
        config = self.config
        if self.game is None:
            self.game = new_game(
                config.discriminator, config.kappa, config.seed, teacher, student, entry, mask, self.device, self.note,
                self._processes,
            )  # fmt: skip
        game = self.game
        rows = game.rows(teacher, student, entry, mask)
        verdict = game.train_critic(rows, clock.progress)
        adversarial = game.student_loss(rows)
        if clock.step % _BALANCE_EVERY == 0 or not game.balance.count:
            game.balance_gradients(distance, adversarial, student)
        weight = game.balance.weight if clock.progress >= config.warmup else 0.0
        event = verdict["event"]
        if game.monitor.blind and not game.monitor.warned and clock.progress > config.warmup:
            game.monitor.warned = True
            event = event or f"discriminator blind: accuracy {game.monitor.accuracy:.2f}"
        if not weight and clock.progress > config.warmup and not self._told_idle:
            self._told_idle = True
            event = event or "the adversarial term has no weight: distillation does not pull on what it judges"
        return weight * adversarial, {
            "adversarial": float(adversarial.detach()), "weight": weight,
            "discriminator_loss": verdict["loss"], "discriminator_accuracy": verdict["accuracy"],
        }, event  # fmt: skip

    def state_dict(self) -> dict[str, Any] | None:
        game = self.game
        if game is None:
            return None
        return {
            "sizes": game.feature_sizes, "student_sizes": game.student_sizes, "condition": game.condition_size,
            "game": game.state_dict(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        if self.game is None:
            self.game = Game(
                self.config.discriminator, self.config.kappa, state["sizes"], state["condition"], self.config.seed,
                self.device, self._processes, state["student_sizes"],
            )  # fmt: skip
        self.game.load_state_dict(state["game"])

    def own_state(self) -> Tensor | None:
        return None if self.game is None else self.game.generator.get_state()

    def load_own_state(self, state: Tensor | None) -> None:
        if self.game is not None and state is not None:
            self.game.generator.set_state(state.cpu())
