"""What sparsify_ and densify_ say they did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..fusion import Fusion
from ..stacks import StackChoice

__all__ = ["DensifyReport", "LayerChoice", "MemoryUse", "SparsifyReport", "note_dense_", "why_dense"]

_NOTE = "_sparsify_note"  # on a layer that stayed dense


@dataclass(frozen=True)
class LayerChoice:
    """One layer: ``layout`` it runs in now ("dense" where it was left), ``ratio`` over dense (None: not measured),
    ``reason``; ``doubt``: what speaks against the timing, empty where nothing does.
    """

    name: str
    shape: tuple[int, int]
    density: float
    layout: str
    ratio: float | None
    reason: str
    doubt: str = ""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of the weights that became sparse: ``dense``, as they were; ``canonical``, their layouts, which state dicts
    hold; ``packed``, what inference reads; ``resident``, all that stays: packed alone with ``keep="packed"``, else
    canonical and packed, the unpacked weights of ``dense_from``, and what lets values change.
    """

    dense: int
    canonical: int
    packed: int
    resident: int

    def __str__(self) -> str:
        share = f" ({self.resident / self.dense:.2f} of dense)" if self.dense else ""
        return (
            f"bytes of the sparse weights: {self.resident:,} resident{share}; packed {self.packed:,}, canonical "
            f"{self.canonical:,}, dense {self.dense:,}"
        )


@dataclass(frozen=True)
class SparsifyReport:
    """What :func:`sparsify_` did: ``layers`` in the model's order, ``fusions``, ``skipped`` Linears with the reason,
    and with ``dense_value_dtype`` the Linears that are not sparse: ``rounded``, layout "bfloat16" or "int8" where that
    is faster. ``other_weights``: larger weights that no Linear holds, with their share of all parameters; they stay
    dense. ``stacks`` of encoder and decoder layers, with the engine that runs each. ``memory`` of the weights that
    became sparse.
    """

    layers: list[LayerChoice]
    fusions: list[Fusion] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    rounded: list[LayerChoice] = field(default_factory=list)
    other_weights: dict[str, str] = field(default_factory=dict)
    stacks: list[StackChoice] = field(default_factory=list)
    memory: MemoryUse = MemoryUse(0, 0, 0, 0)

    def __getitem__(self, name: str) -> LayerChoice:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def converted(self) -> list[LayerChoice]:
        """The layers that became sparse."""
        return [layer for layer in self.layers if layer.layout != "dense"]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SparsifyReport:
        """What :meth:`to_dict` gave, also after JSON. ValueError on anything else."""

        def layers(key: str) -> list[LayerChoice]:
            return [LayerChoice(**{**layer, "shape": tuple(layer["shape"])}) for layer in data[key]]

        try:
            return cls(
                layers("layers"), [Fusion(**fusion) for fusion in data["fusions"]], dict(data["skipped"]),
                layers("rounded"), dict(data["other_weights"]), [StackChoice(**stack) for stack in data["stacks"]],
                MemoryUse(**data["memory"]),
            )  # fmt: skip
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"expected what SparsifyReport.to_dict gives, got another record ({error!r})") from None

    def outline(self) -> list[str]:
        """How many layers are sparse and what runs each stack, in one line; another one where timings are doubtful."""
        parts = [f"{len(self.converted)} of {len(self.layers)} layers sparse"]
        for stack in self.stacks:
            ratio = "" if stack.ratio is None else f", {stack.ratio:.2f} times the layers"
            parts.append(f"{stack.name or 'stack'}: {stack.engine}{ratio}")
        return ["; ".join(parts), *self._warning()]

    def _warning(self) -> list[str]:
        doubts = [choice.doubt for choice in self.layers if choice.doubt]
        doubts += [choice.doubt for choice in self.stacks if choice.doubt]
        if not doubts:
            return []
        choices = "1 choice" if len(doubts) == 1 else f"{len(doubts)} choices"
        return [
            f"warning: {doubts[0]}: {choices} may be wrong; on a quiet machine repeat it: densify_(model), then "
            "sparsify_(model, tokens=...)"
        ]

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'shape':>11}  density  layout     ratio  reason"]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            ratio = "    -" if layer.ratio is None else f"{layer.ratio:5.2f}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>11}  {layer.density:7.4f}  {layer.layout:<9}  {ratio}  {layer.reason}"
                + (f"; {layer.doubt}" if layer.doubt else "")
            )
        lines.append(f"{len(self.converted)} of {len(self.layers)} layers sparse, {len(self.skipped)} Linears left out")
        done = [f for f in self.fusions if not f.reason]
        lines += [f"fused: {f.name} + {f.what}" for f in done]
        lines += [f"not fused: {f.name} + {f.what}: {f.reason}" for f in self.fusions if f.reason]
        lines += [f"{r.layout}, {r.ratio:.2f} times dense: {r.name}" for r in self.rounded if r.layout != "dense"]
        lines += [f"not rounded: {r.name}: {r.reason}" for r in self.rounded if r.layout == "dense"]
        lines += [f"no Linear, left dense: {name}: {what}" for name, what in self.other_weights.items()]
        for s in self.stacks:
            ratio = "" if s.ratio is None else f", {s.ratio:.2f} times the layers"
            size = f", reads {s.nbytes} bytes, dense {s.dense_nbytes}" if s.nbytes else ""
            lines.append(f"stack of {s.layers} layers: {s.name or '(the model)'}: {s.engine}{ratio}{size}: {s.reason}")
            if s.prompts:
                lines.append(f"  its prompts: {s.prompts}")
        if self.converted:
            lines.append(str(self.memory))
        lines += self._warning()
        return "\n".join(lines)


@dataclass(frozen=True)
class DensifyReport:
    """What :func:`densify_` did. ``layers``: names made dense again; ``notes``: name -> why its weight is not
    bit-identical.
    """

    layers: list[str]
    notes: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers dense again"]
        return "\n".join(lines + [f"  {name}: {note}" for name, note in self.notes.items()])


def note_dense_(layer: nn.Module, reason: str | None) -> None:
    """Keeps with a layer why :func:`sparsify_` left it dense, for :func:`explain`; None forgets it."""
    if reason is None:
        layer.__dict__.pop(_NOTE, None)
    else:
        layer.__dict__[_NOTE] = reason


def why_dense(layer: nn.Module) -> str:
    """What :func:`note_dense_` kept, or nothing."""
    found: str = layer.__dict__.get(_NOTE, "")
    return found
