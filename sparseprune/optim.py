"""Floor 5: AdamW that keeps zeros zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .device_memory import capturing

__all__ = ["AdamW"]

_STATE = ("mask", "exp_avg", "exp_avg_sq")
# Options of torch's AdamW by which a step would be another one, and what to do instead. `foreach` and `fused` are free:
# they choose among torch's ways to one result.
_OTHERS = {
    "amsgrad": "train without it, or with torch.optim.AdamW and an sp.Pruner, which holds the zeros",
    "maximize": "minimise the negative of the objective",
    "capturable": "record the forward and backward pass alone in a CUDA graph, and step after each replay",
    "differentiable": "use torch.optim.AdamW where gradients go through the step",
}


def _check_group(group: Mapping[str, Any]) -> None:
    """ValueError on a group's numbers that are out of range, and as :func:`_check_options`."""
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"AdamW: {name} expected to be at least 0, got {group[name]}")
    for i, beta in enumerate(group["betas"]):
        if not 0 <= beta < 1:
            raise ValueError(f"AdamW: betas[{i}] expected in [0, 1), got {beta}")
    _check_options(group)


def _check_options(group: Mapping[str, Any]) -> None:
    """ValueError on a group's options that ask for another step."""
    for name, remedy in _OTHERS.items():
        if group.get(name):
            raise ValueError(f"AdamW: {name} expected False or left out, got {group[name]!r}; {remedy}")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(
            "AdamW: decoupled_weight_decay expected True or left out, got False, as in Adam; set weight_decay=0, or "
            "take the group from an AdamW"
        )


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) under fixed masks: momentum and decay never move a pruned weight off zero.

    One pass over memory masks the gradient, steps and masks the weight; kept entries get what ``torch.optim.AdamW``
    gives.

    params: parameters, groups (dicts) or ``model.named_parameters()``; lr, betas, eps, weight_decay: as in
    ``torch.optim.AdamW``, a group may set its own. ``amsgrad``, ``maximize``, ``capturable`` and ``differentiable`` are
    refused in a group or a loaded state; ``foreach`` and ``fused`` change nothing.

    masks: which entries are kept, bool of the parameter's shape, True = kept.

    - a dict keyed by parameter, or by name where params are named: parameters it leaves out are not masked;
    - a list, one mask or None for each parameter in order;
    - None: the zeros present now. A parameter of two or more dimensions that holds a zero but is not all zero is held
      to its non-zero entries. Vectors are left free, for a bias may start at zero, and so is an all-zero matrix, which
      is how low-rank factors start: pass masks to hold those.

    A mask takes hold at the next step that finds a gradient: there the parameter and both moments become exactly 0
    where it is False. :meth:`set_masks` changes masks later. Masks and moments are part of ``state_dict()``, and
    loading restores them. Moments are float32 also for bfloat16 and float16 parameters.

    ValueError on lr, eps or weight_decay below 0, on betas outside [0, 1), on such an option, and as :meth:`set_masks`
    on masks; :meth:`step` raises RuntimeError on a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        masks: Mapping[Any, Tensor] | Sequence[Tensor | None] | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        _check_group(defaults)
        self._find_zeros = masks is None
        super().__init__(params, defaults)
        if masks is not None:
            self.set_masks(masks)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; where ``masks`` was None the zeros of the new parameters are found too. ValueError as for the
        constructor.
        """
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self._find_zeros:
            for p in self.param_groups[-1]["params"]:
                kept = p.detach() != 0
                if p.dim() >= 2 and bool(kept.any()) and not bool(kept.all()):
                    self.state[p]["mask"] = kept

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_find_zeros": self._find_zeros}

    def masks(self) -> dict[Tensor, Tensor]:
        """The masks in force, keyed by parameter."""
        return {p: self.state[p]["mask"] for p in self._parameters() if "mask" in self.state.get(p, {})}

    def set_masks(self, masks: Mapping[Any, Tensor | None] | Sequence[Tensor | None]) -> None:
        """Replaces the masks of the parameters named; None frees one. Keys and order as for the constructor.

        Raises ValueError on a mask of another shape or dtype and on a key that is no parameter of this optimiser.
        """
        for p, mask in self._paired(masks):
            if mask is None:
                self.state[p].pop("mask", None)
                continue
            if mask.dtype != torch.bool or mask.shape != p.shape:
                raise ValueError(
                    f"AdamW: mask expected bool of shape {list(p.shape)}, got {mask.dtype} of shape {list(mask.shape)}"
                )
            self.state[p]["mask"] = mask.detach().to(device=p.device, copy=True).contiguous()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step on every parameter that has a gradient; returns the closure's loss. RuntimeError on a sparse
        gradient, and while a CUDA graph is recorded; ValueError where a group was given an option that is refused.
        """
        for group in self.param_groups:
            _check_options(group)
        if any(map(capturing, {p.device for p in self._parameters()})):
            raise RuntimeError(
                "AdamW: step() expected outside of a CUDA graph, which would repeat this step's number and learning "
                "rate at every replay; record the forward and backward pass alone, and step after each replay"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            lr, eps, decay = float(group["lr"]), group["eps"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(
                        "AdamW: expected strided gradients, got a sparse one; use torch.optim.SparseAdam"
                    )
                state = self.state[p]
                if "exp_avg" not in state:
                    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
                    state["exp_avg"] = torch.zeros_like(p, dtype=wide)
                    state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
                    state["step"] = 0
                state["step"] = int(state["step"]) + 1
                ops.masked_adamw_(
                    p,
                    p.grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state.get("mask"),
                    state["step"],
                    lr,
                    beta1,
                    beta2,
                    eps,
                    decay,
                )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, masks and float32 moments kept as they were saved (torch alone casts them to the weights'
        dtype).

        A parameter for which nothing was saved as mask keeps the one it has. ValueError, before anything is loaded, on
        a group whose options ask for another step, as amsgrad does.
        """
        for group in state_dict["param_groups"]:
            _check_group({**self.defaults, **group})
        held = self.masks()
        super().load_state_dict(state_dict)
        for p, mask in held.items():
            self.state[p]["mask"] = mask
        numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for number, p in zip(numbers, self._parameters()):
            for key in _STATE:
                value = state_dict["state"].get(number, {}).get(key)
                if value is not None:
                    self.state[p][key] = value.detach().to(device=p.device, copy=True)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _paired(
        self, masks: Mapping[Any, Tensor | None] | Sequence[Tensor | None]
    ) -> list[tuple[Tensor, Tensor | None]]:
        parameters = self._parameters()
        if not isinstance(masks, Mapping):
            listed = cast("Sequence[Tensor | None]", masks)
            if len(listed) != len(parameters):
                raise ValueError(f"AdamW: masks expected {len(parameters)} entries, one a parameter, got {len(listed)}")
            return list(zip(parameters, listed))
        known: dict[Any, Tensor] = {p: p for p in parameters}
        for group in self.param_groups:
            known.update(zip(group.get("param_names", ()), group["params"]))
        unknown = [key for key in masks if key not in known]
        if unknown:
            shown = [key if isinstance(key, str) else f"a tensor of shape {list(key.shape)}" for key in unknown]
            raise ValueError(
                "AdamW: masks expected parameters of this optimiser as keys (or names, with named_parameters()), "
                f"got {shown}"
            )
        return [(known[key], mask) for key, mask in masks.items()]
