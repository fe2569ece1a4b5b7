"""What stands in for the weights that the masks removed: each layer's outputs are brought nearer to the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.batches import Batch
from ..pruning.compensation import Compensation, compensate
from ..pruning.granularity import Element
from ..pruning.processes import Processes
from ..pruning.reading import collect_inputs, collect_outputs, evaluating, reading
from .gates import Gates

__all__ = ["compensate_from_teacher_"]

_ROWS = 4096  # tokens that a layer is fitted to, and as many to judge by
_LEAST = 8


@torch.no_grad()
def compensate_from_teacher_(
    student: nn.Module, teacher: nn.Module, gates: Gates, recent: Sequence[Any], judges: Sequence[Any],
    processes: Processes,
) -> dict[str, Compensation]:  # fmt: skip
    """Fits what ``gates.config.compensation`` allows to inputs of ``recent``, chosen on those of ``judges`` (none:
    held-out rows), applies it, and returns it by layer. Layers that see fewer than eight rows, or unlike rows in the
    two models, are left out.

    The goal is what the teacher's layer gives for the same tokens, on what the student's layers before it now give: the
    weights behind the masks are no goal, for they have had no say for long. So layers follow each other in the order in
    which they run, those that read one tensor together. Fitted to what all processes saw; each fits a part.
    """
    sides = [_newest([Batch(inputs) for inputs in side]) for side in (recent, judges) if side]
    fits: dict[str, Compensation] = {}
    for stage in _stages(student, list(gates.masks), sides[0][0]):
        found = _fit(student, teacher, gates, stage, sides, processes)
        gates.compensate(found)
        fits |= found
    return fits


def _fit(
    student: nn.Module, teacher: nn.Module, gates: Gates, names: Sequence[str], sides: Sequence[Sequence[Batch]],
    processes: Processes,
) -> dict[str, Compensation]:  # fmt: skip
    what, rows = gates.config.compensation, _ROWS // processes.size
    read = [
        (collect_inputs(student, names, side, rows), collect_outputs(teacher, names, side, rows))
        for side in sides
    ]
    own: dict[str, Compensation] = {}
    for i, name in enumerate(names):
        linear = gates.linears[name]
        device = linear.weight.device
        (x, y), *held = (
            tuple(torch.cat([part.to(device) for part in processes.gather(found[name].cpu())]) for found in pair)
            for pair in read
        )
        alike = all(len(a) == len(b) >= _LEAST for a, b in [(x, y), *held])
        if i % processes.size != processes.index or not alike:
            continue
        kind = gates.free(name) if name and what in ("low_rank", "best") else None
        bias = 0 if linear.bias is None else linear.bias
        own[name] = compensate(
            linear.weight, x, mask=gates.masks[name], outputs=y - bias, granularity=kind or Element(),
            valid_inputs=held[0][0] if held else None, valid_outputs=held[0][1] - bias if held else None,
            bias_shift=what != "low_rank" and linear.bias is not None, survivors=what in ("survivors", "best"),
            ranks=() if kind is None else None,
        )  # fmt: skip
    return {name: found for part in processes.gather(own) for name, found in part.items()}


def _newest(batches: Sequence[Batch]) -> list[Batch]:
    """As many of the last batches as hold the rows wanted."""
    chosen: list[Batch] = []
    held = 0
    for batch in reversed(batches):
        chosen.insert(0, batch)
        held += _rows_of(batch)
        if held >= _ROWS:
            break
    return chosen


def _rows_of(batch: Batch) -> int:
    """Tokens, or rows of floating-point inputs."""
    if batch.mask is not None:
        return int(batch.mask.sum())
    first = next(value for value in (*batch.args, *batch.kwargs.values()) if isinstance(value, Tensor))
    return first.numel() // (max(1, first.shape[-1]) if first.is_floating_point() else 1)


@torch.no_grad()
def _stages(model: nn.Module, names: Sequence[str], batch: Batch) -> list[list[str]]:
    """The layers in the order in which they run, those that read one tensor after each other together."""
    stages: list[list[str]] = []
    last: Tensor | None = None  # held, so that its memory is not handed out again
    seen: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        nonlocal last
        if name not in seen:
            same = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
            stages[-1].append(name) if same else stages.append([name])
            seen.add(name)
        last = x

    modules = dict(model.named_modules())
    with evaluating(model), reading({name: modules[name] for name in names}, see):
        batch.call(model)
    return stages
