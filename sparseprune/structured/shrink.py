"""Pruned heads and neurons cut out of a model, and a fresh model brought to those sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .configure import configure, own_configurations
from .cut import alive_units, kept_units, put_weight, set_heads, weight_of
from .find import attention_blocks, feed_forwards
from .prove import Cut, cut_proven
from .units import AttentionBlock, FeedForward, Share, head_groups, units_of

__all__ = ["ShrinkReport", "restore_shapes", "shrink_"]


@dataclass
class ShrinkReport:
    """What :func:`shrink_` did: name -> (units before, units after) of each block, and the parameters of the whole
    model. ``unconfigured``: why no transformers configuration describes the new sizes; empty where one does, or where
    there is none.
    """

    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    left: dict[str, str] = field(default_factory=dict)
    unconfigured: str = ""

    def __str__(self) -> str:
        lines = [f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"]
        lines += [f"  {name}: heads {a} -> {b}" for name, (a, b) in self.heads.items()]
        lines += [f"  {name}: neurons {a} -> {b}" for name, (a, b) in self.neurons.items()]
        lines += [f"  {name}: left as it is: {why}" for name, why in self.left.items()]
        lines += [f"  save_pretrained: {self.unconfigured}"] if self.unconfigured else []
        return "\n".join(lines)


@torch.no_grad()
def shrink_(model: nn.Module) -> ShrinkReport:
    """Cuts out, in place, the heads and neurons whose output columns are all zero; the model computes the same as
    before.

    Every cut is tried: on a copy of the block with weights drawn anew, and in the whole model where inputs are found
    that it runs with. A block that does not compute the same, or cannot be tried, is as before, and ``left`` says why.

    Modules and parameter names stay, sizes change, and the number of heads is set where an attention keeps it. One unit
    of every block stays, zeroed or not, for reshapes need one. Attentions that read one position bias keep the same
    heads, and the bias loses the columns of the others. The parameters are new tensors: make the optimiser afterwards.
    :func:`restore_shapes` brings a fresh model to the shrunken sizes before a checkpoint is loaded.

    A transformers model's configuration is brought in line where it can describe the sizes (all layers alike, and a
    width of a head that does not follow from the number of heads), so that ``save_pretrained`` and ``from_pretrained``
    work; elsewhere the folder notes the sizes, and is read where sparseprune is installed. The model gets a copy of its
    configuration first, which another model may share.
    """
    report = ShrinkReport(parameters_before=sum(p.numel() for p in model.parameters()))
    attentions, reasons = attention_blocks(model)
    report.left.update(reasons)
    cuts: list[Cut] = []
    for group in head_groups(attentions):
        alive = torch.stack([alive_units(model, block.shares[-1], block.units) for block in group]).any(0)
        cuts.append([(block, kept_units(alive)) for block in group])
    cuts = _as_configured(cuts, report)
    forwards, reasons = feed_forwards(model)
    report.left.update(reasons)
    cuts += [[(f, kept_units(alive_units(model, f.shares[-1], f.neurons)))] for f in forwards]
    wanted = [cut for cut in cuts if any(len(keep) < units_of(block) for block, keep in cut)]
    if wanted:
        own_configurations(model)
        report.left.update(cut_proven(model, wanted))
    done: list[tuple[AttentionBlock, int]] = []
    for block, keep in (part for cut in cuts for part in cut if part[0].name not in report.left):
        if isinstance(block, AttentionBlock):
            report.heads[block.name] = (block.heads, len(keep) * block.queries)
            done.append((block, len(keep)))
        else:
            report.neurons[block.name] = (block.neurons, len(keep))
    report.parameters_after = sum(p.numel() for p in model.parameters())
    report.unconfigured = configure(model, done, report.neurons)
    return report


def _as_configured(cuts: list[Cut], report: ShrinkReport) -> list[Cut]:
    """Attentions that read how many heads they have from the configuration go in one cut, if they keep as many."""
    parts = [part for cut in cuts for part in cut]
    read = [(block, keep) for block, keep in parts if isinstance(block, AttentionBlock) and block.from_config]
    counts = sorted({len(keep) for _, keep in read})
    if len(counts) > 1:
        why = (
            "the configuration holds one number of heads for all layers, expected as many in each, got "
            f"{', '.join(map(str, counts))}; prune with scope='layer'"
        )
        report.left.update({block.name: why for block, _ in read})
    names = {block.name for block, _ in read}
    others = [cut for cut in cuts if cut[0][0].name not in names]
    return [*([read] if len(counts) == 1 else []), *others]


@torch.no_grad()
def restore_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Brings the weights named to the sizes given, fqn -> (out_features, in_features) of a Linear or, of an Embedding
    that holds a position bias for each head, (buckets, heads); returns the names that changed.

    New weights are zero, to be overwritten by a checkpoint. The number of heads is set where an attention keeps it, and
    in the configuration as by :func:`shrink_`. ValueError where a name is neither, or where a size is not that of a
    shrunken block of this model: what a block's weights say about its heads or neurons must be whole and agree.
    """
    changed: dict[str, tuple[int, int]] = {}
    for fqn, shape in shapes.items():
        found = dict(model.named_modules()).get(fqn)
        if not isinstance(found, nn.Linear | nn.Embedding):
            raise ValueError(
                f"restore_shapes: {fqn!r} is no Linear of {type(model).__name__}; load into the "
                "architecture it was saved from"
            )
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"restore_shapes: {fqn} expected (out_features, in_features), got {list(shape)}")
        if tuple(shape) != tuple(found.weight.shape):
            changed[fqn] = (int(shape[0]), int(shape[1]))
    heads: list[tuple[AttentionBlock, int]] = []
    neurons: list[tuple[FeedForward, int]] = []
    for group in head_groups(attention_blocks(model)[0]):
        shares = [share for block in group for share in (*block.shares, *([block.bias] if block.bias else []))]
        if any(share.layer in changed for share in shares):
            heads += [(block, _units(model, group[0].name, shares, changed, group[0].head_dim)) for block in group]
    for forward in feed_forwards(model)[0]:
        if any(share.layer in changed for share in forward.shares):
            neurons.append((forward, _units(model, forward.name, forward.shares, changed)))
    made: dict[str, tuple[int, int]] = {}
    parts = [(s, units) for block, units in heads for s in (*block.shares, *([block.bias] if block.bias else []))]
    parts += [(s, units) for forward, units in neurons for s in forward.shares]
    for share, units in parts:
        rows, columns = made.get(share.layer, tuple(weight_of(model, share.layer).shape))
        size = units * sum(share.widths)
        made[share.layer] = (rows, size) if share.dim else (size, columns)
    for fqn, wanted in changed.items():
        own = list(weight_of(model, fqn).shape)
        if made.get(fqn) != wanted:
            raise ValueError(
                f"restore_shapes: {fqn} expected {list(made.get(fqn, own))}, got {list(wanted)}, and it belongs to no "
                "block that can be shrunk so; load into the architecture it was saved from"
            )
    if made:
        own_configurations(model)
    for fqn, shape in made.items():
        put_weight(model.get_submodule(fqn), weight_of(model, fqn).new_zeros(shape))
    for block, units in heads:
        set_heads(model.get_submodule(block.name), block, units)
    configure(model, heads, {forward.name: (forward.neurons, units) for forward, units in neurons})
    return [fqn for fqn in made if fqn in changed]


def _units(
    model: nn.Module, name: str, shares: Iterable[Share], changed: Mapping[str, tuple[int, int]], head_dim: int = 0
) -> int:
    """How many units the sizes leave; ValueError unless all shares say the same."""
    said = {}
    for share in shares:
        size = changed.get(share.layer, tuple(weight_of(model, share.layer).shape))[share.dim]
        said[share.layer] = (size, share.units(size))
    found = {units for _, units in said.values()}
    if len(found) == 1 and (units := next(iter(found))):
        return units
    what = f"whole heads of {head_dim} that agree" if head_dim else "to agree"
    got = ", ".join(f"{layer} {size}" for layer, (size, _) in said.items())
    raise ValueError(f"restore_shapes: sizes of {name or 'the model'} expected {what}, got {got}")
