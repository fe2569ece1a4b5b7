"""The trainer: prunes a model while it learns from its dense self, whatever decides which weights stay."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._files import in_home
from ..nn.filters import FilterFn, prunable_linears
from ..nn.stand_in import put_back_
from ..nn.views import settle_, trainable_twin
from ..pruning.batches import Batch, split_batch
from ..pruning.intake import check_same_rows, first_batches, training_data
from ..pruning.processes import Processes
from ..pruning.reading import input_norms, train_with_dropout
from . import checkpoint as files
from .checks import check_models, check_weights, teacher_of
from .clock import Clock, steps_of
from .config import DistillConfig
from .evaluate import evaluate
from .features import FeatureReader
from .gates import Gates
from .guard import Best, Guard, not_finite
from .healing import heal_sparse_
from .history import History
from .losses import LossLike, make_loss, smoothed
from .moving import MovingLinear, move_sparse_
from .optimisers import Optimisers
from .position import DataPosition, first_inputs, rewind
from .rates import with_rate
from .student_loss import ExtraTerm, StudentLoss
from .teacher_fit import compensate_from_teacher_

__all__ = ["DistillPruner"]

_CALIBRATION = 8


class DistillPruner:
    """Prunes ``model`` while training it, with distillation from ``teacher`` (default: a frozen copy of the model as
    passed; one that is given keeps its weights and their ``requires_grad``, and is left in eval mode).

    :meth:`fit` trains, :meth:`finalize` returns the same model with hard zeros and no trace of the loop. The student
    runs without dropout unless ``config.dropout``: dropout on one side only would be a difference of its own. The
    teacher may have another architecture where it reads the same batches and gives the same outputs: features are then
    read at the same depth, and where their widths differ, ``hidden=0`` is asked for, since there is nothing to copy.

    Data-parallel: where torch.distributed is initialised (by ``torchrun``, or by ``accelerate launch``, which sets the
    same environment), every process makes its pruner on the bare model, not wrapped in DistributedDataParallel, and
    calls :meth:`fit` with all rows, of which it reads its share, or with a loader that yields its share:
    ``TokenLoader(..., rank=, world=)``, a ``DistributedSampler``, or one that accelerate has prepared. Gradients of
    weights, scores and discriminator, and every figure a decision hangs on, are averaged over ``group`` (None: all
    processes), so that masks and weights are the same everywhere. distributed: "off" lets each process train alone.

    filter_fn(module, fqn): which Linears are pruned, instead of the default. Conv1D (GPT-2), the packed
    ``nn.MultiheadAttention`` and a mixture's experts in one tensor are trained and pruned as the Linears they are in
    truth, and stay what they are (``self.model`` shows them so, over the same memory) unless one gets a low-rank term.
    ValueError on a wrapped model, one without parameters or with none that learns, a config of another pruner, a
    teacher that shares memory with what is trained or whose features do not fit, a model that cannot be copied where no
    teacher is given, and a granularity that does not fit the layers; RuntimeError from :meth:`finalize` before any
    training, and from :meth:`fit` where the loss stays not finite.
    """

    config_type: ClassVar[type[DistillConfig]] = DistillConfig

    def __init__(
        self, model: nn.Module, config: DistillConfig | None = None, teacher: nn.Module | None = None,
        filter_fn: FilterFn | None = None, distributed: Literal["auto", "off"] = "auto", group: Any = None,
    ):  # fmt: skip
        who = self._who = type(self).__name__
        check_models(who, model, teacher)
        if distributed not in ("auto", "off"):
            raise ValueError(f"{who}: distributed expected 'auto' or 'off', got {distributed!r}")
        kind = self.config_type
        config = kind() if config is None else config
        if not isinstance(config, kind) or config.adversarial != kind.adversarial:
            other, got = "GANPruner" if getattr(config, "adversarial", False) else "DistillPruner", type(config)
            raise ValueError(f"{who}: config expected a {kind.__name__}, got a {got.__name__}; give that to {other}")
        self.config, self._lr = with_rate(config, model)
        self._given, self.device = model, next(model.parameters()).device
        teacher = teacher_of(who, model, teacher)
        self.model = model = trainable_twin(model, who)
        self.teacher = trainable_twin(teacher, who)
        self._distributed, self._group = distributed, group
        self._processes = Processes(active=False)  # until fit, for the processes may not have met yet
        self.gates = Gates(model, prunable_linears(model, filter_fn), config)
        check_weights(who, self._given, teacher, self.gates)
        self.reader = FeatureReader(model, list(self.gates.weights), config.features)
        self._alike = self._meet_teacher(filter_fn)
        self.history = History()
        self.adversary: ExtraTerm | None = None
        self._recent: deque[Any] = deque(maxlen=_CALIBRATION)  # inputs that compensation is fitted to
        self._generator = torch.Generator().manual_seed(config.seed * 7919 + 5)
        self._clock, self._position = Clock(config.max_seconds), DataPosition()
        self._guard, self._best, self._finished = Guard(), Best(), False
        self._optimisers = Optimisers.of(model, self.gates, config, self._lr)

    @property
    def density(self) -> float:
        """Kept share of the weights under the gates right now; 1 before the first step."""
        return self.gates.kept / self.gates.total

    @property
    def masks(self) -> dict[str, Tensor]:
        """bool `[N, K]` by layer name, True = kept."""
        return self.gates.masks

    def fit(
        self, train_loader: Any, valid_loader: Any = None, loss: LossLike = nn.CrossEntropyLoss, *,
        checkpoint: str | Path | None = None, checkpoint_every: int = 200, tokenizer: Any = None, batch_size: int = 32,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> History:  # fmt: skip
        """Runs to the end of the schedule; returns the history.

        train_loader yields ``(inputs, targets)`` or dicts with ``labels``; where it has ``set_epoch`` it is called. Or
        both loaders are rows, as in :mod:`~sparseprune.pruning.intake`: a ``datasets.Dataset``, ``(texts, labels)`` ...
        in batches of ``batch_size``, text with the ``tokenizer``; those of the training shuffled.
        loss: a class or an instance. checkpoint: a file written every ``checkpoint_every`` steps and at the end; where
        it exists the run resumes from it as if it had never stopped: with the same masks and the same values, to the
        bit, without ``max_seconds``, at the same thread count, wherever dense products of equal tensors that lie alike
        in memory are equal (on one machine those of MKL and oneDNN are); where they are not, masks that are frozen are
        still the same, and the rest up to rounding. callback: called with the record of each step.

        With several processes: of rows to train on each is given all, and reads its share in batches of ``batch_size``;
        a train_loader is read as it is: it yields this process's share, as many batches as everywhere. valid_loader is
        the whole split, or shares of equal size. The first process writes the checkpoint, and alone needs the file;
        history and callbacks see the same figures everywhere.

        RuntimeError, with what was seen, when the loss stays non-finite after three restores, or was so in every step;
        BlockingIOError where another run holds the checkpoint; ValueError where processes disagree on rows or length.
        """
        if self._finished:
            raise RuntimeError(f"{self._who}.fit: this run is over; make a new pruner to train again")
        clock, config = self._clock, self.config
        self._processes = Processes(self._group, active=self._distributed == "auto")
        train_loader = self._training(train_loader, tokenizer, batch_size, self._processes)
        check_same_rows(train_loader, self._processes, f"{self._who}.fit", self.device)
        valid_loader = training_data(valid_loader, self.model, tokenizer, f"{self._who}.fit", batch_size, again=True)
        if self.adversary is not None:
            self.adversary.meet(self._processes)
        task = make_loss(loss, self.model)
        student_loss = StudentLoss(
            self.model, self.teacher, config, self.reader, smoothed(task, config.label_smoothing), self.adversary,
            self.device, self._generator,
        )  # fmt: skip
        total = self._agreed_steps(train_loader)
        path = None if checkpoint is None else in_home(checkpoint)
        if clock.step == 0:
            self._share_first()
        with ExitStack() as ending:
            ending.callback(put_back_, self.model)  # whoever stops a run finds plain Linears
            ending.enter_context(files.held(path, self._processes))
            saved = None
            if path is not None:
                self._identity = files.identity(config, self.teacher)  # what has none is told before the work
                saved = files.read(path, self._processes)
            if path is not None and saved is not None:
                self._load(path, saved)
                del saved  # as large as all that training moves, and needed no more
            elif clock.step == 0:
                train_loader = self._start_scores(train_loader)
            if self.gates.frozen:
                heal_sparse_(self.model, self.gates)  # a run that was stopped or saved while it healed
            every = config.evaluate_every or max(1, total // 10)
            clock.start(total)
            batches = self._position.batches(train_loader)
            while not self._finished:
                clock.read(self._processes, self.device)
                group = list(islice(batches, config.accumulate))
                if config.compensation != "none" and not self.gates.frozen:
                    self._recent.extend(split_batch(batch, self.device, self.model).inputs for batch in group)
                if not self.gates.frozen and clock.progress >= config.freeze_at:
                    self._freeze(valid_loader)
                record = self._train_step(group, student_loss)
                clock.step += 1
                clock.read(self._processes, self.device)
                over = clock.progress >= 1
                if over and not self.gates.frozen:
                    self._freeze(valid_loader)
                if record is not None:
                    self.history.steps.append(record)
                    if callback is not None:
                        callback(record)
                if valid_loader is not None and (over or clock.step % every == 0):
                    stop = self._evaluate(valid_loader, task)
                    over = over or stop
                if over:
                    self._finish()
                if path is not None and (over or clock.step % checkpoint_every == 0):
                    self._save(path)
        return self.history

    def finalize(self) -> nn.Module:
        """The model, pruned: zeros in plain parameters, same names and shapes, in eval mode, gradients cleared.

        A layer that got a low-rank term is a :class:`sparseprune.SparseLinear` with ``low_rank_a`` and ``low_rank_b``.
        """
        if not self.gates.frozen:
            raise RuntimeError(f"{self._who}.finalize: nothing was pruned yet; call fit first")
        put_back_(self.model)
        self.gates.execute()
        self.model.zero_grad(set_to_none=True)
        return settle_(self._given, self.model, self.gates.low_rank).eval()

    def total_steps(self, loader: Any, tokenizer: Any = None, batch_size: int = 32) -> int:
        """Optimiser steps of a whole run on this loader. ValueError on one that is empty, or has no length to go by."""
        together = Processes(self._group, active=self._distributed == "auto")
        return steps_of(self.config, self._training(loader, tokenizer, batch_size, together), self._who)

    def _training(self, data: Any, tokenizer: Any, size: int, processes: Processes) -> Any:
        return training_data(data, self.model, tokenizer, f"{self._who}.fit", size, True, self.config.seed, processes)

    def _agreed_steps(self, loader: Iterable[Any]) -> int:
        total = steps_of(self.config, loader, self._who)
        low, high = self._processes.extremes(total, self.device)
        if low != high:
            raise ValueError(
                f"{self._who}.fit: the processes expected one number of steps, got {low:g} to {high:g}; give each as "
                "many batches (TokenLoader with rank and world, DistributedSampler), or set steps in the configuration"
            )
        return total

    @torch.no_grad()
    def _share_first(self) -> None:
        """Before the first step every process takes the first one's student and teacher."""
        for model in (self.model, self.teacher):
            self._processes.copy_first_([*model.parameters(), *model.buffers()])
        for name, weight in self.gates.weights.items() if self._processes.size > 1 else ():
            self.gates.masters[name].copy_(weight)

    def _start_scores(self, loader: Iterable[Any]) -> Iterable[Any]:
        """Scores from the loader's first batches; returns what to read all of them from."""
        if not self.config.learned:
            return loader
        rewind(loader)  # not where the training before this left it: a resumed run has no such training
        with torch.random.fork_rng(devices=[]):
            batches, loader = first_batches(loader, _CALIBRATION)
            model = self.teacher if self._alike else self.model
            linears = self._teacher_linears() if self._alike else self.gates.linears
            norms = input_norms(model, linears, (split_batch(batch, self.device, self.model) for batch in batches))
        squares = {name: norm.square() for name, norm in norms.items()}
        self._processes.mean_(squares.values())
        if self._processes.size > 1:
            norms = {name: square.sqrt() for name, square in squares.items()}
        self.gates.start_scores(norms)
        return loader

    def _teacher_linears(self) -> dict[str, nn.Linear]:
        modules = dict(self.teacher.named_modules())
        return {name: found for name in self.gates.weights if isinstance(found := modules.get(name), nn.Linear)}

    def _meet_teacher(self, filter_fn: FilterFn | None) -> bool:
        """Whether the teacher has the student's Linears; where it has not, places in it are looked for."""
        found = {name: linear.weight.shape for name, linear in self._teacher_linears().items()}
        if found == {name: weight.shape for name, weight in self.gates.weights.items()}:
            return True
        if self.config.compensation != "none":
            raise ValueError(
                f"{self._who}: compensation fits each layer to the teacher's, expected a teacher of the student's "
                f'architecture, got another; use compensation="none", got {self.config.compensation!r}'
            )
        self.reader.meet(self.teacher, list(prunable_linears(self.teacher, filter_fn)))
        return False

    def _note(self, event: str, **more: Any) -> None:
        self.history.events.append({"step": self._clock.step, "event": event, **more})

    def _freeze(self, valid_loader: Iterable[Any] | None) -> None:
        """The final masks, and what they removed made up for."""
        # What the masks are chosen from is equal to the bit first, also where the processes run on unlike machines.
        self._processes.mean_([*self.gates.masters.values(), *self.gates.scores.values()])
        put_back_(self.model, MovingLinear)
        self.gates.freeze(self.config.final_density)
        self._processes.check_masks(self.gates.masks, self._who)
        if self.config.compensation != "none":
            self._compensate(valid_loader)
            self._recent.clear()
        self._clock.heal_from = self._clock.progress
        made, left, exact = heal_sparse_(self.model, self.gates)
        self._note("healing on sparse kernels", layers=made, left=left)
        if self.config.rounds:
            self._note("rounding simulated from here on", left=exact)
        self._optimisers = Optimisers.of(self.model, self.gates, self.config, self._lr)
        self._note("masks frozen", density=self.density)

    def _compensate(self, valid_loader: Iterable[Any] | None) -> None:
        fits = compensate_from_teacher_(
            self.model, self.teacher, self.gates, self._recent,
            first_inputs(valid_loader, _CALIBRATION, self.device, self.model), self._processes,
        )  # fmt: skip
        self._note(
            "compensated", chosen={name: found.chosen for name, found in fits.items()},
            errors={name: [found.errors["mask"], found.errors[found.chosen]] for name, found in fits.items()},
            left=[name for name in self.gates.masks if name not in fits],
        )  # fmt: skip

    def _train_step(self, group: list[Any], student_loss: StudentLoss) -> dict[str, Any] | None:
        config, gates, clock, guard, optimisers = self.config, self.gates, self._clock, self._guard, self._optimisers
        if guard.wants_snapshot(clock.step):
            guard.snapshot = None  # before its successor is made: each holds model, moments and masters
            guard.snapshot = self._tensors()
        if not gates.frozen:
            share = max(0.0, 1 - clock.progress / config.prune_until)
            gates.close(config.density_at(clock.progress), config.gumbel * share, self._generator)
            move_sparse_(self.model, gates)
        self.model.train(config.dropout)
        train_with_dropout(self.teacher, config.dropout)
        optimisers.zero_grad()
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        event = None
        for raw in group:
            found = student_loss(split_batch(raw, self.device, self.model), clock)
            event = event or found.event
            (found.total / len(group)).backward()
            for key, value in found.parts.items():
                sums[key] = sums.get(key, 0.0) + value / len(group)
        if not gates.frozen:
            gates.collect()
        self._processes.mean_(gates.seen.values())
        self._processes.mean_gradients_([*optimisers.trained, *(() if gates.frozen else gates.scores.values())])
        sums = self._processes.numbers(sums, self.device)
        norm = float(nn.utils.clip_grad_norm_(optimisers.trained, config.clip))
        if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
            self._not_finite(sums, norm)
            return None
        guard.bad = 0
        factor = clock.lr_factor(config.warmup) * guard.lr_scale
        optimisers.set_rates(self._lr * factor, config.scores_lr * guard.lr_scale)
        if not gates.frozen:
            gates.step_scores(optimisers.scores)
        optimisers.weights.step()
        if not gates.frozen:
            gates.write()
        if event:
            self._note(event)
        density = self.density
        return {
            "step": clock.step, "epoch": self._position.epoch, "progress": clock.progress,
            "phase": "heal" if gates.frozen else "prune", "density": density, "sparsity": 1 - density, **sums,
            "lr": self._lr * factor, "gradient_norm": norm,
        }  # fmt: skip

    def _not_finite(self, sums: dict[str, float], norm: float) -> None:
        """The step is skipped, and counted."""
        seen = not_finite(sums)
        losses = {key: repr(value) for key, value in seen.items()}
        self._note("not finite, step skipped", gradient_norm=repr(norm), losses=losses)
        if self._guard.bad_step():
            where = f"{self._who}.fit: not finite at step {self._clock.step}"
            what = f"gradient norm {norm!r}, losses {seen or sums}"
            self._restore_tensors(self._guard.restore(where, what, self._lr))
            self._guard.lr_scale /= 2
            self._note("restored a snapshot", lr_scale=self._guard.lr_scale)

    def _evaluate(self, loader: Iterable[Any], task: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Records the validation figures; keeps the best healed state; True: patience is over."""
        rng = torch.get_rng_state()
        rewind(loader)  # the same order each time, so that a resumed run sums in the same order
        self._agree_buffers()
        found = self._processes.numbers(evaluate(self.model, loader, task), self.device)
        torch.set_rng_state(rng)
        frozen, step, phase = self.gates.frozen, self._clock.step, "heal" if self.gates.frozen else "prune"
        self.history.evaluations.append({"step": step, "phase": phase, "density": self.density, **found})
        if not frozen:
            return False
        self._best.offer(found, step, self.model)
        waited = self._best.waited
        if not waited or self.config.patience is None or waited < self.config.patience:
            return False
        self._note(f"stopped early after {waited} evaluations")
        return True

    def _agree_buffers(self) -> None:
        """Running statistics, where the model keeps any, are those of all processes."""
        self._processes.mean_([b for b in self.model.buffers() if b.is_floating_point()])

    def _finish(self) -> None:
        self._guard.check_stepped(bool(self.history.steps), self._clock.step, self._who)
        self._finished = True
        if (cut := self._clock.cut_short()) is not None:
            self._note(cut)
        self.teacher.eval()
        self._agree_buffers()
        if self._best.key is not None:
            self.model.load_state_dict(self._best.state)
            self._note(f"best state taken from step {self._best.step}")

    def _tensors(self) -> dict[str, Any]:
        """Everything that training moves, cloned."""
        return copy.deepcopy({
            "model": self.model.state_dict(), "gates": self.gates.state_dict(),
            "optimisers": self._optimisers.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.state_dict(),
        })  # fmt: skip

    def _restore_tensors(self, state: dict[str, Any]) -> None:
        was_frozen = self.gates.frozen
        if was_frozen and not state["gates"]["frozen"]:
            return  # the masks are decided; the weights heal from where they are with the smaller rate
        self.gates.make_low_rank(state["gates"]["low_rank"])
        self.model.load_state_dict(state["model"])
        self.gates.load_state_dict(state["gates"])
        if self.gates.frozen != was_frozen:
            self._optimisers = Optimisers.of(self.model, self.gates, self.config, self._lr)
        self._optimisers.load_state_dict(copy.deepcopy(state["optimisers"]))
        if self.adversary is not None:
            self.adversary.load_state_dict(copy.deepcopy(state["adversary"]))

    def _save(self, path: Path) -> None:
        self._guard.snapshot = None
        self._guard.snapshot = self._tensors()  # and the point to go back to, so that it need not be stored twice
        own = {
            "rng": files.random_state(self.device), "recent": list(self._recent),
            "position": self._position.state_dict(),
            "adversary": None if self.adversary is None else self.adversary.own_state(),
        }  # fmt: skip
        everyone = self._processes.gather(own)
        if self._processes.index:
            return
        files.write(path, {
            **self._identity, "tensors": self._guard.snapshot, "clock": self._clock.state_dict(),
            "guard": self._guard.state_dict(), "best": self._best.state_dict(), "finished": self._finished,
            "history": self.history.to_dict(), "generator": self._generator.get_state(), "processes": everyone,
        })  # fmt: skip

    def _load(self, path: Path, saved: bytes) -> None:
        state = files.parse(path, saved, **self._identity, processes=self._processes)
        own = state["processes"][self._processes.index]
        self._restore_tensors(state["tensors"])
        self._clock.load_state_dict(state["clock"])
        self._guard.load_state_dict(state["guard"])
        self._best.load_state_dict(state["best"])
        self._guard.snapshot, self._finished = state["tensors"], state["finished"]
        self.history = History.from_dict(state["history"])
        self._generator.set_state(state["generator"])
        self._position.load_state_dict(own["position"])
        self._recent.extend(Batch(inputs).to(self.device).inputs for inputs in own["recent"])
        if self.adversary is not None:
            self.adversary.load_own_state(own["adversary"])
        files.set_random_state(own["rng"], self.device)
