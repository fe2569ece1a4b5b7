"""Reconstruction of a pruned block: the weights that are left, trained for minutes to give the dense block's outputs.

The layers of a pruned block are each the best for their own inputs; trained together, one makes up for another's error
and for what the blocks before let through. The target is what the dense block makes of the dense model's hidden
states, the input what the pruned model hands on. The masks stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .choosing import row_slices
from .store import Shelf, Shelved, SpilledMatrix
from .task import BlockTask

__all__ = ["fast_bfloat16", "reconstruct"]

BETAS = (0.9, 0.95)
WARMUP = 4
SLICE = 2**18  # numbers of a moment that are in memory at a time where they are spilled


def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32: a CPU with AMX, a GPU with the type."""
    if device.type == "cpu":
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())  # private in torch: where it is gone, no
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class _Adam:
    """Adam on the kept entries of one weight, run from the hook that sees its gradient, so that one gradient is held
    at a time. rate: of a step, as a share of the root mean square of the kept weights; spill: the folder of the
    moments, some rows of which are then in memory at a time.
    """

    def __init__(self, parameter: Tensor, fqn: str, masks: Mapping[str, Tensor], rate: float, spill: Path | None):
        self.parameter, self.fqn, self.masks = parameter, fqn, masks
        self.value = parameter.detach().float()  # the weight itself where it is float32
        kept = max(1, int(torch.count_nonzero(masks[fqn])))
        self.rate = rate * float(self.value.norm()) / math.sqrt(kept)
        self.mean, self.square = (SpilledMatrix.of(torch.zeros_like(self.value), spill) for _ in range(2))

    def step(self, gradient: Tensor, number: int, scale: float) -> None:
        """number: of this step, from 1; scale: of the rate. gradient `[N, K]`."""
        first, second = BETAS
        mask = self.masks[self.fqn]
        for rows in row_slices(self.value.shape, SLICE):
            part = gradient[rows] * mask[rows]
            part = part.float()
            mean = self.mean[rows].lerp_(part, 1 - first)
            self.mean[rows] = mean
            square = self.square[rows].mul_(second).addcmul_(part, part, value=1 - second)
            self.square[rows] = square
            root = square.sqrt_().mul_((1 - second**number) ** -0.5).add_(1e-12)
            self.value[rows].addcdiv_(mean, root, value=-scale * self.rate / (1 - first**number))
        if self.value.data_ptr() != self.parameter.data_ptr():
            self.parameter.detach().copy_(self.value)

    def close(self) -> None:
        self.mean.close()
        self.square.close()


class _Rounded:
    """Stands for a rounded copy of a weight that a product would keep for its gradient: made again when needed."""

    def __init__(self, weight: Tensor, like: Tensor) -> None:
        self.weight, self.dtype, self.flipped = weight, like.dtype, not like.is_contiguous()

    def made(self) -> Tensor:
        rounded = self.weight.detach().to(self.dtype)
        return rounded.t() if self.flipped else rounded

    @classmethod
    def instead(cls, saved: Tensor, weights: list[Tensor]) -> Tensor | _Rounded:
        """saved itself, unless it holds what rounding one of the weights `[N, K]` gives, or its transpose."""
        if saved.dim() == 2 and (saved.is_contiguous() or saved.t().is_contiguous()):
            for weight in weights:
                if saved.dtype != weight.dtype and saved.numel() == weight.numel():
                    found = cls(weight, saved)
                    made = found.made()
                    if made.stride() == saved.stride() and torch.equal(made, saved):
                        return found
        return saved


def _unpacked(saved: Tensor | _Rounded | Shelved) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.made()


def reconstruct(task: BlockTask, masks: Mapping[str, Tensor], *, epochs: int, rate: float) -> None:
    """Trains task.linears on their masks for epochs over the chunks, one step of Adam a chunk, cosine decay to 0.

    rate: of the first steps, relative to the root mean square of each layer's kept weights. The products run in
    bfloat16 where that is faster (`fast_bfloat16`), weights and moments are float32. With a folder in task.spill the
    moments and the larger tensors that a backward pass needs wait there. Needs task.target.
    """
    assert task.target is not None
    chunks = len(task.student)
    steps = epochs * chunks
    parameters = {fqn: task.linears[fqn].weight for fqn in masks}
    device = next(iter(parameters.values())).device
    optimizers = [_Adam(parameter, fqn, masks, rate, task.spill) for fqn, parameter in parameters.items()]
    weights = [parameter.detach() for parameter in parameters.values()]
    resident = {p.data_ptr() for p in task.module.parameters()}
    shelf = None if task.spill is None else Shelf(task.spill)
    number = 0

    def kept(saved: Tensor) -> Tensor | _Rounded | Shelved:
        """What autograd holds in the place of a tensor that a gradient needs."""
        found = _Rounded.instead(saved, weights)
        if shelf is None or not isinstance(found, Tensor) or found.data_ptr() in resident:
            return found
        return shelf.put(found)

    def hook(optimizer: _Adam) -> Callable[[Tensor], None]:
        def update(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            scale = min(1.0, number / WARMUP) * 0.5 * (1 + math.cos(math.pi * (number - 1) / steps))
            with torch.no_grad():
                assert gradient is not None
                optimizer.step(gradient, number, scale)

        return update

    order = torch.Generator().manual_seed(task.index)
    with ExitStack() as stack:
        if shelf is not None:
            stack.callback(shelf.close)
        for optimizer in optimizers:
            stack.callback(optimizer.close)
        for parameter in task.module.parameters():
            stack.callback(_restore, parameter, parameter.requires_grad, parameter.grad)
            parameter.grad = None
            parameter.requires_grad_(False)
        for optimizer in optimizers:
            optimizer.parameter.requires_grad_(True)
            handle = optimizer.parameter.register_post_accumulate_grad_hook(hook(optimizer))
            stack.callback(handle.remove)
        for _ in range(epochs):
            for chunk in torch.randperm(chunks, generator=order).tolist():
                number += 1
                with torch.enable_grad(), saved_tensors_hooks(kept, _unpacked):
                    with torch.autocast(
                        device.type, dtype=torch.bfloat16, enabled=fast_bfloat16(device), cache_enabled=False
                    ):
                        output = task.run(task.student[chunk], chunk)
                    target = task.target[chunk]
                    real = task.capture.positions[chunk].of_module(task.name, target)
                    error = _error(output, target, real)
                    del output, target
                    if error.requires_grad:  # not where the chunk reaches none of them, as of experts
                        error.backward()
                if shelf is not None:
                    shelf.clear()


def _error(output: Tensor, target: Tensor, positions: Tensor | None) -> Tensor:
    """Mean square of the difference at the real positions, as a share of the target's; output, target `[B, S, D]`."""
    if positions is not None and positions.shape == target.shape[:-1]:
        output, target = output[positions], target[positions]
    tiny = torch.finfo(torch.float32).tiny
    return (output.float() - target.float()).square().mean() / target.float().square().mean().clamp_min(tiny)


def _restore(parameter: Tensor, requires_grad: bool, gradient: Tensor | None) -> None:
    parameter.requires_grad_(requires_grad)
    parameter.grad = gradient
