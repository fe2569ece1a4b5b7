"""What stands in for the weights that the masks removed: each layer's outputs are brought nearer to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pruning.compensation import Compensation, collect_inputs, collect_outputs, compensate
from ..pruning.granularity import Element
from ..pruning.ranks import Ranks
from .features import Batch
from .gates import Gates

__all__ = ["make_up_"]

_ROWS = 4096  # tokens that a layer is fitted to, and as many to judge by
_LEAST = 8


@torch.no_grad()
def make_up_(
    student: nn.Module, teacher: nn.Module, gates: Gates, recent: Sequence[Any], judges: Sequence[Any], ranks: Ranks
) -> dict[str, Compensation]:
    """Fits what ``gates.config.compensation`` allows to inputs of ``recent``, chosen on those of ``judges`` (none:
    held-out rows), applies it, and returns it by layer. Layers that see fewer than eight rows, or unlike rows in the
    two models, are left out.

    The goal is what the teacher's layer gives for the same tokens, on what the student's layers before it now give: the
    weights behind the masks are no goal, for they have had no say for long. So layers follow each other in the order in
    which they run, those that read one tensor together. Fitted to what all processes saw; each fits a part.
    """
    sides = [_newest(side) for side in (recent, judges) if side]
    fits: dict[str, Compensation] = {}
    for stage in _stages(student, list(gates.masks), sides[0][0]):
        found = _fit(student, teacher, gates, stage, sides, ranks)
        gates.compensate(found)
        fits |= found
    return fits


def _fit(
    student: nn.Module, teacher: nn.Module, gates: Gates, names: Sequence[str], sides: Sequence[Sequence[Any]],
    ranks: Ranks,
) -> dict[str, Compensation]:  # fmt: skip
    what, rows = gates.config.compensation, _ROWS // ranks.size
    read = [
        (collect_inputs(student, names, side, rows, call=_run), collect_outputs(teacher, names, side, rows, call=_run))
        for side in sides
    ]
    own: dict[str, Compensation] = {}
    for i, name in enumerate(names):
        linear = gates.linears[name]
        device = linear.weight.device
        (x, y), *held = (
            tuple(torch.cat([part.to(device) for part in ranks.gather(found[name].cpu())]) for found in pair)
            for pair in read
        )
        alike = all(len(a) == len(b) >= _LEAST for a, b in [(x, y), *held])
        if i % ranks.size != ranks.rank or not alike:
            continue
        kind = gates.free(name) if name and what in ("low_rank", "best") else None
        bias = 0 if linear.bias is None else linear.bias
        own[name] = compensate(
            linear.weight, x, mask=gates.masks[name], outputs=y - bias, granularity=kind or Element(),
            valid_inputs=held[0][0] if held else None, valid_outputs=held[0][1] - bias if held else None,
            bias_shift=what != "low_rank" and linear.bias is not None, survivors=what in ("survivors", "best"),
            ranks=() if kind is None else None,
        )  # fmt: skip
    return {name: found for part in ranks.gather(own) for name, found in part.items()}


def _newest(batches: Sequence[Any]) -> list[Any]:
    """As many of the last batches as hold the rows wanted."""
    chosen: list[Any] = []
    held = 0
    for inputs in reversed(batches):
        chosen.insert(0, inputs)
        held += _rows_of(inputs)
        if held >= _ROWS:
            break
    return chosen


def _rows_of(inputs: Any) -> int:
    """Tokens, or rows of floating-point inputs."""
    batch = Batch(inputs, torch.empty(0))
    if batch.mask is not None:
        return int(batch.mask.sum())
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs] if isinstance(inputs, Tensor) else inputs
    first = next(value for value in values if isinstance(value, Tensor))
    return first.numel() // (max(1, first.shape[-1]) if first.is_floating_point() else 1)


@torch.no_grad()
def _stages(model: nn.Module, names: Sequence[str], inputs: Any) -> list[list[str]]:
    """The layers in the order in which they run, those that read one tensor after each other together."""
    stages: list[list[str]] = []
    last: Tensor | None = None  # held, so that its memory is not handed out again
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            nonlocal last
            x = arguments[0]
            if name not in seen:
                same = last is not None and x.data_ptr() == last.data_ptr() and x.shape == last.shape
                stages[-1].append(name) if same else stages.append([name])
                seen.add(name)
            last = x

        return note

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(hook(name)) for name in names]
    training = model.training
    try:
        _run(model.eval(), inputs)
    finally:
        for handle in hooks:
            handle.remove()
        model.train(training)
    return stages


def _run(model: nn.Module, inputs: Any) -> Tensor:
    return Batch(inputs, torch.empty(0)).run(model)
