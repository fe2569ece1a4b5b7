"""A whole pruned model: each of its layers gets what serves it best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...nn.linear import SparseLinear
from ...nn.replace import replace_
from ..reading import collect_inputs
from .layer import Compensation, compensate

__all__ = ["CompensationReport", "compensate_"]


@dataclass(frozen=True)
class CompensationReport:
    """What :func:`compensate_` did: fqn -> :class:`Compensation`."""

    layers: dict[str, Compensation]

    def __str__(self) -> str:
        width = max([len(name) for name in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'chosen':<18}  error: mask  chosen  parameters / budget"]
        for name, c in self.layers.items():
            errors = f"{c.errors['mask']:11.4f}  {c.errors[c.chosen]:6.4f}"
            lines.append(f"{name:<{width}}  {c.chosen:<18}  {errors}  {c.parameters} / {c.budget}")
        return "\n".join(lines)


@torch.no_grad()
def compensate_(
    model: nn.Module,
    dense: nn.Module,
    batches: Any,
    *,
    ranks: Sequence[int] | None = None,
    rows: int = 4096,
    tokenizer: Any = None,
) -> CompensationReport:
    """Gives a pruned model back, in place, part of what pruning removed; no layer ends with more parameters than it
    had.

    model: its pruned Linears hold zeros; dense: the same architecture before pruning, left untouched; batches: what
    the models are called with, as for :func:`collect_inputs`, text with the ``tokenizer``. Each pruned Linear gets what
    served it best on held-out inputs of its own: nothing, a bias shift (where it has a bias), refitted survivors, or a
    low-rank term paid for with kept weights; then it becomes a :class:`SparseLinear` with ``low_rank_a`` and
    ``low_rank_b``. ``ranks``: those tried; ``()`` for none. ``rows``: input positions kept a layer.

    Raises ValueError where nothing is pruned or the two models differ in shape.
    """
    twins = dict(dense.named_modules())
    pruned = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not bool((module.weight != 0).all())
    }
    if not pruned:
        raise ValueError("compensate_: expected a model with pruned Linears, got none with zeros; prune it first")
    for name, linear in pruned.items():
        twin = twins.get(name)
        if not isinstance(twin, nn.Linear) or twin.weight.shape != linear.weight.shape:
            raise ValueError(f"compensate_: the dense model expected a Linear {list(linear.weight.shape)} at {name!r}")
    inputs = collect_inputs(model, pruned, batches, rows, tokenizer=tokenizer)
    results: dict[str, Compensation] = {}
    for name, linear in pruned.items():
        weight, mask = twins[name].get_parameter("weight").detach(), linear.weight != 0
        own = ranks if name else ()  # a model that is itself a Linear cannot be replaced in place
        results[name] = compensate(weight, inputs[name], mask=mask, bias_shift=linear.bias is not None, ranks=own)
    for name, found in results.items():  # only now, so that an error leaves the model as it was
        linear = pruned[name]
        linear.weight.copy_(found.weight)
        if found.bias_shift is not None:
            linear.bias.add_(found.bias_shift)
    replace_(model, {
        id(pruned[name]): SparseLinear.from_linear(pruned[name], low_rank_a=c.low_rank_a, low_rank_b=c.low_rank_b)
        for name, c in results.items() if c.low_rank_a is not None
    })  # fmt: skip
    return CompensationReport(results)
