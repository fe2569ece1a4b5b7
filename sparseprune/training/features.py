"""Where teacher and student are compared: hidden states of both at the same places, made comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.matrices import Experts
from ..pruning.batches import LabelledBatch
from .losses import real_rows

__all__ = ["FeatureReader", "Taps", "choose_taps", "matching_taps", "normalise"]

FeatureCall = Callable[[nn.Module, Any], Sequence[Tensor]]


class FeatureReader:
    """Reads the features of a model, ``wanted`` as in :class:`DistillConfig`; student and teacher are read alike.

    ``taps``: the modules whose outputs they are; ``entry``: the module whose input is the condition. A teacher of
    another architecture (:meth:`meet`) is read at the same depth.
    """

    def __init__(self, model: nn.Module, pruned: Sequence[str], wanted: str | Sequence[str] | Callable[..., Any]):
        self.wanted, self._student, self._pruned = wanted, model, list(pruned)
        self.entry: str | None = None
        self.taps: list[str] = []
        if not callable(wanted):
            self.entry, self.taps = choose_taps(model, pruned, wanted)
        self._others = self.entry, self.taps

    def meet(self, teacher: nn.Module, linears: Sequence[str]) -> None:
        """Where a teacher of another architecture is read; linears: its Linears, as ``pruned`` are the student's."""
        if callable(self.wanted):
            return
        if self.wanted == "auto":
            self._others = matching_taps(self._student, self._pruned, self.taps, teacher, linears)
        else:
            self._others = choose_taps(teacher, linears, self.wanted)

    @property
    def reads_logits(self) -> bool:
        """Whether the features are the logits' own rows that count."""
        return not callable(self.wanted) and not self.taps

    def __call__(self, model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """(logits, features, entry) of one forward pass."""
        if callable(self.wanted):
            logits, features = self.wanted(model, batch.inputs)
            return logits, list(features), batch.first_float
        entry, taps = (self.entry, self.taps) if model is self._student else self._others
        watch = Taps(model, taps, entry)
        with watch.recording():
            logits = batch.run(model)
        features = watch.collect() or [real_rows(logits, batch.targets, batch.output_mask)]
        return logits, features, batch.first_float if entry is None else watch.entry


def choose_taps(model: nn.Module, pruned: Sequence[str], wanted: str | Sequence[str]) -> tuple[str | None, list[str]]:
    """(entry, taps): the module whose input is the condition, and those whose outputs are the features, by name.

    ``"auto"``: the blocks at 1/4, 1/2, 3/4 and the end of the longest ModuleList that holds pruned layers, and the
    first of its blocks as the entry; without one, up to four of the pruned layers. ``"logits"``, and a model that is
    itself a Linear: no taps, the logits are judged.
    """
    modules = dict(model.named_modules())
    first = next((name for name in pruned if name), None)
    if not isinstance(wanted, str):
        missing = [name for name in wanted if name not in modules]
        if missing:
            raise ValueError(f"features: no module is called {missing[0]!r}; see model.named_modules()")
        return first, list(wanted)
    if wanted == "logits":
        return first, []
    if wanted != "auto":
        raise ValueError(f'features expected "auto", "logits", a list of module names or a callable, got {wanted!r}')
    blocks = _blocks(model, pruned)
    found = blocks or [name for name in pruned if name]
    quarters = sorted({max(0, round(len(found) * share / 4) - 1) for share in (1, 2, 3, 4)}) if found else []
    return (blocks[0] if blocks else first), [found[i] for i in quarters]


def matching_taps(
    student: nn.Module, pruned: Sequence[str], taps: Sequence[str], teacher: nn.Module, linears: Sequence[str]
) -> tuple[str | None, list[str]]:
    """(entry, taps) of a teacher of another architecture: for the student's block i of n the teacher's at the same
    depth, ``round(i m / n)`` of m. linears: the teacher's, as ``pruned`` are the student's.

    ValueError where the student's taps are no blocks, or the teacher has none.
    """
    own, other = _blocks(student, pruned), _blocks(teacher, linears)
    if not other or any(tap not in own for tap in taps):
        raise ValueError(
            "features: the teacher has another architecture, expected blocks (a ModuleList) in both models to find the "
            'same depth; use features="logits", or a callable'
        )
    return other[0], [other[max(0, round((own.index(tap) + 1) * len(other) / len(own)) - 1)] for tap in taps]


def _blocks(model: nn.Module, pruned: Sequence[str]) -> list[str]:
    """The names of the blocks of the longest ModuleList that hold these layers; a mixture's experts are no blocks, for
    a batch need not reach each of them.
    """
    blocks: list[str] = []
    mixtures = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    for name, module in model.named_modules():
        mixture = name.rpartition(".")[0] in mixtures or name.rpartition(".")[2] == "experts"
        if isinstance(module, nn.ModuleList) and not mixture:
            inside = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
            holding = [b for b in inside if any(p == b or p.startswith(b + ".") for p in pruned)]
            if len(holding) > len(blocks):
                blocks = holding
    return blocks


class Taps:
    """Records the outputs of some modules, and the first floating-point input of one, during a forward pass."""

    def __init__(self, model: nn.Module, names: Sequence[str], entry_name: str | None = None):
        self.model, self.names, self.entry_name = model, list(names), entry_name
        self.outputs: dict[str, Tensor] = {}
        self.entry: Tensor | None = None

    @contextmanager
    def recording(self) -> Iterator[Taps]:
        """Hooks live only inside the block, so that a copy or a pickle of the model never holds one."""
        self.outputs, self.entry = {}, None
        modules = dict(self.model.named_modules())
        handles = [modules[name].register_forward_hook(self._keep(name)) for name in self.names]
        if self.entry_name is not None:
            handles.append(modules[self.entry_name].register_forward_pre_hook(self._keep_entry, with_kwargs=True))
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[name] = output if isinstance(output, Tensor) else output[0]

        return hook

    def _keep_entry(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        values = [*args, *kwargs.values()]
        self.entry = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)

    def collect(self) -> list[Tensor]:
        missing = [name for name in self.names if name not in self.outputs]
        if missing:
            raise RuntimeError(f"features: module {missing[0]!r} was not called in the forward pass; name others")
        return [self.outputs[name] for name in self.names]


def normalise(hidden: Tensor) -> Tensor:
    """hidden: `[..., d]`; zero mean and unit variance over d in float32, the same epsilon on both sides."""
    return F.layer_norm(hidden.float(), hidden.shape[-1:], eps=1e-5)
