"""What moves the weights and the scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..optim import AdamW
from .config import DistillConfig
from .gates import Gates

__all__ = ["Optimisers"]


@dataclass(frozen=True)
class Optimisers:
    """``weights``: AdamW on masters and all other parameters, after the freeze sp.AdamW, which holds the zeros;
    ``scores``: Adam without decay. ``trained``: the parameters of the former.
    """

    weights: torch.optim.Optimizer
    scores: torch.optim.Optimizer
    trained: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, gates: Gates, config: DistillConfig, lr: float) -> Optimisers:
        pruned = {id(w) for w in gates.weights.values()}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in pruned]
        decayed = [p for p in others if p.dim() > 1]
        plain = [p for p in others if p.dim() <= 1]
        own = list(gates.weights.values() if gates.frozen else gates.masters.values())
        groups = [
            {"params": own + decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
        weights: torch.optim.Optimizer
        if gates.frozen:
            masks = {gates.weights[name]: mask for name, mask in gates.masks.items()}
            weights = AdamW(groups, lr=lr, masks=masks)
        else:
            fused = all(p.is_floating_point() for p in trained)
            weights = torch.optim.AdamW(groups, lr=lr, fused=fused)
        scores = torch.optim.Adam(gates.scores.values(), lr=config.scores_lr, fused=True)
        return cls(weights, scores, trained)

    def zero_grad(self) -> None:
        self.weights.zero_grad(set_to_none=True)
        self.scores.zero_grad(set_to_none=True)

    def set_rates(self, weights: float, scores: float) -> None:
        for group in self.weights.param_groups:
            group["lr"] = weights
        for group in self.scores.param_groups:
            group["lr"] = scores

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.state_dict(), "scores": self.scores.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights.load_state_dict(state["weights"])
        self.scores.load_state_dict(state["scores"])
