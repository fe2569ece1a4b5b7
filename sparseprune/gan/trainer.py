"""The pruner: one trainer for every arm, from plain gradual magnitude to the adversarial loop."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._files import remove_unfinished, replacing
from ..nn.filters import FilterFn, prunable_linears
from ..optim import AdamW
from ..pruning.ranks import Ranks
from .compensation import make_up_
from .config import DiscriminatorConfig, GANConfig
from .evaluate import evaluate
from .features import Batch, Taps, choose_taps, normalise, rows_of, split_batch
from .game import Game
from .gates import Gates, input_norms
from .history import History
from .losses import LossLike, distillation, is_classification, make_loss, real_rows, task_loss

__all__ = ["GANPruner"]

_FORMAT = 3
_SNAPSHOT_EVERY = 50
_BAD_STEPS = 3
_RESTORES = 3
_WEIGH_EVERY = 8
_CALIBRATION = 8


class GANPruner:
    """Prunes ``model`` while training it against ``teacher`` (default: a frozen copy of the model as passed).

    :meth:`fit` trains, :meth:`finalize` returns the same model with hard zeros and no trace of the loop. The student
    runs without dropout unless ``config.dropout``, for dropout on one side only would give the discriminator its
    answer.

    Data-parallel: where torch.distributed is initialised (by ``torchrun``, or by ``accelerate launch``, which sets the
    same environment), every process makes its pruner on the bare model, not wrapped in DistributedDataParallel, and
    calls :meth:`fit` with its own share of the data: ``TokenLoader(..., rank=, world=)``, a ``DistributedSampler``, or
    a loader that accelerate has prepared. Gradients of weights, scores and discriminator, and every figure a decision
    hangs on, are averaged over ``group`` (None: all processes), so that masks and weights are the same everywhere.
    distributed: "off" lets each process train alone.
    """

    def __init__(
        self, model: nn.Module, config: GANConfig | None = None, teacher: nn.Module | None = None,
        filter_fn: FilterFn | None = None, distributed: Literal["auto", "off"] = "auto", group: Any = None,
    ):  # fmt: skip
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise ValueError(
                f"GANPruner: expected the bare model, got {type(model).__name__}; pass its .module, gradients are "
                "averaged by the pruner"
            )
        if distributed not in ("auto", "off"):
            raise ValueError(f"GANPruner: distributed expected 'auto' or 'off', got {distributed!r}")
        self.model, self.config = model, config or GANConfig()
        self.teacher = copy.deepcopy(model) if teacher is None else teacher
        if self.teacher is model:
            raise ValueError("GANPruner: the teacher is the model itself; pass a copy, or None to have one made")
        self.teacher.requires_grad_(False).eval()
        first = next(model.parameters(), None)
        if first is None:
            raise ValueError("GANPruner: the model has no parameters")
        self.device = first.device
        self._distributed, self._group = distributed, group
        self._ranks = Ranks(active=False)  # until fit, for the processes may not have met yet
        linears = prunable_linears(model, filter_fn)
        self.gates = Gates(model, linears, self.config)
        self.features = self.config.features
        self.entry: str | None = None
        self.taps: list[str] = []
        if not callable(self.features):
            self.entry, self.taps = choose_taps(model, list(self.gates.weights), self.features)
        self.history = History()
        self.game: Game | None = None
        self._recent: deque[Any] = deque(maxlen=_CALIBRATION)  # inputs that compensation is fitted to
        self._generator = torch.Generator().manual_seed(self.config.seed * 7919 + 5)
        self._step = self._epoch = self._batch = 0
        self._elapsed = self._progress = 0.0
        self._lr_scale = 1.0
        self._bad = self._restores = 0
        self._heal_from: float | None = None
        self._best: dict[str, Any] | None = None
        self._waited = 0
        self._finished = False
        self._snapshot: dict[str, Any] | None = None
        self._epoch_rng: Tensor | None = None
        self._loader_rng: list[Tensor] = []
        self._optimisers()

    @property
    def density(self) -> float:
        """Kept share of the weights under the gates right now; 1 before the first step."""
        return self.gates.kept / self.gates.total

    @property
    def masks(self) -> dict[str, Tensor]:
        """bool `[N, K]` by layer name, True = kept."""
        return self.gates.masks

    def fit(
        self, train_loader: Iterable[Any], valid_loader: Iterable[Any] | None = None,
        loss: LossLike = nn.CrossEntropyLoss, *, checkpoint: str | Path | None = None, checkpoint_every: int = 200,
        callback: Callable[[dict[str, Any]], None] | None = None,
    ) -> History:  # fmt: skip
        """Runs to the end of the schedule; returns the history.

        train_loader yields ``(inputs, targets)`` or dicts with ``labels``; where it has ``set_epoch`` it is called.
        loss: a class or an instance. checkpoint: a file written every ``checkpoint_every`` steps and at the end; where
        it exists the run resumes from it, bit for bit as if it had never stopped (without ``max_seconds``, at the same
        thread count). callback: called with the record of each step.

        With several processes: train_loader yields this process's share, as many batches as everywhere; valid_loader
        the whole split, or shares of equal size; the first process writes the checkpoint and the only one to need the
        file; history and callbacks see the same figures everywhere.

        Raises RuntimeError, with what was seen, when the loss stays non-finite after three restores, and ValueError
        where the processes disagree on the length of the run.
        """
        if self._finished:
            raise RuntimeError("GANPruner.fit: this run is over; make a new pruner to train again")
        compute = make_loss(loss)
        self._ranks = Ranks(self._group, active=self._distributed == "auto")
        total = self._agreed_steps(train_loader)
        path = None if checkpoint is None else Path(checkpoint)
        if self._step == 0:
            self._meet()
        saved = None if path is None else self._read(path)
        if path is not None and saved is not None:
            self._load(path, saved)
        elif self._step == 0:
            self._prepare(train_loader)
        every = self.config.evaluate_every or max(1, total // 10)
        began = time.monotonic() - self._elapsed
        batches = self._batches(train_loader)
        while not self._finished:
            self._clock(began, total)
            group = list(islice(batches, self.config.accumulate))
            if self.config.compensation != "none" and not self.gates.frozen:
                self._recent.extend(split_batch(batch, self.device).inputs for batch in group)
            if not self.gates.frozen and self._progress >= self.config.freeze_at:
                self._freeze(valid_loader)
            record = self._train_step(group, compute)
            self._step += 1
            self._clock(began, total)
            over = self._progress >= 1
            if over and not self.gates.frozen:
                self._freeze(valid_loader)
            if record is not None:
                self.history.steps.append(record)
                if callback is not None:
                    callback(record)
            if valid_loader is not None and (over or self._step % every == 0):
                stop = self._evaluate(valid_loader, compute)
                over = over or stop
            if over:
                self._finish()
            if path is not None and (over or self._step % checkpoint_every == 0):
                self._save(path)
        return self.history

    def finalize(self) -> nn.Module:
        """The model, pruned: zeros in plain parameters, same names and shapes, in eval mode, gradients cleared.

        A layer that got a low-rank term is a :class:`sparseprune.SparseLinear` with ``low_rank_a`` and ``low_rank_b``.
        """
        if not self.gates.frozen:
            raise RuntimeError("GANPruner.finalize: nothing was pruned yet; call fit first")
        self.gates.execute()
        self.model.eval()
        self.model.zero_grad(set_to_none=True)
        return self.model

    def null_test(self, loader: Iterable[Any], steps: int = 200, cue: str | None = None) -> float:
        """Accuracy of a fresh discriminator between the teacher and an unpruned copy of it, on rows it was not trained
        on.

        Without a planted cue it must stay at 0.5: whatever it found would be an artefact of the pipeline, not of
        pruning. cue: "dropout" (the copy runs with its dropout on) or "pad" (padding counts as tokens in the copy
        alone) must be found out.
        """
        if cue not in (None, "dropout", "pad"):
            raise ValueError(f'null_test: cue expected None, "dropout" or "pad", got {cue!r}')
        twin = copy.deepcopy(self.teacher)
        twin.train(cue == "dropout")
        return self._probe(twin, loader, steps, pad=cue == "pad")

    def probe(self, loader: Iterable[Any], steps: int = 200) -> float:
        """Accuracy of a fresh discriminator between the teacher and the model as it is now: 0.5 where it finds nothing.

        The mechanism check: whatever an arm did, how much of its difference from the teacher is left to be seen.
        """
        self.model.eval()
        return self._probe(self.model, loader, steps, pad=False)

    def _probe(self, twin: nn.Module, loader: Iterable[Any], steps: int, pad: bool) -> float:
        batches = _forever(loader)
        settings = self.config.discriminator
        game: Game | None = None
        verdicts: list[float] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            for step in range(steps + max(1, steps // 4)):
                batch = split_batch(next(batches), self.device)
                with torch.no_grad():
                    real, entry = self._look(self.teacher, batch)[1:]
                    fake, _ = self._look(twin, batch)[1:]
                mask = batch.mask
                if game is None:
                    game = self._new_game(real, entry, mask, dataclasses.replace(settings, mode="trained"))
                rows = game.rows(real, fake, entry, mask)
                if pad and mask is not None:
                    count = int(len(rows.fake) / len(fake))
                    padded = [game.rows([r], [f], None, None) for r, f in zip(real, fake)]
                    rows.fake = torch.cat([p.fake[torch.randperm(len(p.fake))[:count]] for p in padded])
                    rows.fake, rows.real = rows.fake[: len(rows.real)], rows.real[: len(rows.fake)]
                if step < steps:
                    game.monitor.reset()
                    game.play(rows, progress=1.0)
                else:
                    game.critic.eval()
                    with torch.no_grad():
                        on_real = game.critic(rows.real, rows.condition, rows.tap)
                        on_fake = game.critic(rows.fake, rows.condition, rows.tap)
                    verdicts.append(
                        float((on_real > on_fake).double().mean() + 0.5 * (on_real == on_fake).double().mean())
                    )
        return sum(verdicts) / len(verdicts)

    def total_steps(self, loader: Iterable[Any]) -> int:
        """Optimiser steps of a whole run on this loader. ValueError on one that is empty, or has no length to go by."""
        if self.config.steps is not None:
            return self.config.steps
        size = len(loader) if hasattr(loader, "__len__") else None  # type: ignore[arg-type]
        if size is None:
            raise ValueError("GANPruner.fit: the loader has no length; set GANConfig(steps=...)")
        if size == 0:
            raise ValueError("GANPruner.fit: the training loader is empty")
        return max(1, round(self.config.epochs * size / self.config.accumulate))

    def _agreed_steps(self, loader: Iterable[Any]) -> int:
        total = self.total_steps(loader)
        low, high = self._ranks.extremes(total, self.device)
        if low != high:
            raise ValueError(
                f"GANPruner.fit: the processes expected one number of steps, got {low:g} to {high:g}; give each as "
                "many batches (TokenLoader with rank and world, DistributedSampler), or set GANConfig(steps=...)"
            )
        return total

    def _clock(self, began: float, total: int) -> None:
        self._elapsed = time.monotonic() - began
        share = self._step / total
        if self.config.max_seconds is not None:
            self._elapsed = self._ranks.extremes(self._elapsed, self.device)[1]
            share = max(share, self._elapsed / self.config.max_seconds)
        self._progress = min(1.0, share)

    @torch.no_grad()
    def _meet(self) -> None:
        """Before the first step every process takes the first one's student and teacher."""
        if self._ranks.size == 1:
            return
        for model in (self.model, self.teacher):
            self._ranks.copy_first_([*model.parameters(), *model.buffers()])
        for name, weight in self.gates.weights.items():
            self.gates.masters[name].copy_(weight)

    def _prepare(self, loader: Iterable[Any]) -> None:
        if self.config.learned:
            with torch.random.fork_rng(devices=[]):
                norms = input_norms(self.teacher, self._teacher_linears(), islice(iter(loader), _CALIBRATION))
            squares = {name: norm.square() for name, norm in norms.items()}
            self._ranks.mean_(squares.values())
            if self._ranks.size > 1:
                norms = {name: square.sqrt() for name, square in squares.items()}
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(0)
            self.gates.start_scores(norms)

    def _teacher_linears(self) -> dict[str, nn.Linear]:
        modules = dict(self.teacher.named_modules())
        found = {name: modules.get(name) for name in self.gates.weights}
        wrong = [name for name, module in found.items() if not isinstance(module, nn.Linear)]
        if wrong:
            raise ValueError(
                f"GANPruner: the teacher has no Linear called {wrong[0]!r}; it needs the student's architecture"
            )
        return {name: module for name, module in found.items() if isinstance(module, nn.Linear)}

    def _batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Batches for ever; the position is in ``_epoch`` and ``_batch``, and a resumed run skips to it."""
        skip, after_skip = self._batch, torch.get_rng_state()
        generators = _generators(loader)
        while True:
            for part in (loader, getattr(loader, "sampler", None)):
                if part is not None and hasattr(part, "set_epoch"):
                    part.set_epoch(self._epoch)
            if skip:
                assert self._epoch_rng is not None
                torch.set_rng_state(self._epoch_rng)
                # A sampler that makes its generator only when it is read seeds it by the epoch.
                for generator, state in zip(generators, self._loader_rng):
                    generator.set_state(state)
            else:
                self._epoch_rng = torch.get_rng_state()
                self._loader_rng = [generator.get_state() for generator in generators]
            seen = 0
            for batch in loader:
                seen += 1
                if seen <= skip:
                    if seen == skip:
                        torch.set_rng_state(after_skip)
                    continue
                self._batch = seen
                yield batch
            if seen == 0:
                raise ValueError("GANPruner.fit: the training loader is empty; an iterator can be read only once")
            skip = 0
            self._epoch, self._batch = self._epoch + 1, 0

    def _optimisers(self) -> None:
        """Weights: AdamW on masters and all other parameters; after the freeze sp.AdamW, which holds the zeros."""
        config = self.config
        pruned = {id(w) for w in self.gates.weights.values()}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in pruned]
        decayed = [p for p in others if p.dim() > 1]
        plain = [p for p in others if p.dim() <= 1]
        weights = list(self.gates.weights.values() if self.gates.frozen else self.gates.masters.values())
        groups = [
            {"params": weights + decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        self.weight_optimiser: torch.optim.Optimizer
        if self.gates.frozen:
            masks = {self.gates.weights[name]: mask for name, mask in self.gates.masks.items()}
            self.weight_optimiser = AdamW(groups, lr=config.lr, masks=masks)
        else:
            fused = all(p.is_floating_point() for p in self.trained)
            self.weight_optimiser = torch.optim.AdamW(groups, lr=config.lr, fused=fused)
        self.score_optimiser = torch.optim.Adam(self.gates.scores.values(), lr=config.scores_lr)

    def _freeze(self, valid_loader: Iterable[Any] | None) -> None:
        """The final masks, and what they removed made up for."""
        # What the masks are chosen from is equal to the bit first, also where the processes run on unlike machines.
        self._ranks.mean_([*self.gates.masters.values(), *self.gates.scores.values()])
        self.gates.freeze(self.config.final_density)
        self._ranks.check_masks(self.gates.masks, "GANPruner")
        if self.config.compensation != "none":
            self._compensate(valid_loader)
            self._recent.clear()
        self._heal_from = self._progress
        self._optimisers()
        self.history.events.append({"step": self._step, "event": "masks frozen", "density": self.density})

    def _compensate(self, valid_loader: Iterable[Any] | None) -> None:
        fits = make_up_(
            self.model, self.teacher, self.gates, self._recent, self._first_inputs(valid_loader), self._ranks
        )
        self.history.events.append(
            {"step": self._step, "event": "compensated", "chosen": {name: found.chosen for name, found in fits.items()},
             "errors": {name: [found.errors["mask"], found.errors[found.chosen]] for name, found in fits.items()},
             "left": [name for name in self.gates.masks if name not in fits]}
        )  # fmt: skip

    def _first_inputs(self, loader: Iterable[Any] | None) -> list[Any]:
        """Inputs of the loader's first batches; its order, and everything random, stays as it was."""
        if loader is None:
            return []
        rng = torch.get_rng_state()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(0)
        found = [split_batch(batch, self.device).inputs for batch in islice(iter(loader), _CALIBRATION)]
        torch.set_rng_state(rng)
        return found

    def _lr_factor(self) -> float:
        """Linear warm-up, constant while the masks move, then from 1 down to 0.02 while the rest heals."""
        p = self._progress
        if self._heal_from is None:
            return min(1.0, (p + 1e-3) / max(self.config.warmup, 1e-3))
        share = (p - self._heal_from) / max(1e-9, 1 - self._heal_from)
        return max(0.02, min(1.0, 20 * share + 0.05) * (1 - share))

    def _look(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """(logits, features, entry) of one forward pass."""
        if callable(self.features):
            logits, features = self.features(model, batch.inputs)
            return logits, list(features), batch.first_float
        watch = Taps(model, self.taps, self.entry)
        with watch.recording():
            logits = batch.run(model)
        features = watch.collect() or [real_rows(logits, batch.targets, batch.mask)]
        return logits, features, batch.first_float if self.entry is None else watch.entry

    def _new_game(
        self, features: list[Tensor], entry: Tensor | None, mask: Tensor | None,
        config: DiscriminatorConfig | None = None, ranks: Ranks | None = None,
    ) -> Game:  # fmt: skip
        config = config or self.config.discriminator
        rows = [len(rows_of(f, mask)) for f in features]
        usable = entry is not None and config.conditional and entry.dim() > 1
        if usable and entry is not None and {len(rows_of(entry, mask))} != set(rows):
            usable = False
            self.history.events.append({"step": self._step, "event": "unconditional: the embedding has other rows"})
        condition = entry.shape[-1] if usable and entry is not None else 0
        sizes = [f.shape[-1] for f in features]
        return Game(config, self.config.kappa, sizes, condition, self.config.seed, self.device, ranks)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.autocast == "none":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _train_step(self, group: list[Any], compute: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Any] | None:
        config, gates = self.config, self.gates
        if self._step % _SNAPSHOT_EVERY == 0 and self._bad == 0:
            self._snapshot = self._tensors()
        if not gates.frozen:
            share = max(0.0, 1 - self._progress / config.prune_until)
            density = config.density_at(self._progress)
            gates.close(density, config.gumbel * share, self._generator)
        self.model.train(config.dropout)
        self.teacher.train(config.dropout)
        for optimiser in (self.weight_optimiser, self.score_optimiser):
            optimiser.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        event = None
        for raw in group:
            batch = split_batch(raw, self.device)
            total, parts, said = self._losses(batch, compute)
            event = event or said
            (total / len(group)).backward()
            for key, value in parts.items():
                sums[key] = sums.get(key, 0.0) + value / len(group)
        if not gates.frozen:
            gates.collect()
        self._ranks.mean_gradients_([*self.trained, *(() if gates.frozen else gates.scores.values())])
        sums = self._ranks.numbers(sums, self.device)
        norm = float(nn.utils.clip_grad_norm_(self.trained, config.clip))
        if not (math.isfinite(norm) and math.isfinite(sums["loss"])):
            self._not_finite(sums, norm)
            return None
        self._bad = 0
        factor = self._lr_factor() * self._lr_scale
        for parameters in self.weight_optimiser.param_groups:
            parameters["lr"] = config.lr * factor
        for parameters in self.score_optimiser.param_groups:
            parameters["lr"] = config.scores_lr * self._lr_scale
        self.weight_optimiser.step()
        if not gates.frozen:
            if config.learned:
                self.score_optimiser.step()
            elif config.method == "movement":
                gates.move_scores()
            gates.write()
        if event:
            self.history.events.append({"step": self._step, "event": event})
        density = self.density
        return {
            "step": self._step, "epoch": self._epoch, "progress": self._progress,
            "phase": "heal" if gates.frozen else "prune", "density": density, "sparsity": 1 - density, **sums,
            "lr": config.lr * factor, "gradient_norm": norm,
        }  # fmt: skip

    def _losses(
        self, batch: Batch, compute: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, float], str | None]:
        config = self.config
        distil = config.kd > 0 or config.hidden > 0 or config.adversarial
        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            if distil:
                with torch.no_grad():
                    teacher_logits, teacher_features, entry = self._look(self.teacher, batch)
            logits, features, _ = self._look(self.model, batch)
        classes = is_classification(logits, batch.targets)
        ce = task_loss(compute, logits, batch.targets)
        parts = {"ce": float(ce.detach())}
        total = config.ce * ce
        event = None
        if distil:
            mask = batch.mask
            kd = distillation(
                real_rows(logits, batch.targets, mask), real_rows(teacher_logits, batch.targets, mask),
                config.temperature, classes,
            )  # fmt: skip
            hidden = torch.stack([
                F.mse_loss(normalise(rows_of(s, mask)), normalise(rows_of(t, mask)))
                for s, t in zip(features, teacher_features)
            ]).mean()  # fmt: skip
            pull = config.kd * kd + config.hidden * hidden
            total = total + pull
            parts |= {"kd": float(kd.detach()), "hidden": float(hidden.detach())}
            if config.adversarial:
                extra, said, event = self._adversarial(features, teacher_features, entry, mask, pull)
                total = total + extra
                parts |= said
        parts["loss"] = float(total.detach())
        return total, parts, event

    def _adversarial(
        self, features: list[Tensor], teacher: list[Tensor], entry: Tensor | None, mask: Tensor | None, pull: Tensor
    ) -> tuple[Tensor, dict[str, float], str | None]:
        if self.game is None:
            self.game = self._new_game(teacher, entry, mask, ranks=self._ranks)
        game = self.game
        rows = game.rows(teacher, features, entry, mask)
        played = game.play(rows, self._progress)
        adversarial = game.pull(rows)
        if self._step % _WEIGH_EVERY == 0 or not game.balance.count:
            game.weigh(pull, adversarial, features)
        weight = game.balance.weight if self._progress >= self.config.warmup else 0.0
        event = played["event"]
        if game.monitor.blind and not game.monitor.warned and self._progress > self.config.warmup:
            game.monitor.warned = True
            event = event or f"discriminator blind: accuracy {game.monitor.accuracy:.2f}"
        return weight * adversarial, {
            "adversarial": float(adversarial.detach()), "weight": weight,
            "discriminator_loss": played["loss"], "discriminator_accuracy": played["accuracy"],
        }, event  # fmt: skip

    def _not_finite(self, sums: dict[str, float], norm: float) -> None:
        """Skips the step; after three in a row goes back to the last snapshot with half the learning rate."""
        self._bad += 1
        seen = {key: value for key, value in sums.items() if not math.isfinite(value)}
        self.history.events.append(
            {"step": self._step, "event": "not finite, step skipped", "gradient_norm": repr(norm),
             "losses": {key: repr(value) for key, value in seen.items()}}
        )  # fmt: skip
        if self._bad < _BAD_STEPS:
            return
        self._restores += 1
        if self._restores > _RESTORES or self._snapshot is None:
            raise RuntimeError(
                f"GANPruner.fit: not finite at step {self._step} after {self._restores - 1} restores ("
                f"gradient norm {norm!r}, losses {seen or sums}); lower lr ("
                f"{self.config.lr * self._lr_scale:g}) or clip"
            )
        self._restore_tensors(self._snapshot)
        self._lr_scale /= 2
        self._bad = 0
        self.history.events.append({"step": self._step, "event": "restored a snapshot", "lr_scale": self._lr_scale})

    def _evaluate(self, loader: Iterable[Any], compute: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Records the validation figures; keeps the best healed state; True: patience is over."""
        rng = torch.get_rng_state()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(0)  # the same order each time, so that a resumed run sums in the same order
        self._agree_buffers()
        found = self._ranks.numbers(evaluate(self.model, loader, compute), self.device)
        torch.set_rng_state(rng)
        phase = "heal" if self.gates.frozen else "prune"
        self.history.evaluations.append({"step": self._step, "phase": phase, "density": self.density, **found})
        if not self.gates.frozen:
            return False
        key = [found.get("accuracy", 0.0), -found["loss"]]
        if self._best is None or key > self._best["key"]:
            state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = {"key": key, "step": self._step, "state": state}
            self._waited = 0
            return False
        self._waited += 1
        if self.config.patience is not None and self._waited >= self.config.patience:
            self.history.events.append({"step": self._step, "event": f"stopped early after {self._waited} evaluations"})
            return True
        return False

    def _agree_buffers(self) -> None:
        """Running statistics, where the model keeps any, are those of all processes."""
        self._ranks.mean_([b for b in self.model.buffers() if b.is_floating_point()])

    def _finish(self) -> None:
        self._finished = True
        self._agree_buffers()
        if self._best is not None:
            self.model.load_state_dict(self._best["state"])
            self.history.events.append(
                {"step": self._step, "event": f"best state taken from step {self._best['step']}"}
            )

    def _tensors(self) -> dict[str, Any]:
        """Everything that training moves, cloned."""
        return copy.deepcopy({
            "model": self.model.state_dict(), "gates": self.gates.state_dict(),
            "weight_optimiser": self.weight_optimiser.state_dict(),
            "score_optimiser": self.score_optimiser.state_dict(),
            "game": None if self.game is None else self.game.state_dict(),
        })  # fmt: skip

    def _restore_tensors(self, state: dict[str, Any]) -> None:
        was_frozen = self.gates.frozen
        if was_frozen and not state["gates"]["frozen"]:
            return  # the masks are decided; the weights heal from where they are with the smaller rate
        self.gates.meet_ranks(state["gates"]["ranks"])
        self.model.load_state_dict(state["model"])
        self.gates.load_state_dict(state["gates"])
        if self.gates.frozen != was_frozen:
            self._optimisers()
        self.weight_optimiser.load_state_dict(copy.deepcopy(state["weight_optimiser"]))
        self.score_optimiser.load_state_dict(copy.deepcopy(state["score_optimiser"]))
        if self.game is not None and state["game"] is not None:
            self.game.load_state_dict(copy.deepcopy(state["game"]))

    def _teacher_digest(self) -> str:
        digest = hashlib.sha256()
        for name, value in self.teacher.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _save(self, path: Path) -> None:
        """One file, written by the first process beside its place and renamed into it."""
        game = self.game
        self._snapshot = self._tensors()  # and the point to go back to, so that it need not be stored twice
        own = {
            "rng": torch.get_rng_state(), "epoch_rng": self._epoch_rng, "loader_rng": self._loader_rng,
            "recent": list(self._recent),
            "game_generator": None if game is None else game.generator.get_state(),
        }  # fmt: skip
        first, *others = self._ranks.gather(own)
        if self._ranks.rank:
            return
        state = {
            "format": _FORMAT, "config": repr(self.config), "teacher": self._teacher_digest(),
            "tensors": self._snapshot,
            "game_shape": None if game is None else [list(game.feature_sizes), game.condition_size],
            "step": self._step, "epoch": self._epoch, "batch": self._batch, "elapsed": self._elapsed,
            "progress": self._progress, "lr_scale": self._lr_scale, "bad": self._bad, "restores": self._restores,
            "heal_from": self._heal_from, "best": self._best, "waited": self._waited, "finished": self._finished,
            "history": self.history.to_dict(), "generator": self._generator.get_state(), "ranks": [first, *others],
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished:
            torch.save(state, unfinished)

    def _read(self, path: Path) -> bytes | None:
        """The checkpoint as the first process sees it; None where there is none."""
        own = None
        if self._ranks.rank == 0:
            remove_unfinished(path)
            own = path.read_bytes() if path.exists() else None
        return self._ranks.gather(own)[0]

    def _load(self, path: Path, saved: bytes) -> None:
        try:
            state = torch.load(io.BytesIO(saved), map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path}: not a readable training checkpoint ({type(error).__name__}); delete it"
            ) from error
        if not isinstance(state, dict) or state.get("format") != _FORMAT:
            raise ValueError(f"{path}: expected a training checkpoint of format {_FORMAT}; delete it to start again")
        if state["config"] != repr(self.config):
            raise ValueError(f"{path}: written under another configuration; delete it or restore the configuration")
        if state["teacher"] != self._teacher_digest():
            raise ValueError(f"{path}: written with another teacher; delete it to start again")
        if len(state["ranks"]) != self._ranks.size:
            raise ValueError(
                f"{path}: written by {len(state['ranks'])} processes, expected {self._ranks.size}; start as many, or "
                "delete it to start again"
            )
        own = state["ranks"][self._ranks.rank]
        if state["game_shape"] is not None:
            sizes, condition = state["game_shape"]
            seed = self.config.seed
            self.game = Game(
                self.config.discriminator, self.config.kappa, sizes, condition, seed, self.device, self._ranks
            )
        self._restore_tensors(state["tensors"])
        for key in ("step", "epoch", "batch", "elapsed", "progress", "lr_scale", "bad", "restores", "heal_from", "best",
                    "waited", "finished"):  # fmt: skip
            setattr(self, f"_{key}", state[key])
        self._snapshot = state["tensors"]
        self.history = History.from_dict(state["history"])
        self._generator.set_state(state["generator"].cpu())
        self._epoch_rng, self._loader_rng = own["epoch_rng"], [state.cpu() for state in own["loader_rng"]]
        self._recent.extend(own["recent"])
        if self.game is not None:
            self.game.generator.set_state(own["game_generator"].cpu())
        torch.set_rng_state(own["rng"].cpu())


def _generators(loader: Any) -> list[torch.Generator]:
    """Those that the order of a DataLoader hangs on: its own, its samplers', and those that accelerate made."""
    found: dict[int, torch.Generator] = {}
    parts, met = [loader], set()
    while parts:
        part = parts.pop()
        if part is None or id(part) in met:
            continue
        met.add(id(part))
        for name in ("generator", "synchronized_generator"):
            own = getattr(part, name, None)
            if isinstance(own, torch.Generator):
                found.setdefault(id(own), own)
        parts += [getattr(part, name, None) for name in ("sampler", "batch_sampler", "base_dataloader")]
    return list(found.values())


def _forever(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("null_test: the loader is empty")
