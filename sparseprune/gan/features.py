"""Where the discriminator looks: hidden states of teacher and student at the same places, made comparable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Batch", "Taps", "choose_taps", "normalise", "orthonormal", "rows_of", "split_batch"]

FeatureCall = Callable[[nn.Module, Any], Sequence[Tensor]]


class Batch:
    """One batch, whatever its form: ``(inputs, targets)``, or a dict with ``labels``."""

    def __init__(self, inputs: Any, targets: Tensor):
        self.inputs, self.targets = inputs, targets

    def run(self, model: nn.Module) -> Tensor:
        """The model's output tensor, or its ``.logits``."""
        if isinstance(self.inputs, Mapping):
            out = model(**self.inputs)
        elif isinstance(self.inputs, tuple | list):
            out = model(*self.inputs)
        else:
            out = model(self.inputs)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model's output expected a tensor or an object with .logits, got {type(out).__name__}")
        return logits

    @property
    def mask(self) -> Tensor | None:
        """bool `[B, T]`, True = real token, where the batch says so."""
        found = self.inputs.get("attention_mask") if isinstance(self.inputs, Mapping) else None
        return None if found is None else found.bool()

    @property
    def first_float(self) -> Tensor | None:
        """The first floating-point input tensor: the condition of models without an embedding."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        candidates = [values] if isinstance(values, Tensor) else list(values)
        return next((v for v in candidates if isinstance(v, Tensor) and v.is_floating_point()), None)


def split_batch(batch: Any, device: torch.device) -> Batch:
    """TypeError on anything but ``(inputs, targets)`` or a mapping with ``labels``."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, Mapping):
            return {key: move(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(move(item) for item in value)
        return value

    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise TypeError(f"a batch that is a dict expected the key 'labels', got {sorted(batch)}")
        return Batch({key: move(value) for key, value in batch.items() if key != "labels"}, move(batch["labels"]))
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return Batch(move(batch[0]), move(batch[1]))
    raise TypeError(f"a batch expected (inputs, targets) or a dict with 'labels', got {type(batch).__name__}")


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
    blocks: list[str] = []
    for name, module in modules.items():
        if isinstance(module, nn.ModuleList):
            inside = [f"{name}.{i}" if name else str(i) for i in range(len(module))]
            holding = [b for b in inside if any(p == b or p.startswith(b + ".") for p in pruned)]
            if len(holding) > len(blocks):
                blocks = holding
    found = blocks or [name for name in pruned if name]
    quarters = sorted({max(0, round(len(found) * share / 4) - 1) for share in (1, 2, 3, 4)}) if found else []
    return (blocks[0] if blocks else first), [found[i] for i in quarters]


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


def rows_of(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """hidden: `[B, T, d]` with mask `[B, T]`: the real tokens `[M, d]`; any other shape: all rows `[M, d]`."""
    if mask is not None and hidden.dim() == 3 and hidden.shape[:2] == mask.shape:
        return hidden[mask]
    return hidden.reshape(-1, hidden.shape[-1])


def orthonormal(d: int, limit: int, generator: torch.Generator) -> Tensor | None:
    """A fixed projection `[d, limit]` with orthonormal columns; None where d <= limit and none is needed."""
    if d <= limit:
        return None
    q, r = torch.linalg.qr(torch.randn(d, limit, generator=generator, dtype=torch.float64))
    return (q * torch.sign(torch.diagonal(r))).float()
