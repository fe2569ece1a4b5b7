"""The adversarial side of a step: rows of features, the discriminator's update, the student's term and its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pruning.batches import real_rows_of
from ..pruning.processes import Processes
from ..training.features import normalise
from .config import DiscriminatorConfig
from .discriminator import Discriminator
from .losses import adversarial_loss, discriminator_loss, gradient_penalty, loss_of, pair_accuracy
from .monitor import Balance, Monitor
from .seeds import seeded

__all__ = ["Game", "Rows", "new_game", "orthonormal"]


@dataclass
class Rows:
    """Rows of all taps below each other: real, fake `[M, p]`, condition `[M, c]` or None, tap int64 `[M]`."""

    real: Tensor
    fake: Tensor
    condition: Tensor | None
    tap: Tensor


class Game:
    """Discriminator, its optimiser, the monitor and the gradient balance. Built on the first batch, when sizes are
    known.

    Everything random here is drawn from one generator of its own, so the game neither reads nor moves the global state.
    Several processes (``processes``) play one game: each draws rows of its own, and gradients, accuracy and balance are
    those of all. student_sizes: the student's feature sizes where they are not the teacher's; both sides of such a tap
    are projected to the smaller, each by a fixed matrix of its own, so that they can be compared as distributions only.
    """

    def __init__(self, config: DiscriminatorConfig, kappa: float, sizes: Sequence[int], condition: int, seed: int,
                 device: torch.device, processes: Processes | None = None,
                 student_sizes: Sequence[int] | None = None):  # fmt: skip
        self.config, self.device, self.seed, self.resets = config, device, seed, 0
        self.processes = Processes(active=False) if processes is None else processes
        self.feature_sizes, self.condition_size = list(sizes), condition
        self.student_sizes = list(sizes if student_sizes is None else student_sizes)
        widths = [min(t, s, config.projection) for t, s in zip(self.feature_sizes, self.student_sizes)]
        self.generator = torch.Generator().manual_seed(seed * 7919 + 17 + 1_000_003 * self.processes.index)
        fixed = torch.Generator().manual_seed(seed * 7919 + 29)
        self.projections = [_on(orthonormal(size, width, fixed), device) for size, width in zip(sizes, widths)]
        self.condition_projection = _on(orthonormal(condition, config.projection, fixed), device) if condition else None
        self.student_projections = [
            shared if s == t else _on(orthonormal(s, width, fixed), device)
            for shared, t, s, width in zip(self.projections, self.feature_sizes, self.student_sizes, widths)
        ]
        self.width = max(widths)
        self.sizes = (self.width, min(condition, config.projection), len(sizes))
        self.monitor = Monitor(strong=config.strong, patience=config.patience)
        self.balance = Balance(kappa)
        self.updates = 0
        self._new_critic()

    def _new_critic(self) -> None:
        with seeded(self.seed * 7919 + 31 + self.resets):
            self.critic = Discriminator(self.config, *self.sizes).to(self.device)
        self.optimiser = torch.optim.Adam(self.critic.parameters(), lr=self.config.lr, betas=self.config.betas)

    def rows(
        self, teacher: Sequence[Tensor], student: Sequence[Tensor], entry: Tensor | None, mask: Tensor | None
    ) -> Rows:
        """The same ``config.rows`` rows of both sides of each tap, normalised and projected."""
        real, fake, conditions, taps = [], [], [], []
        condition = None
        if entry is not None and self.sizes[1]:
            condition = _project(normalise(real_rows_of(entry.detach(), mask)), self.condition_projection)
        for i, (t, s) in enumerate(zip(teacher, student)):
            t, s = real_rows_of(t.detach(), mask), real_rows_of(s, mask)
            if len(t) > self.config.rows:
                chosen = torch.randperm(len(t), generator=self.generator)[: self.config.rows].to(t.device)
                t, s = t[chosen], s[chosen]
                conditions.append(condition[chosen] if condition is not None else None)
            else:
                conditions.append(condition)
            real.append(self._lift(t, i, self.projections[i]))
            fake.append(self._lift(s, i, self.student_projections[i]))
            taps.append(torch.full((len(t),), i, device=t.device))
        joined = None if condition is None else torch.cat([c for c in conditions if c is not None])
        return Rows(torch.cat(real), torch.cat(fake), joined, torch.cat(taps))

    def _lift(self, rows: Tensor, tap: int, projection: Tensor | None) -> Tensor:
        """`[M, d]` of this tap -> `[M, width]`: normalised, projected where wider, padded with zeros where narrower."""
        rows = _project(normalise(rows), projection)
        if self.feature_sizes[tap] != self.student_sizes[tap]:
            rows = normalise(rows)  # a projection of one side alone would give it away by its rows' lengths
        return F.pad(rows, (0, self.width - rows.shape[-1]))

    def train_critic(self, rows: Rows, progress: float) -> dict[str, Any]:
        """One look of the discriminator at the rows and, unless it rests, one update; returns its loss and accuracy."""
        config = self.config
        sigma = config.noise * (1 - progress)
        real, fake = self._noisy(rows.real, sigma), self._noisy(rows.fake.detach(), sigma)
        resting = self.monitor.rest or config.mode == "frozen"
        self.critic.train(not resting)
        with torch.set_grad_enabled(not resting):
            # One pass over both sides: each training pass moves the spectral norm's estimate, so that two passes would
            # judge equal rows by two slightly different networks.
            condition = None if rows.condition is None else rows.condition.repeat(2, 1)
            on_real, on_fake = self.critic(torch.cat([real, fake]), condition, rows.tap.repeat(2)).chunk(2)
            accuracy = pair_accuracy(on_real.detach(), on_fake.detach())
            if config.mode == "shuffled":
                swap = (torch.rand(len(on_real), generator=self.generator) < 0.5).to(on_real.device)
                on_real, on_fake = torch.where(swap, on_fake, on_real), torch.where(swap, on_real, on_fake)
            loss = discriminator_loss(config.loss, on_real, on_fake)
        seen = self.processes.numbers({"accuracy": accuracy, "loss": float(loss.detach())}, self.device)
        self.monitor.observe(seen["accuracy"])
        event = None
        finite = math.isfinite(seen["loss"])
        if not finite or (self.monitor.stuck and config.mode == "trained"):
            event = "discriminator restarted: " + ("too strong for too long" if finite else "its loss is not finite")
            self.resets += 1
            self._new_critic()
            self.monitor.reset()
        elif not resting:
            self.updates += 1
            if loss_of(config.loss).penalty and self.updates % 4 == 0:
                penalty = gradient_penalty(self.critic, real, fake, rows.condition, rows.tap, self.generator)
                loss = loss + 4 * config.penalty * penalty
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.processes.mean_gradients_(list(self.critic.parameters()))
            self.optimiser.step()
        return {"loss": seen["loss"], "accuracy": self.monitor.accuracy, "event": event}

    def student_loss(self, rows: Rows) -> Tensor:
        """L_adv of the student's rows through the discriminator held still."""
        self.critic.eval()
        self.critic.requires_grad_(False)
        try:
            fake = self.critic(rows.fake, rows.condition, rows.tap)
            real = self.critic(rows.real, rows.condition, rows.tap) if loss_of(self.config.loss).pairs else None
            return adversarial_loss(self.config.loss, fake, real)
        finally:
            self.critic.requires_grad_(True)

    def balance_gradients(self, distillation: Tensor, adversarial: Tensor, features: Sequence[Tensor]) -> None:
        """Measures both gradients at the student's features and moves the adversarial weight."""
        pulls = {}
        for name, value in (("distillation", distillation), ("adversarial", adversarial)):
            if not value.requires_grad:
                return
            grads = torch.autograd.grad(value, list(features), retain_graph=True, allow_unused=True)
            pulls[name] = sum(float(g.float().square().sum()) for g in grads if g is not None)
        pulls = self.processes.numbers(pulls, self.device)  # squares: norms over the rows of all processes
        self.balance.observe(math.sqrt(pulls["distillation"]), math.sqrt(pulls["adversarial"]))

    def _noisy(self, rows: Tensor, sigma: float) -> Tensor:
        if sigma <= 0:
            return rows
        return rows + sigma * torch.randn(rows.shape, generator=self.generator).to(rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "critic": self.critic.state_dict(), "optimiser": self.optimiser.state_dict(), "resets": self.resets,
            "updates": self.updates, "monitor": self.monitor.state_dict(), "balance": self.balance.state_dict(),
            "generator": self.generator.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.critic.load_state_dict(state["critic"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.resets, self.updates = int(state["resets"]), int(state["updates"])
        self.monitor.load_state_dict(state["monitor"])
        self.balance.load_state_dict(state["balance"])
        self.generator.set_state(state["generator"].cpu())


def new_game(
    config: DiscriminatorConfig, kappa: float, seed: int, features: Sequence[Tensor], student: Sequence[Tensor],
    entry: Tensor | None, mask: Tensor | None, device: torch.device, note: Callable[[str], None] | None = None,
    processes: Processes | None = None,
) -> Game:  # fmt: skip
    """A game for features such as these, the teacher's and the student's, conditioned on ``entry`` where it has their
    rows; else ``note`` is told.
    """
    rows = [len(real_rows_of(f, mask)) for f in features]
    condition = 0
    if entry is not None and config.conditional and entry.dim() > 1:
        if {len(real_rows_of(entry, mask))} == set(rows):
            condition = entry.shape[-1]
        elif note is not None:
            note("unconditional: the embedding has other rows")
    sizes, student_sizes = ([f.shape[-1] for f in side] for side in (features, student))
    return Game(config, kappa, sizes, condition, seed, device, processes, student_sizes)


def _project(rows: Tensor, projection: Tensor | None) -> Tensor:
    return rows if projection is None else rows @ projection


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def orthonormal(d: int, limit: int, generator: torch.Generator) -> Tensor | None:
    """A fixed projection `[d, limit]` with orthonormal columns; None where d <= limit and none is needed."""
    if d <= limit:
        return None
    q, r = torch.linalg.qr(torch.randn(d, limit, generator=generator, dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r))).float()
