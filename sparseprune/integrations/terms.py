"""What a teacher adds to the loss of a training loop that is not ours: distillation, hidden states, the adversary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._config import Config
from .._digest import digest
from ..gan import DiscriminatorConfig
from ..gan.game import Game
from ..nn.filters import FilterFn, prunable_linears
from ..nn.matrices import shared_linears
from ..pruning.batches import real_rows_of
from ..pruning.processes import Processes
from ..pruning.reading import train_with_dropout
from ..training.checks import teacher_of
from ..training.features import Taps, choose_taps, normalise
from ..training.losses import distillation, is_classification, real_rows

__all__ = ["Distillation", "TeacherTerms"]

_WEIGH_EVERY = 8


@dataclass(frozen=True)
class Distillation(Config):
    """The loss is ``ce`` times the task's, plus ``kd`` tau^2 KL(teacher || student) of the logits at ``temperature``
    tau (the mean square where there are no classes), plus ``hidden`` times the mean square between normalised hidden
    states, plus, with ``kappa`` > 0, what an adversary says about them, its gradient that share of the others'.

    features: "auto", "logits", or names of modules whose outputs are compared. dropout: whether the student runs with
    its dropout; off by default, for on one side only it would give the discriminator its answer.
    """

    ce: float = 0.1
    kd: float = 0.9
    hidden: float = 0.9
    temperature: float = 2.0
    kappa: float = 0.0
    features: str | list[str] = "auto"
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    dropout: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ce", "kd", "hidden", "kappa"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"Distillation: {name} expected a number >= 0, got {getattr(self, name)!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"Distillation: temperature expected a number > 0, got {self.temperature!r}")
        if not self.kd and not self.hidden:
            raise ValueError("Distillation: kd and hidden are both 0: nothing is left to learn from the teacher")


class TeacherTerms:
    """teacher: by default a copy of the model as it is now. One student, one teacher, one run."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module | None, config: Distillation, filter_fn: FilterFn | None = None
    ) -> None:
        if teacher is model:
            raise ValueError("Distillation: the teacher is the model itself; pass a copy, or None to have one made")
        self.model, self.config = model, config
        self.teacher = teacher_of("Distillation", model, teacher)
        held = dict(model.named_modules())
        pruned = prunable_linears(shared_linears(model), filter_fn)
        self.entry, self.taps = choose_taps(model, [name for name in pruned if name in held], config.features)
        self._student = Taps(model, self.taps, self.entry)
        self._processes = Processes(active=False)
        self.game: Game | None = None
        self._pending: dict[str, Any] | None = None
        self._steps = 0

    def start(self, device: torch.device, distributed: bool) -> None:
        """Before the loop: the teacher goes where the student is; the processes play one game."""
        self.teacher.to(device)
        self._processes = Processes(active=distributed)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around the student's forward pass."""
        with self._student.recording():
            yield

    def __call__(
        self, inputs: Mapping[str, Any], logits: Tensor, labels: Tensor | None, progress: float
    ) -> tuple[Tensor, dict[str, float]]:
        """inputs: what the student was called with, labels apart; logits `[..., C]`: its answer. Returns (what to add
        to ``ce`` times the task's loss, its parts as numbers). progress in [0, 1].
        """
        config = self.config
        mask = inputs.get("attention_mask")
        mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        watch = Taps(self.teacher, self.taps, self.entry)
        train_with_dropout(self.teacher, config.dropout)
        with torch.no_grad(), watch.recording():
            expected = self.teacher(**inputs).logits
        targets = logits.new_zeros(logits.shape[:-1], dtype=torch.int64) if labels is None else labels
        mine, theirs = real_rows(logits, targets, mask), real_rows(expected, targets, mask)
        kd = distillation(mine, theirs, config.temperature, is_classification(logits, targets))
        features, teacher = self._student.collect() or [mine], watch.collect() or [theirs]
        hidden = torch.stack([
            F.mse_loss(normalise(real_rows_of(s, mask)), normalise(real_rows_of(t, mask)))
            for s, t in zip(features, teacher)
        ]).mean()  # fmt: skip
        pull = config.kd * kd + config.hidden * hidden
        parts = {"kd": float(kd.detach()), "hidden": float(hidden.detach())}
        if config.kappa:
            extra, said = self._adversarial(features, teacher, watch.entry, mask, pull, progress)
            return pull + extra, parts | said
        return pull, parts

    def _adversarial(
        self, features: list[Tensor], teacher: list[Tensor], entry: Tensor | None, mask: Tensor | None, pull: Tensor,
        progress: float,
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        config = self.config
        if self.game is None:
            usable = entry is not None and config.discriminator.conditional and entry.dim() > 1
            if usable and entry is not None:
                usable = {len(real_rows_of(entry, mask))} == {len(real_rows_of(t, mask)) for t in teacher}
            condition = entry.shape[-1] if usable and entry is not None else 0
            self.game = self._new_game([t.shape[-1] for t in teacher], condition, pull.device)
        rows = self.game.rows(teacher, features, entry, mask)
        played = self.game.train_critic(rows, progress)
        adversarial = self.game.student_loss(rows)
        if self._steps % _WEIGH_EVERY == 0 or not self.game.balance.count:
            self.game.balance_gradients(pull, adversarial, features)
        self._steps += 1
        said = {"adversarial": float(adversarial.detach()), "discriminator_accuracy": played["accuracy"]}
        return self.game.balance.weight * adversarial, said

    def _new_game(self, sizes: list[int], condition: int, device: torch.device) -> Game:
        config = self.config
        game = Game(config.discriminator, config.kappa, sizes, condition, config.seed, device, self._processes)
        if self._pending is not None:
            game.load_state_dict(self._pending["game"])
            game.generator.set_state(self._pending["generators"][self._processes.index].cpu())
            self._pending = None
        return game

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the student. Every process calls it."""
        game = self.game
        held: dict[str, Any] = {"teacher": self.digest(), "steps": self._steps, "game": None}
        if game is not None:
            generators = self._processes.gather(game.generator.get_state())
            held |= {"game": game.state_dict(), "generators": generators,
                     "sizes": game.feature_sizes, "condition": game.condition_size}  # fmt: skip
        return held

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """After :meth:`start`. ValueError with another teacher, or another number of processes."""
        if state["teacher"] != self.digest():
            raise ValueError("Distillation: the checkpoint was written with another teacher; pass the same one again")
        self._steps = int(state["steps"])
        if state["game"] is None:
            return
        if len(state["generators"]) != self._processes.size:
            raise ValueError(
                f"Distillation: the checkpoint was written by {len(state['generators'])} processes, expected "
                f"{self._processes.size}; start as many"
            )
        self._pending = {"game": state["game"], "generators": state["generators"]}
        self.game = self._new_game(list(state["sizes"]), int(state["condition"]), device)

    def digest(self) -> str:
        """SHA-256 of the teacher's state."""
        return digest(self.teacher.state_dict())
