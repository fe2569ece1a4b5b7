"""The gates: scores on groups of weights, the exact masks they give, and the straight-through gradient back to the
scores.

Between steps the model's parameters hold the masked weights, so that whoever looks at the model sees what is in use.
The unmasked weights live beside them (``masters``): a weight whose gate closes keeps its value and can return until
the freeze.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..pruning.batches import moved
from ..pruning.compensation import Compensation
from ..pruning.criteria import PruneContext, magnitude
from ..pruning.granularity import NM, Block, Element, Mixture
from ..pruning.plan import Plan
from ..pruning.prune import trim_, warn_starved
from .config import DistillConfig, criterion_of
from .lowrank import LowRankLinear, execute_, with_low_rank_

__all__ = ["Gates", "check_plan"]


def check_plan(plan: Plan, config: DistillConfig) -> None:
    """ValueError where the granularity of all layers keeps another density than the schedule, or none can give up
    weights for a low-rank term that is asked for.
    """
    fixed = [part.granularity for part in plan.parts if isinstance(part.granularity, NM)]
    if len(fixed) == len(plan.parts):
        for pattern in fixed:
            if not math.isclose(pattern.n / pattern.m, config.final_density, abs_tol=1e-9):
                raise ValueError(
                    f"{pattern!r} keeps {pattern.n / pattern.m:g}, the schedule ends at {config.final_density:g}; "
                    f"use a schedule such as CubicSchedule({pattern.n / pattern.m:g})"
                )
    wants = config.compensation == "low_rank"
    if wants and not any(name and _free(plan, name) is not None for name in plan.layers):
        raise ValueError(
            'compensation="low_rank" takes single weights or blocks off the mask, expected a layer of granularity '
            f'"element" or Block, got {config.granularity!r}; use "survivors"'
        )


def _free(plan: Plan, name: str) -> Element | Block | None:
    kind = next(part.granularity for part in plan.parts if name in part.layers)
    if isinstance(kind, Mixture) and isinstance(kind.first, Block):
        kind = kind.then
    return kind if isinstance(kind, Element | Block) else None


class Gates:
    """Masters, scores and masks of the pruned Linears. Scores: float32, one a unit of the granularity, by unit map."""

    def __init__(self, model: nn.Module, linears: dict[str, nn.Linear], config: DistillConfig):
        self.model, self.config, self.linears = model, config, dict(linears)
        self.plan = Plan.build(model, linears, config.granularity, config.scope, floor=config.floor)
        self.maps = {unit_map.key: unit_map for unit_map in self.plan.unit_maps}
        self.weights: dict[str, Tensor] = {name: linears[name].weight for name in self.plan.layers}
        self.masters = {name: nn.Parameter(w.detach().clone()) for name, w in self.weights.items()}
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        device = next(iter(self.weights.values())).device
        self.scores = {
            key: nn.Parameter(torch.zeros(m.shape, dtype=torch.float32, device=device)) for key, m in self.maps.items()
        }
        self.criterion = criterion_of("Gates", config.method)
        self.seen: dict[str, Tensor] = {}  # the dense gradients of this step that the criterion is to observe
        check_plan(self.plan, config)
        self.frozen = False
        self.low_rank: dict[str, LowRankLinear] = {}

    def free(self, name: str) -> Element | Block | None:
        """The granularity of a layer from whose mask any number of units may be taken (of blocks and a second stage in
        them, that stage); None where a pattern, a head or a neuron would break.
        """
        return _free(self.plan, name)

    @property
    def total(self) -> int:
        return sum(w.numel() for w in self.weights.values())

    @property
    def kept(self) -> int:
        """Weights kept, the parameters of low-rank terms included."""
        factors = sum(layer.factors for layer in self.low_rank.values())
        return sum(int(mask.count_nonzero()) for mask in self.masks.values()) + factors

    def _reduce(self, dense: dict[str, Tensor]) -> dict[str, Tensor]:
        """Per-weight values `[N, K]` by layer -> sums over each unit, by unit map."""
        return {
            key: unit_map.reduce({name: dense[name] for name in unit_map.layers}) for key, unit_map in self.maps.items()
        }

    @torch.no_grad()
    def start_scores(self, norms: dict[str, Tensor]) -> None:
        """Learned scores begin as places in [0, 1] by |W| * ||x||_2, over all units of a kind or within each map, as
        the scope says.
        """
        importance = self._reduce({name: magnitude(w).float() * norms[name] for name, w in self.masters.items()})
        for part in self.plan.parts:
            keys = [unit_map.key for unit_map in part.maps]
            flat = [importance[key].reshape(-1) for key in keys]
            if self.config.scope == "global":
                places = list(_places(torch.cat(flat)).split([len(f) for f in flat]))
            else:
                places = [_places(f) for f in flat]
            for key, place in zip(keys, places):
                self.scores[key].copy_(place.view(self.scores[key].shape))

    def _scores(self, density: float) -> dict[str, Tensor]:
        """What the masks are chosen by, by unit map."""
        if self.criterion is not None:
            if density >= 1 and self.criterion.needs_gradients:  # all stay, and nothing was observed before the start
                return {key: score.detach() for key, score in self.scores.items()}
            weights = {name: w.detach() for name, w in self.masters.items()}
            layers = {name: self.linears[name] for name in weights}
            found = self.criterion.scores(PruneContext(self.model, layers, weights, self.plan, 1.0 - density))
            for name, w in weights.items():
                if name not in found or found[name].shape != w.shape:
                    got = list(found[name].shape) if name in found else "none"
                    who = f"criterion {self.criterion.name!r}"
                    raise ValueError(f"{who}: scores of {name!r} expected shape {list(w.shape)}, got {got}")
            return self._reduce({name: found[name].float() for name in weights})
        if self.config.method == "magnitude":
            return self._reduce({name: magnitude(w).float() for name, w in self.masters.items()})
        if self.config.scored:
            return {key: score.detach() for key, score in self.scores.items()}
        raise ValueError(f"Gates: method {self.config.method!r} has no scores")

    @torch.no_grad()
    def close(self, density: float, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        """Chooses the masks anew for this density and writes the masked weights into the model."""
        if self.frozen:
            return
        scores = self._scores(density)
        if noise > 0 and self.config.learned:
            for key, score in scores.items():
                uniform = torch.rand(score.shape, generator=generator).to(score).clamp(1e-6, 1 - 1e-6)
                scores[key] = score - torch.log(-torch.log(uniform)).mul(noise)
        self.masks = self.plan.unit_masks(scores, 1.0 - density)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Puts masters * mask into the model's parameters."""
        for name, weight in self.weights.items():
            weight.copy_(ops.masked_copy(self.masters[name].detach(), self.masks[name]))

    @torch.no_grad()
    def collect(self) -> None:
        """After backward: hands the masked gradients to the masters, the straight-through ones to the scores. A weight
        without a gradient, frozen or not run, gives its master none: the optimiser would decay it.

        dL/ds = sum over the unit of dL/dW' * W, with the dense gradient that the masked weight W' received.
        """
        dense: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            stepped, weight.grad = weight.grad, None
            grad = torch.zeros_like(weight) if stepped is None else stepped
            if self.criterion is not None and self.criterion.needs_gradients:
                self.seen[name] = grad.clone()
            if self.config.scored:
                dense[name] = torch.zeros_like(grad, dtype=torch.float32)
            ops.mask_gradient_(grad, self.masters[name].detach(), self.masks[name], dense.get(name))
            self.masters[name].grad = None if stepped is None else grad
        if self.config.scored:
            for key, value in self._reduce(dense).items():
                self.scores[key].grad = value.contiguous()  # as the scores lie: torch's fused Adam does not look

    @torch.no_grad()
    def step_scores(self, optimiser: torch.optim.Optimizer) -> None:
        """After :meth:`collect`, in a step that counts: learned scores take the optimiser's step; those of the movement
        criterion (Sanh et al. 2020, on units) s -= dL/ds, plain accumulation; a registered criterion observes.
        """
        if self.seen and self.criterion is not None:
            self.criterion.observe({name: self.masters[name].detach() for name in self.seen}, self.seen)
            self.seen = {}
        if self.config.learned:
            optimiser.step()
            return
        for score in self.scores.values():
            if score.grad is not None:
                score.sub_(score.grad)
                score.grad = None

    @torch.no_grad()
    def freeze(self, density: float) -> None:
        """The final masks; from here on the zeros are in the parameters and the masters are gone."""
        self.close(density)
        trim_(self.linears, self.plan, 1.0 - density)
        if self.config.rescale != 1:
            for weight in self.weights.values():
                weight.mul_(self.config.rescale)
        if density > 0:
            warn_starved("DistillPruner", self.plan, {f: (int(m.sum()), m.numel()) for f, m in self.masks.items()})
        self.frozen = True
        self.masters, self.seen = {}, {}

    @torch.no_grad()
    def compensate(self, fits: Mapping[str, Compensation]) -> None:
        """After the freeze: takes over fitted weights, smaller masks, bias shifts and low-rank terms, by layer name."""
        for name, found in fits.items():
            linear = self.linears[name]
            linear.weight.copy_(found.weight)
            self.masks[name] = found.mask.to(linear.weight.device)
            if found.bias_shift is not None:
                linear.bias.add_(found.bias_shift.to(linear.bias))
            if found.low_rank_a is not None and found.low_rank_b is not None:
                self._give_low_rank(name, found.low_rank_a, found.low_rank_b)

    def _give_low_rank(self, name: str, a: Tensor, b: Tensor) -> None:
        self.linears[name] = self.low_rank[name] = with_low_rank_(self.model, name, a, b)

    def make_low_rank(self, ranks: Mapping[str, int]) -> None:
        """Before a state is loaded: the low-rank terms that it holds, of zeros. ranks: layer name -> rank."""
        for name, rank in ranks.items():
            if name not in self.low_rank:
                rows, columns = self.weights[name].shape
                self._give_low_rank(name, torch.zeros(rank, columns), torch.zeros(rows, rank))

    def execute(self) -> None:
        """Low-rank terms move into SparseLinears, which run without these gates."""
        execute_(self.model, {name: self.free(name) for name in self.low_rank})

    def state_dict(self) -> dict[str, Any]:
        return {
            "low_rank": {name: layer.low_rank_a.shape[0] for name, layer in self.low_rank.items()},
            "masters": {name: w.detach().clone() for name, w in self.masters.items()},
            "scores": {name: s.detach().clone() for name, s in self.scores.items()},
            "masks": {name: m.clone() for name, m in self.masks.items()},
            "frozen": self.frozen,
            "criterion": {} if self.criterion is None or self.frozen else self.criterion.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies in place, so that optimisers keep their parameters; a frozen state drops the masters."""
        self.frozen = bool(state["frozen"])
        if self.frozen:
            self.masters = {}
        for name, value in state["masters"].items():
            self.masters[name].copy_(value)
        for name, value in state["scores"].items():
            self.scores[name].copy_(value)
        # A copy: what it adds to must not be the snapshot that it came from. Of one from before its first step there is
        # none: what it has seen since stays.
        if self.criterion is not None and state["criterion"]:
            device = next(iter(self.weights.values())).device
            self.criterion.load_state_dict(moved(state["criterion"], lambda value: value.to(device, copy=True)))
        self.masks = {name: value.to(self.weights[name].device, copy=True) for name, value in state["masks"].items()}


def _places(values: Tensor) -> Tensor:
    """values: `[n]`; the place of each in their order over n - 1, ties by position."""
    order = torch.argsort(values, stable=True)
    places = torch.empty_like(values)
    places[order] = torch.arange(len(values), dtype=values.dtype, device=values.device)
    return places / max(1, len(values) - 1)
