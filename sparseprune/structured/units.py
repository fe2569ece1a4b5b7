"""What a head or a neuron owns: the blocks of a model that can be cut, and their lines in its weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["HEAD_COUNTS", "HEAD_SIZES", "WIDTHS", "AttentionBlock", "FeedForward", "Share", "head_groups", "units_of"]

# Names under which attentions keep how many heads they have, how wide one is, and how wide all are.
HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim")
WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim")


@dataclass(frozen=True)
class Share:
    """What every unit owns of one weight: along ``dim`` (0 rows, 1 columns), for each width w of ``widths``, w lines of
    a segment of units * w; the segments lie one after the other.
    """

    layer: str
    dim: int
    widths: tuple[int, ...]

    def lines(self, units: int) -> Tensor:
        """int64 `[units, sum(widths)]`: the lines of each unit."""
        found, start = [], 0
        for width in self.widths:
            found.append(start + torch.arange(units * width).view(units, width))
            start += units * width
        return torch.cat(found, 1)

    def units(self, size: int) -> int | None:
        """How many units give ``size`` lines; None where they would not be whole."""
        return None if size % sum(self.widths) else size // sum(self.widths)


@dataclass(frozen=True)
class AttentionBlock:
    """One attention. ``units`` groups of ``queries`` query heads share one key/value head (one head each without
    grouping); every head is ``head_dim`` wide. ``shares``: what a unit owns of the Linears, ``output`` the last.

    ``bias``: its column of an Embedding of position biases. ``tied``: blocks with one name here read one bias and must
    keep the same units. ``from_config``: the number of heads is read from the configuration at every call.
    """

    name: str
    shares: tuple[Share, ...]
    units: int
    queries: int
    head_dim: int
    bias: Share | None = None
    tied: str = ""
    from_config: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(share.layer for share in self.shares)

    @property
    def output(self) -> str:
        return self.shares[-1].layer

    @property
    def heads(self) -> int:
        return self.units * self.queries


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block of ``neurons``: their rows in the expanding Linears (one, or gate and up, or both in one),
    their columns in ``down``, the last of ``shares``.
    """

    name: str
    shares: tuple[Share, ...]
    neurons: int

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(share.layer for share in self.shares)

    @property
    def down(self) -> str:
        return self.shares[-1].layer


def head_groups(blocks: Iterable[AttentionBlock]) -> list[list[AttentionBlock]]:
    """The blocks, those that are tied together in one list."""
    groups: dict[str, list[AttentionBlock]] = {}
    for block in blocks:
        groups.setdefault(block.tied or f" {block.name}", []).append(block)
    return list(groups.values())


def units_of(block: AttentionBlock | FeedForward) -> int:
    """How many units a block has: groups of heads, or neurons."""
    return block.units if isinstance(block, AttentionBlock) else block.neurons
