"""Pruning inside transformers' Trainer: a callback that prunes, and a thin Trainer that learns from a teacher too.

::

    pruning = PruneCallback(PruneConfig(schedule=CubicSchedule(0.1), begin=50, end=800))
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[pruning])
    trainer.train()                          # gradient accumulation, bf16, torchrun, checkpoints as ever
    sparsify_(trainer.model)
"""

from __future__ import annotations

import os
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .._files import read_checkpoint, save_checkpoint
from ..nn.filters import FilterFn
from ..pruning import PruneConfig, Pruner
from .terms import Distillation, TeacherTerms

__all__ = ["STATE", "PruneCallback", "PruneTrainer"]

#: The file in each checkpoint's folder that a resume goes on from.
STATE = "sparseprune.ckpt"
_VERSION = 1


def _remedy(folder: Path) -> str:
    """For a checkpoint in which the state is lacking, or damaged: Trainer writes its own part first."""
    if not folder.is_dir():
        return "set resume_from to the folder of the checkpoint"
    others = [place.parent for place in folder.parent.glob(f"checkpoint-*/{STATE}") if place.parent != folder]
    steps = {int(step): place for place in others if (step := place.name.rpartition("-")[2]).isdecimal()}
    last = f"resume from {steps[max(steps)]}" if steps else "start anew"
    return f"this checkpoint is incomplete, as of a run that was killed while it wrote; {last}, or set resume_from"


class PruneCallback(TrainerCallback):
    """Prunes the model of any Trainer while it trains, as :class:`sparseprune.Pruner` does with ``config``, whose
    ``begin`` and ``end`` count optimiser steps. ``filter_fn``, ``data`` as for the Pruner; text in the
    data goes through ``tokenizer``, or Trainer's ``processing_class``.

    Logs ``density``. With each checkpoint it saves ``sparseprune.ckpt``, and a resumed run goes on to the same masks:
    with ``train(resume_from_checkpoint=True)`` or that of a folder in ``output_dir`` by itself; from elsewhere set
    ``resume_from`` to the folder (a :class:`PruneTrainer` does). From the step on which the masks are final the best
    metric is counted anew, so that ``load_best_model_at_end`` never brings back a denser model.

    Every process of a data-parallel run (``torchrun``, ``accelerate launch``) ends with the same masks. Gradients of
    pruned weights are cleared after Trainer has clipped them, so that they count in its norm. Raises ValueError as
    training begins where ``end`` lies beyond the run, where a resume finds no state, and under FSDP or DeepSpeed.
    """

    def __init__(
        self, config: PruneConfig | None = None, filter_fn: FilterFn | None = None, data: Any = None,
        resume_from: str | os.PathLike[str] | None = None, tokenizer: Any = None,
    ) -> None:  # fmt: skip
        self.config = config or PruneConfig()
        self.filter_fn, self.data, self.resume_from, self.tokenizer = filter_fn, data, resume_from, tokenizer
        self.terms: TeacherTerms | None = None
        self.pruner: Pruner | None = None

    @property
    def density(self) -> float:
        """The density in use; 1 before training."""
        return 1.0 if self.pruner is None else self.pruner.density

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ValueError("PruneCallback: expected data parallelism, got FSDP or DeepSpeed, which cut weights apart")
        if self.config.end > state.max_steps:
            raise ValueError(
                f"PruneCallback: end expected up to {state.max_steps}, the steps of this run, got {self.config.end}; "
                "leave steps after it in which the rest can heal"
            )
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        self.pruner = Pruner(model, self.config, self.filter_fn, self.data, tokenizer=tokenizer)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.terms is not None:
            self.terms.start(args.device, distributed)
        if state.global_step:
            self._resume(args, state)
        self.pruner.prepare(optimizer)

    def _resume(self, args: Any, state: Any) -> None:
        assert self.pruner is not None
        given = self.resume_from or getattr(args, "resume_from_checkpoint", None)
        usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        path = (usual if given is None or isinstance(given, bool) else Path(given)) / STATE
        if not path.is_file():
            raise ValueError(
                f"PruneCallback: the run resumes at step {state.global_step}, expected {path}, found no such file; "
                f"{_remedy(path.parent)}"
            )
        what = f"state of the run at step {state.global_step}"
        saved = read_checkpoint(path, what, _remedy(path.parent), device=args.device.type)
        if saved.get("version") != _VERSION or saved["pruner"]["steps"] != state.global_step:
            raise ValueError(
                f"{path}: expected version {_VERSION} and step {state.global_step}, got {saved.get('version')!r} and "
                f"step {saved.get('pruner', {}).get('steps')!r}; resume from the folder that it belongs to"
            )
        if saved["config"] != self._told():
            raise ValueError(
                f"{path}: written under another configuration; restore it, or start anew: {saved['config']}"
            )
        self.pruner.load_state_dict(saved["pruner"])
        if (self.terms is None) != (saved["terms"] is None):
            raise ValueError(f"{path}: written {'without' if saved['terms'] is None else 'with'} a teacher")
        if self.terms is not None:
            self.terms.load_state_dict(saved["terms"], args.device)

    def _told(self) -> str:
        """The configuration as text, the same in every process: a criterion made by the caller by its name."""
        assert self.pruner is not None
        return repr(replace(self.config, criterion=self.pruner.criterion.name))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        was_final = self.pruner.frozen
        self.pruner.step()
        if self.pruner.frozen and not was_final:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        for record in (logs, state.log_history[-1] if state.log_history else None):
            if record is not None and self.pruner is not None:
                record.setdefault("density", self.density)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        terms = None if self.terms is None else self.terms.state_dict()
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():
            raise ValueError(f"PruneCallback: expected the checkpoint in {folder}, found no such folder")
        saved = {"version": _VERSION, "config": self._told(), "pruner": self.pruner.state_dict(), "terms": terms}
        save_checkpoint(folder / STATE, saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        if not self.pruner.frozen:
            warnings.warn(
                f"PruneCallback: training ended at step {state.global_step}, expected at least end={self.config.end}; "
                f"the model goes from density {self.density:.4f} to {self.config.density:.4f} at once, unhealed",
                UserWarning,
                stacklevel=2,
            )
        self.pruner.finalize()


class PruneTrainer(Trainer):
    """Trainer with a :class:`PruneCallback` (``pruning``: its configuration) and, with ``distillation``, the terms of a
    ``teacher`` (default: a copy of the model as passed) in its loss; everything else is Trainer's.

    The model answers with ``logits``. Logs the means of what the teacher's terms were since the last log.
    """

    def __init__(
        self, *args: Any, pruning: PruneConfig | None = None, teacher: nn.Module | None = None,
        distillation: Distillation | None = None, filter_fn: FilterFn | None = None, pruning_data: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self.pruning = PruneCallback(pruning, filter_fn, pruning_data)
        self.terms: TeacherTerms | None = None
        if teacher is not None or distillation is not None:
            assert isinstance(self.model, nn.Module)
            if self.model_init is not None:
                raise ValueError(
                    "PruneTrainer: expected model=... beside a teacher, got model_init, which builds another model "
                    "than the one that is compared with it; pass model=model_init()"
                )
            self.terms = TeacherTerms(self.model, teacher, distillation or Distillation(), filter_fn)
        self.pruning.terms = self.terms
        self._sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self.add_callback(self.pruning)

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As Trainer's; a folder to resume from may lie anywhere."""
        if resume_from_checkpoint is not None and not isinstance(resume_from_checkpoint, bool):
            resume_from_checkpoint = os.fspath(resume_from_checkpoint)
        self.pruning.resume_from = None if isinstance(resume_from_checkpoint, bool) else resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        terms = self.terms
        if terms is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs.get("labels")
        given = {name: value for name, value in inputs.items() if name != "labels"}
        student: Any = self.model  # what DistributedDataParallel may stand around
        student.train(terms.config.dropout)
        try:
            with terms.watching():
                loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            student.train()
        progress = self.state.global_step / max(1, self.state.max_steps)
        with self.accelerator.autocast():
            extra, parts = terms(given, outputs.logits, labels, progress)
        for name, value in parts.items():
            self._sums[name] += value
        self._count += 1
        # A loss that is divided by the items of all accumulated batches is not divided by their number again.
        batches = self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else 1
        total = terms.config.ce * loss + extra / batches
        return (total, outputs) if return_outputs else total

    def _is_scaled(self, items: Tensor | int | None) -> bool:
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        by_items = self.model_accepts_loss_kwargs and items is not None
        return told if told is not None else by_items or self.compute_loss_func is not None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.pruning.pruner is not None and "loss" in logs:
            logs["density"] = self.pruning.density
            logs.update({name: total / max(1, self._count) for name, total in self._sums.items()})
            self._sums.clear()
            self._count = 0
        super().log(logs, *args, **kwargs)
