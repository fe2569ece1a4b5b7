"""Pruner: gradual pruning in any training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import ops
from .._config import Config
from ..nn.copies import shared_with
from ..nn.filters import FilterFn, select_linears
from ..nn.simulated import check_dtypes, simulate_
from ..nn.stand_in import put_back_
from ..nn.views import LinearViews
from ..optim import AdamW
from .batches import moved
from .criteria import Criterion, PruneContext, make_criterion
from .granularity import Granularity
from .intake import calibration_data
from .masks import MaskSet
from .plan import Plan
from .processes import Processes
from .prune import PruneReport, check_floor, make_report, trim_, warn_starved
from .schedules import CubicSchedule, Schedule
from .selectors import DistributedSelector, Selector
from .upkeep import accumulates, check_frozen, granularities, inner_of, linears_of, skips, unscaled

__all__ = ["PruneConfig", "Pruner"]

_VERSION = 1
_BY_DEFAULT = CubicSchedule(0.1)


@dataclass(frozen=True)
class PruneConfig(Config):
    """How a :class:`Pruner` prunes.

    ``schedule``: the density over the window from step ``begin`` to step ``end``, 0 <= begin < end, in steps of the
    optimiser; masks are chosen anew every ``every`` >= 1 steps of it and are fixed from ``end`` on. ``density``: the
    final one, a share of the weights in (0, 1], by default the schedule's; without a schedule a cubic one ends there.
    ``criterion``, ``criterion_options``, ``granularity``, ``scope``, ``densities``, ``floor``: as in ``prune_``.
    ``value_dtype``, ``activations``: those that ``sparsify_`` will be given; from ``end`` to ``finalize`` the pruned
    Linears round as its kernels will, and gradients pass straight through.

    ValueError on a ``density`` that is not the schedule's, on steps outside these ranges or not whole, on another
    scope, and on dtypes that do not go together.
    """

    schedule: Schedule = field(default_factory=lambda: _BY_DEFAULT)
    criterion: str | Criterion | Callable[..., Tensor] = "magnitude"
    granularity: str | Granularity | dict[str, str | Granularity] = "element"
    scope: Literal["global", "layer"] = "global"
    density: float | None = None
    begin: int = 0
    end: int = 1000
    every: int = 10
    densities: dict[str, float] | None = None
    criterion_options: dict[str, Any] = field(default_factory=dict)
    floor: float | None = None
    value_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    activations: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        check_dtypes("PruneConfig", self.value_dtype, self.activations)
        if not isinstance(self.schedule, Schedule):
            got = repr(self.schedule)
            raise ValueError(f"PruneConfig: schedule expected a Schedule such as sp.CubicSchedule(0.1), got {got}")
        if self.density is not None and self.schedule is _BY_DEFAULT:
            object.__setattr__(self, "schedule", CubicSchedule(self.density))
        final = self.schedule.final_density
        if self.density is None:
            object.__setattr__(self, "density", final)
        elif not abs(self.density - final) <= 1e-12:
            raise ValueError(
                f"PruneConfig: density ({self.density!r}) expected to be the schedule's final density ({final!r}); "
                "leave it out or change the schedule"
            )
        if self.scope not in ("global", "layer"):
            raise ValueError(f"PruneConfig: scope expected 'global' or 'layer', got {self.scope!r}")
        for name in ("begin", "end", "every"):
            steps = getattr(self, name)
            if isinstance(steps, bool) or not isinstance(steps, Real) or steps % 1:
                raise ValueError(f"PruneConfig: {name} expected a whole number of steps, got {steps!r}; round it")
            object.__setattr__(self, name, math.floor(steps))
        if not 0 <= self.begin < self.end:
            raise ValueError(f"PruneConfig: expected 0 <= begin < end, got begin={self.begin!r}, end={self.end!r}")
        if not self.every >= 1:
            raise ValueError(f"PruneConfig: every expected at least 1, got {self.every!r}")


class Pruner:
    """Prunes a model while it trains::

        pruner = Pruner(model, PruneConfig(schedule=CubicSchedule(0.1), begin=100, end=900))
        pruner.prepare(optimizer)
        for batch in loader:
            loss(model(batch)).backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        model = pruner.finalize()

    Nothing is attached to the model: its modules, parameter names and state dict stay, and it can be copied and
    pickled at any time. Conv1D (GPT-2), the packed ``nn.MultiheadAttention`` and a mixture's experts in one tensor are
    pruned as the Linears they are in truth, under the names that :func:`sparsify_` gives those. Where the configuration
    rounds, other modules hold the same parameters from ``end`` to ``finalize``. What is pruned is zero in the weights
    themselves; the values behind the zeros are kept here, so that until the masks are fixed a weight can come back with
    the value it had. ``prepare`` hooks the optimiser, which masks gradients and shows them to criteria that need them;
    an ``sp.AdamW`` is handed the masks. A copied or unpickled pruner wants ``prepare`` again.

    distributed: ``"auto"`` means ``"replicated"`` where torch.distributed is initialised: every process holds the whole
    model, scores are averaged, and the masks are compared. ``"sharded"``: every process holds its own part of each
    layer (the same layers everywhere); one exact threshold is found from summed histograms. ``"off"``: this process
    alone.

    filter_fn, data, tokenizer: as in ``prune_``; group: the processes that train together, None for all. ValueError on
    arguments that do not fit the model, as in ``prune_``; RuntimeError from :meth:`step` after :meth:`finalize`, and
    where a Linear has been replaced in the meantime.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        filter_fn: FilterFn | None = None,
        data: Any = None,
        distributed: Literal["auto", "off", "replicated", "sharded"] = "auto",
        group: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.config = config or PruneConfig()
        if distributed not in ("auto", "off", "replicated", "sharded"):
            raise ValueError(
                f"Pruner: distributed expected 'auto', 'off', 'replicated' or 'sharded', got {distributed!r}"
            )
        self._distributed, self._group = distributed, group
        # What it observes here stays here: another Pruner of the same configuration begins with what it was given.
        given = self.config.criterion
        given = copy.deepcopy(given) if isinstance(given, Criterion) else given
        self.criterion = make_criterion(given, self.config.criterion_options)
        if self.criterion.needs_data and data is None:
            raise ValueError(f"Pruner: criterion {self.criterion.name!r} needs data; pass data=batches of inputs")
        self._views = LinearViews(model)
        selection = select_linears(self._views.model(), filter_fn)
        self._plan = Plan.build(
            self._views.model(), selection.selected, self.config.granularity, self.config.scope, self.config.densities,
            self.config.floor,
        )  # fmt: skip
        check_floor(self.criterion, self.config.floor)
        self.data = calibration_data(data, model, tokenizer, "Pruner") if self.criterion.needs_data else data
        self._plan.check_sparsity(1 - self.config.schedule.final_density)
        self._skipped = {**selection.skipped, **self._plan.skipped}
        self._names = self._plan.layers
        held = dict(model.named_modules())
        hidden = [name for name in self._names if not isinstance(held.get(name), nn.Linear)]
        if hidden and self.config.value_dtype != "float32":
            raise ValueError(
                f"Pruner: value_dtype={self.config.value_dtype!r} rounds the model's Linears while it trains, got "
                f"{hidden[0]}, which another weight hides; call expose_linears_(model) and "
                "sparseprune.nn.matrices.unpack_(model) first"
            )
        self._masks: dict[str, Tensor] = {}
        self._behind: dict[str, Tensor] = {}
        self._steps = 0
        self._frozen = False
        self._finalized = False
        self._density = 1.0
        self._optimizer: Optimizer | None = None
        self._given: Any = None
        self._hook: Any = None

    @property
    def steps(self) -> int:
        """How often :meth:`step` was called."""
        return self._steps

    @property
    def density(self) -> float:
        """The density in use, the article's U."""
        return self._density

    @property
    def frozen(self) -> bool:
        """True once the masks are final."""
        return self._frozen

    @property
    def masks(self) -> MaskSet:
        """The masks in force; all True before the first pruning."""
        return MaskSet({fqn: self._mask(fqn, linear) for fqn, linear in self._layers().items()})

    def prepare(self, optimizer: Optimizer | None = None) -> Pruner:
        """Before the loop. optimizer: the one that trains the model; criteria that need gradients cannot do without.
        Another Pruner of some of these layers, left before its end, lets go of it, and of its rounding.
        """
        if self.criterion.needs_gradients and optimizer is None:
            raise ValueError(f"Pruner.prepare: criterion {self.criterion.name!r} needs gradients; pass the optimiser")
        self._release()
        if not self._frozen:
            put_back_(self.model, names=self._names)
        self._given, self._optimizer = optimizer, inner_of(optimizer)
        if self._optimizer is not None:
            self._take_over(self._optimizer)
            self._hook = self._optimizer.register_step_pre_hook(self._before_step)
        self._hand_over()
        return self

    def step(self) -> float:
        """After each step of the optimiser: chooses the masks anew when it is time, holds them else. Returns the
        density. Where accelerate's optimiser only gathers gradients (``accelerator.accumulate``) it does nothing.

        Raises RuntimeError after :meth:`finalize`.
        """
        if self._finalized:
            raise RuntimeError("Pruner.step: the pruner is finalized; make a new one to prune further")
        if self.criterion.needs_gradients and self._optimizer is None:
            raise RuntimeError("Pruner.step: call prepare(optimizer) first, also after copying or unpickling")
        if accumulates(self._given):
            return self._density
        self._steps += 1
        config = self.config
        inside = self._steps - config.begin
        if not self._frozen and inside >= 1 and ((inside - 1) % config.every == 0 or self._steps >= config.end):
            progress = inside / (config.end - config.begin)
            self._choose(config.schedule.density(progress), final=self._steps >= config.end)
        else:
            self._hold(besides=self._held(self._optimizer))
        return self._density

    def finalize(self) -> nn.Module:
        """Ends pruning at the final density, lets go of the optimiser, and returns the model with its hard zeros."""
        if not self._finalized:
            if not self._frozen:
                self._choose(self.config.schedule.final_density, final=True)
            self._hold()
            self._release()
            self._behind.clear()
            put_back_(self.model, names=self._names)
            self._finalized = True
        return self.model

    def report(self) -> PruneReport:
        """The masks in force, per layer and in all."""
        return make_report(self._views.model(), self._plan, self.masks, self._skipped, self.criterion.name)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the model's and the optimiser's own state. Tensors and plain values only."""
        return {
            "version": _VERSION,
            "steps": self._steps,
            "frozen": self._frozen,
            "finalized": self._finalized,
            "density": self._density,
            "criterion_name": self.criterion.name,
            "granularities": granularities(self._plan),
            "masks": {fqn: mask.clone() for fqn, mask in self._masks.items()},
            "behind": {fqn: values.clone() for fqn, values in self._behind.items()},
            "criterion": self.criterion.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where :meth:`state_dict` was taken; load the model and the optimiser first.

        ValueError on another version or criterion, on layers that are not those of this model, and on masks that are
        final under another density, granularity or choice of layers.
        """
        if state.get("version") != _VERSION:
            raise ValueError(f"Pruner: state of version {_VERSION} expected, got {state.get('version')!r}")
        if state["criterion_name"] != self.criterion.name:
            raise ValueError(
                f"Pruner: state of criterion {self.criterion.name!r} expected, got {state['criterion_name']!r}"
            )
        check_frozen(state, self._plan, self.config.schedule.final_density)
        layers = self._layers()
        for what in ("masks", "behind"):
            for fqn, tensor in state[what].items():
                if fqn not in layers or layers[fqn].weight.shape != tensor.shape:
                    raise ValueError(f"Pruner: {what} of {fqn!r} {list(tensor.shape)} fit no layer of this model")
        first = next(iter(layers.values())).weight.device
        self.criterion.load_state_dict(moved(state["criterion"], lambda value: value.to(first)))
        self._steps, self._frozen, self._finalized = state["steps"], state["frozen"], state["finalized"]
        self._density = state["density"]
        device = {fqn: linear.weight.device for fqn, linear in layers.items()}
        self._masks = {fqn: mask.to(device[fqn], copy=True) for fqn, mask in state["masks"].items()}
        self._behind = {fqn: values.to(device[fqn], copy=True) for fqn, values in state["behind"].items()}
        self._hold()
        if self._frozen and not self._finalized:
            self._simulate()
        else:
            put_back_(self.model, names=self._names)
        self._hand_over()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_optimizer": None, "_given": None, "_hook": None}

    def _layers(self) -> dict[str, nn.Linear]:
        return linears_of(self._views.model(), self._names, self._masks)

    def _mask(self, fqn: str, linear: nn.Linear) -> Tensor:
        mask = self._masks.get(fqn)
        return torch.ones_like(linear.weight, dtype=torch.bool) if mask is None else mask

    def _dense(self, fqn: str, linear: nn.Linear) -> Tensor:
        """The weight with the values behind its zeros."""
        weight = linear.weight.detach()
        return weight + self._behind[fqn] if fqn in self._behind else weight

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """args: of the step, the optimiser itself first. Where the step is given a closure the gradients are made
        inside of it: they are masked at each call, and shown to the criterion at the first, where the step begins.
        """
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):  # an optimiser of one's own may have another first argument
            self._see(optimizer)
            return None
        first = True

        def seen() -> Any:
            nonlocal first
            loss = closure()
            self._see(optimizer, first)
            first = False
            return loss

        return ((args[0], seen, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": seen})

    @torch.no_grad()
    def _see(self, optimizer: Optimizer, show: bool = True) -> None:
        """Shows the gradients to the criterion and masks them."""
        layers = self._layers()
        found = {fqn: self._views.gradient(linear) for fqn, linear in layers.items()}
        gradients: dict[str, Tensor] = {fqn: grad for fqn, grad in found.items() if grad is not None}
        if show and self.criterion.needs_gradients and not self._frozen and not skips(optimizer):
            observed = unscaled(gradients, optimizer)
            self.criterion.observe({fqn: self._dense(fqn, layers[fqn]) for fqn in observed}, observed)
        held = self._held(optimizer)
        for fqn, gradient in gradients.items():
            if fqn in self._masks and fqn not in held:
                ops.apply_mask_(gradient, self._masks[fqn])

    @torch.no_grad()
    def _choose(self, density: float, final: bool) -> None:
        self._density = density
        if density >= 1 and not final:
            return
        # What the optimiser moved behind the mask is no weight: the values there are those put aside.
        self._hold()
        layers = self._layers()
        weights = {fqn: self._dense(fqn, linear) for fqn, linear in layers.items()}
        sparsity = 1 - density
        mode = self._mode()
        processes = Processes(self._group, active=mode == "replicated")
        shards = Processes(self._group, active=mode == "sharded")
        context = PruneContext(
            self._views.model(), layers, weights, self._plan, sparsity, self.data, shards.sum_
        )
        kind = next(iter(layers.values())).weight.device.type
        with torch.autocast(kind, enabled=False):  # the user's, which would round what is measured and compared
            if type(self.criterion).masks is Criterion.masks:
                scores = self.criterion.scores(context)
                if mode == "replicated":  # equal to the bit everywhere, so the masks are
                    scores = {fqn: scores[fqn].detach().float().clone() for fqn in self._names}
                    processes.mean_(scores.values())
                selector = DistributedSelector(self._group) if mode == "sharded" else Selector()
                self._masks = self._plan.masks(scores, sparsity, selector)
            else:
                self._masks = dict(self.criterion.masks(context))
                weights = {fqn: self._dense(fqn, linear) for fqn, linear in layers.items()}
        processes.check_masks(self._masks, 'Pruner (distributed="sharded" is for parts of a model)')
        for fqn, linear in layers.items():
            mask = self._masks[fqn]
            if not final:  # before the weight is written, for the first time the two are one tensor
                self._behind[fqn] = weights[fqn].masked_fill(mask, 0)
            linear.weight.copy_(weights[fqn])
            ops.apply_mask_(linear.weight, mask)
        if final:
            self._frozen = True
            self._behind.clear()
            trim_(layers, self._plan, sparsity)
            if mode != "sharded" and sparsity < 1:  # a shard alone says nothing about its layer
                warn_starved("Pruner", self._plan, {f: (int(m.sum()), m.numel()) for f, m in self._masks.items()})
            self._simulate()
        self._hand_over()

    def _simulate(self) -> None:
        """What cannot be rounded stays exact here as it does under ``sparsify_``."""
        if self.config.value_dtype != "float32":
            simulate_(self.model, self._names, self.config.value_dtype, self.config.activations)

    @torch.no_grad()
    def _hold(self, besides: Collection[str] = ()) -> None:
        for fqn, linear in self._layers().items():
            if fqn in self._masks and fqn not in besides:
                ops.apply_mask_(linear.weight, self._masks[fqn])

    def _held(self, optimizer: Optimizer | None) -> set[str]:
        """The layers whose zeros this optimiser holds itself; others may be another optimiser's."""
        if not isinstance(optimizer, AdamW):
            return set()
        masked = optimizer.masks()
        return {fqn for fqn, linear in self._layers().items() if self._views.owner(linear) in masked}

    def _hand_over(self) -> None:
        if isinstance(self._optimizer, AdamW) and self._masks:
            own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
            layers = self._layers()
            masks = self._views.held_masks({layers[fqn]: mask for fqn, mask in self._masks.items()})
            self._optimizer.set_masks({p: mask for p, mask in masks.items() if id(p) in own})

    def _take_over(self, optimizer: Optimizer) -> None:
        """Lets the optimiser forget whoever held these layers: their gradients would be masked by two."""
        mine = nn.ModuleList(self._layers().values())
        for hook in list(optimizer._optimizer_step_pre_hooks.values()):
            other = getattr(hook, "__self__", None)
            if not isinstance(other, Pruner):
                continue
            theirs = other._layers()
            if shared_with(mine, [(fqn, linear.weight) for fqn, linear in theirs.items()]):
                owners = {other._views.owner(linear) for linear in theirs.values()}
                if isinstance(optimizer, AdamW):
                    optimizer.set_masks({p: None for p in optimizer.masks() if p in owners})
                other._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._optimizer = self._given = None

    def _mode(self) -> str:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self._distributed == "auto":
            return "replicated" if ready and torch.distributed.get_world_size(self._group) > 1 else "off"
        return self._distributed
