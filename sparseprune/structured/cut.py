"""Lines of a weight, cut out for real; the module's own sizes follow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.masked import MaskedLinear
from .units import HEAD_COUNTS, WIDTHS, AttentionBlock, FeedForward, Share

__all__ = [
    "Uncut", "alive_units", "cut_lines", "cut_neurons", "cut_units", "kept_units", "put_weight", "set_heads",
    "weight_of",
]  # fmt: skip


def _matrix(model: nn.Module, fqn: str) -> nn.Linear | nn.Embedding:
    found = model.get_submodule(fqn)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise ValueError(f"{fqn!r} expected to be an nn.Linear, got {type(found).__name__}; densify_ the model first")
    return found


def weight_of(model: nn.Module, fqn: str) -> Tensor:
    return _matrix(model, fqn).weight.detach()


def alive_units(model: nn.Module, share: Share, units: int) -> Tensor:
    """bool `[units]`: the units with any weight left in this share."""
    used = weight_of(model, share.layer).ne(0).any(1 - share.dim)
    return used[share.lines(units)].any(1)


def kept_units(alive: Tensor) -> Tensor:
    kept = alive.nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=alive.device)


def cut_units(model: nn.Module, block: AttentionBlock, keep: Tensor) -> None:
    """Cuts an attention down to the units ``keep``; a bias that several share is cut with the first of them."""
    for share in (*block.shares, *([block.bias] if block.bias else [])):
        lines = share.lines(block.units)
        if weight_of(model, share.layer).shape[share.dim] == lines.numel():
            cut_lines(model, share, lines, keep)
    set_heads(model.get_submodule(block.name), block, len(keep))


def cut_neurons(model: nn.Module, block: FeedForward, keep: Tensor) -> None:
    """Cuts a feed-forward block down to the neurons ``keep``."""
    for share in block.shares:
        cut_lines(model, share, share.lines(block.neurons), keep)


def cut_lines(model: nn.Module, share: Share, lines: Tensor, keep: Tensor) -> None:
    """``lines`` of all units `[units, width]`; those of ``keep`` stay, in their order."""
    module = _matrix(model, share.layer)
    left = lines[keep.to(lines.device)].flatten().sort().values.to(module.weight.device)
    bias = module.bias if isinstance(module, nn.Linear) and share.dim == 0 else None
    weight = module.weight.detach().index_select(share.dim, left)
    mask = module.mask.index_select(share.dim, left) if isinstance(module, MaskedLinear) else None
    put_weight(module, weight, None if bias is None else bias.detach()[left], mask)


def put_weight(module: nn.Module, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> None:
    """A weight of another size, and where it has them a bias and a mask: as given, else zeros, and all kept."""
    assert isinstance(module, nn.Linear | nn.Embedding)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
        return
    module.out_features, module.in_features = weight.shape
    if isinstance(module, MaskedLinear):
        module.mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    if module.bias is not None and len(module.bias) != len(weight):
        bias = module.bias.new_zeros(len(weight)) if bias is None else bias
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=module.bias.requires_grad)


def set_heads(module: nn.Module, block: AttentionBlock, units: int) -> None:
    heads, left = block.heads, units * block.queries
    sizes = [(name, heads, left) for name in HEAD_COUNTS]
    sizes += [(name, heads * block.head_dim, left * block.head_dim) for name in WIDTHS]
    sizes += [("num_key_value_heads", block.units, units)]
    for name, before, after in sizes:
        if getattr(module, name, None) == before:
            setattr(module, name, after)
    if block.from_config:
        config: Any = module.config
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = left, units, block.head_dim


class Uncut:
    """What blocks are before a cut, to bring them back: the very parameters, the sizes and the numbers of heads."""

    def __init__(self, model: nn.Module, blocks: Iterable[AttentionBlock | FeedForward]) -> None:
        held: dict[int, Any] = {}
        for block in blocks:
            bias = block.bias if isinstance(block, AttentionBlock) else None
            for name in (block.name, *block.layers, *([bias.layer] if bias else [])):
                module = model.get_submodule(name)
                for one in (module, getattr(module, "config", None)):
                    if hasattr(one, "__dict__"):
                        held[id(one)] = one
        dicts = [vars(one) for one in held.values()]
        dicts += [own[part] for own in dicts for part in ("_parameters", "_buffers") if part in own]
        self._held = [(own, dict(own)) for own in dicts]

    def restore(self) -> None:
        for own, before in self._held:
            own.clear()
            own.update(before)
