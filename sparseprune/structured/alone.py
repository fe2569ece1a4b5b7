"""A cut tried on a copy of the block alone: what it gives must be what the silenced block gives."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .cut import cut_neurons, cut_units, weight_of
from .units import AttentionBlock, FeedForward, Share, units_of

__all__ = ["REMEDY", "alone", "holds"]

REMEDY = (
    "to have it cut, let its forward take sizes from its Linears and its number of heads, not from its input's, and "
    "handle every unit like the others"
)
_SEVERAL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_AROUND = 2  # how many of the modules around a block are tried where it cannot be called itself


def holds(model: nn.Module, block: AttentionBlock | FeedForward, reached: Iterable[str] = ()) -> bool | None:
    """Whether the block alone computes the same with its first unit cut out as with it silenced; None where it cannot
    be called with random hidden states and nothing else, has one unit, or does not call all parts ``reached``. True on
    the meta device: there nothing can be computed, and only sizes that a file holds are asked for.
    """
    units = units_of(block)
    if units < 2:
        return None
    why = _tried(model, block, block.name, torch.arange(1, units), reached)
    return None if why is None else not why


def alone(model: nn.Module, block: AttentionBlock | FeedForward, keep: Tensor) -> str | None:
    """Why the block alone does not compute the same cut down to the units ``keep`` as with the others silenced; empty
    where it does, None where neither it nor a module around it can be called with random hidden states.
    """
    root = block.name
    for _ in range(1 + _AROUND):
        why = _tried(model, block, root, keep)
        root = root.rpartition(".")[0]
        # Around an attention that shares its bias may lie others, to be cut with it.
        if why is not None or not root or (isinstance(block, AttentionBlock) and block.tied):
            return why
    return None


@torch.no_grad()
def _tried(
    model: nn.Module, block: AttentionBlock | FeedForward, root: str, keep: Tensor, reached: Iterable[str] = ()
) -> str | None:
    """As :func:`alone`, for a copy of the module ``root``, the block's or one around it."""
    prefix = f"{root}." if root else ""
    units = units_of(block)
    shares = tuple(_below(share, prefix) for share in block.shares if share.layer.startswith(prefix))
    weight = weight_of(model, block.shares[0].layer)
    if weight.is_meta:
        return ""
    generator = torch.Generator(weight.device).manual_seed(0)
    read = block.shares[-1].lines(units)  # what the output reads of each unit
    silent = torch.ones(units, dtype=torch.bool).index_fill(0, keep.cpu(), False)
    tried: Any = replace(block, name=block.name[len(prefix) :], shares=shares)
    if isinstance(block, AttentionBlock):
        inside = block.bias and block.bias.layer.startswith(prefix)
        tried = replace(tried, bias=_below(block.bias, prefix) if block.bias and inside else None)
    try:
        silenced = copy.deepcopy(model.get_submodule(root)).float().eval()
        missed = set(reached)
        for name in reached:
            silenced.get_submodule(name).register_forward_hook(lambda *_, name=name: missed.discard(name))
        # Weights as a new model has them are too small to tell one scale of the scores from another.
        for share in shares:
            own = weight_of(silenced, share.layer)
            own.normal_(generator=generator).mul_(own.shape[1] ** -0.5)
        if isinstance(tried, AttentionBlock) and tried.bias:
            weight_of(silenced, tried.bias.layer).normal_(generator=generator)
        x = torch.randn(2, 3, weight.shape[1], generator=generator, device=weight.device)
        if len(shares) == len(block.shares):
            weight_of(silenced, shares[-1].layer)[:, read[silent].flatten().to(x.device)] = 0
        with _seeded(x):
            call, expected = _called(silenced, x, block)
        if len(shares) < len(block.shares):  # the output lies outside, as in BERT
            expected = expected[..., read[~silent].flatten().sort().values.to(x.device)]
    except Exception:
        return None
    if missed or not expected.isfinite().all():
        return None
    try:
        (cut_units if isinstance(block, AttentionBlock) else cut_neurons)(silenced, tried, keep)
        with _seeded(x):
            got = _first(silenced(x, **call))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if got.shape != expected.shape:
        return f"an output of {list(got.shape)}, not {list(expected.shape)}"
    if torch.allclose(got, expected, rtol=1e-3, atol=1e-5):
        return ""
    return f"an output that differs by {(got - expected).abs().max():.2g} of {expected.abs().max():.2g}"


@contextmanager
def _seeded(x: Tensor) -> Iterator[None]:
    """The random numbers that a forward may draw are the same in every call, and the caller's are untouched."""
    with torch.random.fork_rng([x.device.index or 0] if x.is_cuda else []):
        torch.manual_seed(0)
        yield


def _below(share: Share, prefix: str) -> Share:
    return replace(share, layer=share.layer[len(prefix) :])


def _called(module: nn.Module, x: Tensor, block: AttentionBlock | FeedForward) -> tuple[dict[str, Any], Tensor]:
    """What the block is called with beside hidden states, and what it gives: a rotation by nothing where it wants one,
    and no mask. Where None will not do for what else it wants, hidden states are tried (key and value, say).
    """
    given: dict[str, Any] = {}
    wanted = []
    for name, parameter in list(inspect.signature(module.forward).parameters.items())[1:]:
        if name == "position_embeddings":
            width = block.head_dim if isinstance(block, AttentionBlock) else x.shape[-1]
            cos = x.new_ones(1, x.shape[1], width)
            given[name] = (cos, torch.zeros_like(cos))
        elif parameter.default is parameter.empty and parameter.kind not in _SEVERAL:
            wanted.append(name)
    try:
        call = {**given, **dict.fromkeys(wanted)}
        return call, _first(module(x, **call))
    except Exception:
        if not wanted:
            raise
    call = {**given, **{name: None if "mask" in name else x for name in wanted}}
    return call, _first(module(x, **call))


def _first(out: Any) -> Tensor:
    found = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(found, Tensor):
        raise TypeError(f"expected a tensor, got {type(found).__name__}")
    return found
