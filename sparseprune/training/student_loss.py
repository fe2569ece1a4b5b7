"""What one batch costs the student: its task, its distance from the teacher, and what an adversary adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.batches import LabelledBatch, real_rows_of
from ..pruning.processes import Processes
from .causal import with_next_tokens
from .clock import Clock
from .config import DistillConfig
from .features import FeatureReader, normalise
from .input_noise import noisy
from .losses import distillation, is_classification, real_rows, task_loss

__all__ = ["ExtraTerm", "Loss", "StudentLoss", "autocasting"]


class ExtraTerm(Protocol):
    """A further term of the loss, on the features of student and teacher, with a state of its own."""

    def meet(self, processes: Processes) -> None:
        """Before the first batch: the processes that train together."""

    def __call__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], entry: Tensor | None, mask: Tensor | None,
        distance: Tensor, clock: Clock,
    ) -> tuple[Tensor, dict[str, float], str | None]:  # fmt: skip
        """(the term, figures for the history, an event or None). entry: what the features hang on; distance: the
        distillation, whose gradient the term may be weighed against.
        """
        ...

    def state_dict(self) -> dict[str, Any] | None:
        """What all processes share; None before the first batch."""

    def load_state_dict(self, state: dict[str, Any] | None) -> None: ...

    def own_state(self) -> Any:
        """What is this process's own."""

    def load_own_state(self, state: Any) -> None: ...


class Loss(NamedTuple):
    """``total`` to go back from, its ``parts`` as numbers, and an ``event`` for the history."""

    total: Tensor
    parts: dict[str, float]
    event: str | None


def autocasting(kind: str, device: torch.device) -> AbstractContextManager[Any]:
    """Where forward passes compute in ``kind``, "none" or "bfloat16", as :class:`DistillConfig` has it."""
    return nullcontext() if kind == "none" else torch.autocast(device.type, dtype=torch.bfloat16)


class StudentLoss:
    """Computes :class:`Loss` of batches. ``task``: from logits and targets to a scalar."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, config: DistillConfig, reader: FeatureReader,
        task: Callable[[Tensor, Tensor], Tensor], extra: ExtraTerm | None, device: torch.device,
        generator: torch.Generator,
    ):  # fmt: skip
        self.student, self.teacher, self.config, self.reader = student, teacher, config, reader
        self.task, self.extra, self.device, self.generator = task, extra, device, generator

    def __call__(self, batch: LabelledBatch, clock: Clock) -> Loss:
        config, batch = self.config, with_next_tokens(self.student, batch)
        distil = config.kd > 0 or config.hidden > 0 or self.extra is not None
        seed = int(torch.randint(1 << 62, (), generator=self.generator)) if config.input_noise else 0
        with autocasting(config.autocast, self.device):
            if distil:
                with torch.no_grad(), noisy(self.teacher, config.input_noise, seed) as own:
                    teacher_logits, teacher_features, entry = self.reader(self.teacher, own(batch))
            with noisy(self.student, config.input_noise, seed) as own:
                logits, features, _ = self.reader(self.student, own(batch))
        classes = is_classification(logits, batch.targets)
        ce = task_loss(self.task, logits, batch.targets)
        parts = {"ce": float(ce.detach())}
        total = config.ce * ce
        event = None
        if distil:
            mask = batch.mask
            mine, theirs = (real_rows(given, batch.targets, batch.output_mask) for given in (logits, teacher_logits))
            if self.reader.reads_logits:  # the very rows that are distilled, so that the pull on them is known
                features, teacher_features = [mine], [theirs]
            kd = distillation(mine, theirs, config.temperature, classes)
            hidden = _hidden(features, teacher_features, mask) if config.hidden else kd.new_zeros(())
            distance = config.kd * kd + config.hidden * hidden
            total = total + distance
            parts |= {"kd": float(kd.detach()), "hidden": float(hidden.detach())}
            if self.extra is not None:
                term, said, event = self.extra(features, teacher_features, entry, mask, distance, clock)
                total = total + term
                parts |= said
        parts["loss"] = float(total.detach())
        return Loss(total, parts, event)


def _hidden(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """Mean square error of the normalised hidden states, over places, rows and features."""
    for s, t in zip(student, teacher):
        if s.shape[-1] != t.shape[-1]:
            raise ValueError(
                f"hidden states expected the teacher's width, {t.shape[-1]}, got {s.shape[-1]}; set hidden=0, so that "
                "only outputs and distributions are compared"
            )
    return torch.stack([
        F.mse_loss(normalise(real_rows_of(s, mask)), normalise(real_rows_of(t, mask))) for s, t in zip(student, teacher)
    ]).mean()  # fmt: skip
