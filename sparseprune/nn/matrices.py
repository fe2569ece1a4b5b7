"""Weights that are matrices though no Linear holds them: experts as one tensor, convolutions of pixels or patches, and
what :mod:`.expose` knows (Conv1D, the packed nn.MultiheadAttention). Given Linears, over the same memory or for good.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .expose import (
    Attention,
    conv1d_linear,
    expose_linears_,
    is_conv1d,
    linear_over,
    named_as,
    put_back_on_failure,
    refuse_save_pretrained_,
)

__all__ = ["Expert", "Experts", "PatchLinear", "shared_linears", "unpack_", "unpack_pruned_", "unpackable", "unpacking"]

_PRUNED = 0.01
_CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


class Expert(nn.Module):
    """down(act(gate x) * (up x)), gate and up in one Linear `[2 I, H]`, gate first; down `[H, I]`."""

    def __init__(self, gate_up: Tensor, down: Tensor, learns: bool, shared: bool) -> None:
        super().__init__()
        self.gate_up, self.down = linear_over(gate_up, None, learns, shared), linear_over(down, None, learns, shared)


class Experts(nn.Module):
    """A mixture's experts, each with Linears of its own: what transformers keeps as ``gate_up_proj`` `[E, 2 I, H]` and
    ``down_proj`` `[E, H, I]`.

    hidden_states: `[T, H]`; top_k_index int64 and top_k_weights `[T, k]`: the experts of each token, index E is none;
    returns `[T, H]`.
    """

    def __init__(self, packed: nn.Module, shared: bool = False) -> None:
        super().__init__()
        gate_up, down = packed.get_parameter("gate_up_proj"), packed.get_parameter("down_proj")
        self.parts = nn.ModuleList([
            Expert(gate_up[i], down[i], gate_up.requires_grad, shared) for i in range(len(gate_up))
        ])  # fmt: skip
        self.num_experts = len(gate_up)
        self.act_fn: Any = packed.act_fn
        self.train(packed.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for i in top_k_index.unique().tolist():
            if i >= self.num_experts:
                continue
            token, place = torch.where(top_k_index == i)
            expert: Any = self.parts[i]
            gate, up = expert.gate_up(hidden_states[token]).chunk(2, dim=-1)
            found = expert.down(self.act_fn(gate) * up) * top_k_weights[token, place, None]
            total.index_add_(0, token, found.to(total.dtype))
        return total


class PatchLinear(nn.Module):
    """A convolution whose windows do not overlap, as one Linear `[N, C * prod(kernel)]` over them: 1x1, or patches.

    x: `[B, C, *S]` or `[C, *S]`; returns what the convolution does.
    """

    def __init__(self, conv: nn.Module, shared: bool = False) -> None:
        super().__init__()
        assert isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self.linear = linear_over(conv.weight.flatten(1), conv.bias, conv.weight.requires_grad, shared)
        self.in_channels, self.out_channels = conv.in_channels, conv.out_channels
        self.kernel_size, self.stride = tuple(conv.kernel_size), tuple(conv.stride)
        self.train(conv.training)

    @property
    def weight(self) -> Tensor:
        """As the convolution has it, `[N, C, *kernel]`."""
        return self.linear.weight.unflatten(1, (self.in_channels, *self.kernel_size))

    @property
    def bias(self) -> Tensor | None:
        return self.linear.bias

    def forward(self, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        single = x.dim() == dims + 1
        x = x.unsqueeze(0) if single else x
        if math.prod(self.kernel_size) == 1:
            steps: Any = (..., *(slice(None, None, step) for step in self.stride))
            rows = x[steps].movedim(1, -1)
        else:
            for d, size in enumerate(self.kernel_size):  # each one that was split moves the next one on
                d = 2 + 2 * d
                x = x.narrow(d, 0, x.shape[d] // size * size).unflatten(d, (-1, size))
            places = [2 + 2 * d for d in range(dims)]
            rows = x.permute(0, *places, 1, *(d + 1 for d in places)).flatten(1 + dims)
        found = self.linear(rows).movedim(-1, 1)
        return found[0] if single else found


def _attention(module: nn.Module, shared: bool) -> Attention:
    assert isinstance(module, nn.MultiheadAttention)
    return Attention(module, shared)


def unpackable(module: nn.Module, convolutions: bool = False) -> Callable[[nn.Module, bool], nn.Module] | None:
    """What makes Linears of this module, ``make(module, shared)``; None where it is no such module, or one that would
    not compute the same.
    """
    if is_conv1d(module):
        return conv1d_linear
    if isinstance(module, nn.MultiheadAttention):
        return None if module.bias_k is not None or module.add_zero_attn else _attention
    if convolutions and type(module) in _CONVOLUTIONS:
        return PatchLinear if _apart(module) else None
    return Experts if _is_experts(module) else None


def _apart(conv: Any) -> bool:
    """Whether the windows of a convolution are apart, and all of its channels in one group."""
    kernel, stride = tuple(conv.kernel_size), tuple(conv.stride)
    windows = math.prod(kernel) == 1 or kernel == stride
    return windows and conv.groups == 1 and set(conv.dilation) == {1} and conv.padding in ((0,) * len(kernel), "valid")


def _is_experts(module: nn.Module) -> bool:
    """By structure, and where it has memory by running both forms on a few tokens."""
    held = module._parameters
    gate_up, down = held.get("gate_up_proj"), held.get("down_proj")
    if set(held) != {"gate_up_proj", "down_proj"} or gate_up is None or down is None or gate_up.dim() != 3:
        return False
    count, wide, hidden = gate_up.shape
    fits = wide % 2 == 0 and tuple(down.shape) == (count, hidden, wide // 2) and hasattr(module, "act_fn")
    if not fits or not all(p.layout is torch.strided and p.is_floating_point() for p in (gate_up, down)):
        return False
    if gate_up.is_meta or down.is_meta:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, hidden, generator=generator).to(gate_up)
    index = torch.randint(0, count, (4, 1), generator=generator).to(gate_up.device)
    weights = torch.rand(4, 1, generator=generator).to(gate_up)
    with torch.no_grad():
        try:
            expected = module(x, index, weights)
        except (TypeError, ValueError, RuntimeError):
            return False  # it is called otherwise
        return bool(torch.allclose(Experts(module, shared=True)(x, index, weights), expected, rtol=1e-2, atol=1e-3))


def unpack_(model: nn.Module, names: Collection[str] | None = None, convolutions: bool = True) -> list[str]:
    """Gives Linears to experts and, with ``convolutions``, to convolutions whose windows do not overlap, in place;
    returns the names of the modules changed. The model computes the same. names: which ones, by default all.
    """
    made: dict[int, nn.Module | None] = {}  # a module that has several names stays one
    found: dict[str, nn.Module] = {}
    for fqn, module in named_as(model, names):
        if not fqn or is_conv1d(module) or isinstance(module, nn.MultiheadAttention):
            continue
        if id(module) not in made:
            make = unpackable(module, convolutions)
            made[id(module)] = None if make is None else make(module, False)
        new = made[id(module)]
        if new is not None:
            found[fqn] = new
    for fqn, new in found.items():
        model.set_submodule(fqn, new)
    if found:
        refuse_save_pretrained_(model, "its experts or convolutions have become Linears")
    return list(found)


@contextmanager
def unpacking(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """:func:`unpack_`, undone where what runs inside fails."""
    with put_back_on_failure(model, names):
        unpack_(model, names)
        yield


def unpack_pruned_(model: nn.Module) -> list[str]:
    """Gives Linears for good to what :func:`shared_linears` showed as such and has zeros by now (1 % or more)."""
    found = [
        fqn
        for fqn, module in model.named_modules()
        if fqn and unpackable(module) is not None and _zeros(module) >= _PRUNED
    ]
    return [*expose_linears_(model, found), *unpack_(model, found, convolutions=False)] if found else []


def _zeros(module: nn.Module) -> float:
    weights = [p for p in module.parameters() if p.dim() >= 2 and not p.is_meta]
    total = sum(p.numel() for p in weights)
    return sum(int((p == 0).sum()) for p in weights) / total if total else 0.0


def shared_linears(model: nn.Module, pruned: bool = False) -> nn.Module:
    """The model with Linears in place of Conv1D, packed attention and experts, over the very memory of their weights:
    what is written to one is written to the other. The model itself is left as it is, and returned where it has none;
    modules that hold none are the same objects in both. pruned: only what :func:`unpack_pruned_` gives Linears.
    """
    made: dict[int, nn.Module] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) in made:
            return made[id(module)]
        make = unpackable(module)
        if make is not None and not (pruned and _zeros(module) < _PRUNED):
            found = make(module, True)
        else:
            children = {name: None if child is None else twin(child) for name, child in module._modules.items()}
            found = module
            if any(mine is not child for mine, child in zip(children.values(), module._modules.values())):
                found = object.__new__(type(module))
                # Hooks that are put on the twin are not to stay on the module.
                found.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
                found.__dict__["_modules"] = children
                if isinstance(found, nn.TransformerEncoder):
                    found.use_nested_tensor = False
        made[id(module)] = found
        return found

    alone = not isinstance(model, nn.Module) or unpackable(model) is not None  # select_linears says what is wrong
    return model if alone else twin(model)
