"""A whole pruned model: each of its layers gets what serves it best."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.copies import shared_with
from ...nn.linear import SparseLinear
from ...nn.matrices import shared_linears
from ...nn.replace import replace_
from ...nn.views import open_, trainable_twin
from ..reading import collect_inputs
from .layer import Compensation, compensate

__all__ = ["CompensationReport", "compensate_"]

_LEAST = 8  # inputs, below which compensate fits nothing


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
    ``low_rank_b``. Where kept weights or biases are not the dense model's any more, as after a criterion that refits
    them or a training, they are what is compensated. ``ranks``: those tried; ``()`` for none. ``rows``: input positions
    kept a layer.

    Conv1D (GPT-2), the packed ``nn.MultiheadAttention`` and a mixture's experts in one tensor are Linears here as in
    :func:`prune_`; those that get a low-rank term are given Linears for good, as by ``expose_linears_``.

    Raises ValueError where nothing is pruned, where fewer than eight positions reach any of it, where the two models
    differ in shape, or hold their pruned weights in one memory. Warns, naming them, of layers that fewer reach, which
    stay as they are.
    """
    if dense is model:
        raise ValueError("compensate_: dense expected the model before pruning, got the pruned model; keep a copy")
    own = trainable_twin(model, "compensate_")
    twins = dict(shared_linears(dense).named_modules())
    pruned = {
        name: module
        for name, module in own.named_modules()
        if isinstance(module, nn.Linear) and not bool((module.weight != 0).all())
    }
    if not pruned:
        sparse = any(isinstance(module, SparseLinear) for module in own.modules())
        remedy = "call it before sparsify_, or densify_ first" if sparse else "prune it first"
        raise ValueError(f"compensate_: expected a model with pruned Linears, got none with zeros; {remedy}")
    if own_memory := shared_with(dense, [(name or "(the model)", linear.weight) for name, linear in pruned.items()]):
        raise ValueError(
            "compensate_: dense expected the model before pruning, got weights that are the pruned model's own memory, "
            f"{', '.join(own_memory[:5])}; keep copy.deepcopy(model), and load it without assign=True"
        )
    for name, linear in pruned.items():
        twin = twins.get(name)
        if not isinstance(twin, nn.Linear) or twin.weight.shape != linear.weight.shape:
            raise ValueError(f"compensate_: the dense model expected a Linear {list(linear.weight.shape)} at {name!r}")
    read = collect_inputs(own, pruned, batches, rows, tokenizer=tokenizer, unreached=True)
    inputs = {name: x for name, x in read.items() if len(x) >= _LEAST}
    if few := [name or "(the model)" for name in pruned if name not in inputs]:
        more = f" and {len(few) - 10} more" if len(few) > 10 else ""
        said = f"compensate_: expected {_LEAST} inputs or more of each pruned layer, got fewer of {', '.join(few[:10])}"
        if not inputs:
            raise ValueError(f"{said}{more}; give more batches")
        warnings.warn(f"{said}{more}, which stay as they are; give more batches", stacklevel=3)
    results: dict[str, Compensation] = {}
    for name, x in inputs.items():
        linear, twin = pruned[name], cast(nn.Linear, twins[name])
        mask = linear.weight != 0
        tried = ranks if name else ()  # a model that is itself a Linear cannot be replaced in place
        weight, outputs = twin.weight.detach(), None
        if not _as_pruned(linear, twin, mask):
            weight, outputs = linear.weight.detach(), _missing(linear, twin, x)
        results[name] = compensate(
            weight, x, mask=mask, bias_shift=linear.bias is not None, ranks=tried, outputs=outputs
        )
    for name, found in results.items():  # only now, so that an error leaves the model as it was
        linear = pruned[name]
        linear.weight.copy_(found.weight)
        if found.bias_shift is not None:
            linear.bias.add_(found.bias_shift)
    low_rank = {name: found for name, found in results.items() if found.low_rank_a is not None}
    open_(model, own, low_rank)
    linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in low_rank}
    replace_(model, {
        id(linears[name]): SparseLinear.from_linear(linears[name], low_rank_a=c.low_rank_a, low_rank_b=c.low_rank_b)
        for name, c in low_rank.items()
    })  # fmt: skip
    return CompensationReport(results)


def _as_pruned(linear: nn.Linear, twin: nn.Linear, mask: Tensor) -> bool:
    """Whether the layer is the dense one with weights set to zero, and nothing else."""
    if linear.bias is None or twin.bias is None:
        biases = linear.bias is twin.bias
    else:
        biases = torch.equal(linear.bias, twin.bias.to(linear.bias))
    return biases and torch.equal(linear.weight, (twin.weight * mask).to(linear.weight))


def _missing(linear: nn.Linear, twin: nn.Linear, x: Tensor) -> Tensor:
    """What the weight is to give for the inputs, so that with the layer's bias it gives what the dense layer does."""
    wanted = F.linear(x.float(), twin.weight.float(), None if twin.bias is None else twin.bias.float())
    return wanted if linear.bias is None else wanted - linear.bias.float()
