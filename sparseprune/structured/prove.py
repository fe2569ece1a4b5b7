"""Cuts that are kept only where they are proven: the block alone, and the model as a whole, compute the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from .alone import REMEDY, alone
from .cut import Uncut, cut_neurons, cut_units
from .units import AttentionBlock, FeedForward, units_of
from .whole import WholeModel

__all__ = ["Cut", "cut_proven"]

#: Blocks that are cut together or not at all, with the units that each keeps.
Cut: TypeAlias = list[tuple[Any, Tensor]]


def cut_proven(model: nn.Module, cuts: Sequence[Cut]) -> dict[str, str]:
    """Cuts the blocks for which that changes no output; name -> why not of the others, which are as before.

    Nothing but the outputs themselves says it: a block alone, on hidden states drawn at random, and the whole model on
    random inputs, which shows what a block is handed by others. A block that runs in neither is not cut.
    """
    left: dict[str, str] = {}
    proven: set[str] = set()
    hopeful = []
    for cut in cuts:
        said = {block.name: alone(model, block, keep) for block, keep in cut if len(keep) < units_of(block)}
        proven |= {name for name, why in said.items() if why == ""}
        failed = {name: why for name, why in said.items() if why}
        if failed:
            _leave(left, cut, *next(iter(failed.items())))
        else:
            hopeful.append(cut)
    if not hopeful:
        return left
    whole = WholeModel(model, {block.shares[-1].layer for cut in hopeful for block, _ in cut})
    tried = []
    for cut in hopeful:
        unknown = [b.name for b, keep in cut if b.name not in proven and b.shares[-1].layer not in whole.reached]
        if any(name in unknown for name in (b.name for b, keep in cut if len(keep) < units_of(b))):
            for block, _ in cut:
                left[block.name] = (
                    f"whether it computes the same with units cut out cannot be tried: expected {unknown[0]} to run on "
                    "hidden states alone, or the model on inputs drawn at random; give its forward defaults for what "
                    "is not hidden states"
                )
        else:
            tried.append(cut)
    # Rounding to 16 bits says nothing against blocks that alone are the same in 32.
    values = whole.exact or any(block.name not in proven for cut in tried for block, _ in cut)
    before = [_cut(model, cut) for cut in tried]
    if whole.differs(values):
        for uncut in reversed(before):
            uncut()
        for cut in tried:
            uncut = _cut(model, cut)
            why = whole.differs(whole.exact or any(block.name not in proven for block, _ in cut))
            if why:
                uncut()
                _leave(left, cut, cut[0][0].name, why)
    return left


def _cut(model: nn.Module, cut: Cut) -> Callable[[], None]:
    """Cuts, and returns what takes it back."""
    before = Uncut(model, [block for block, _ in cut])
    for block, keep in cut:
        if len(keep) < units_of(block):
            (cut_units if isinstance(block, AttentionBlock) else cut_neurons)(model, block, keep)
    return before.restore


def _leave(left: dict[str, str], cut: Cut, name: str, why: str) -> None:
    for block, _ in cut:
        what = "neurons are" if isinstance(block, FeedForward) else "heads are"
        whose = "its" if block.name == name else f"that of {name}, which goes with it,"
        forward = f"{whose} forward does not follow when {what} cut out"
        left[block.name] = f"{forward}: expected what it gave with them zeroed, got {why}; {REMEDY}"
