"""The program of a stack of layers, and the tensors it reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ... import encoder_program as P
from ...decoder_program import Program as RowProgram
from ...packing import QUAD, Kind, Packed
from ..linear import SparseLinear
from .recognise import LayerParts, Projection
from .weights import is_whole, packed_of

__all__ = ["ProgramSteps", "StackProgram", "build"]

_HIDDEN, _QKV, _MIXED, _FFN, _NORMED = range(5)  # buffers


@dataclass(frozen=True)
class StackProgram:
    """A program, the tensors it names by place, and which kinds of layers have tables: kind -> its first table.
    parts: what was packed of sparse layers beside their own forms.
    """

    program: P.Program | RowProgram
    tensors: tuple[Tensor, ...]
    tables: dict[str, int]
    parts: tuple[Packed, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that it reads."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the same with every weight dense in float32."""
        packed = {i for w in self.program.weights for i in (w.values, w.indices, w.offsets, w.scale)}
        vectors = sum(t.nbytes for i, t in enumerate(self.tensors) if i not in packed)
        return vectors + sum(4 * w.rows * w.columns for w in self.program.weights)


class _Tensors:
    """Tensors in the order in which steps name them; one that is named twice is there once."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.weights: list[P.Weight] = []
        self._index_of: dict[int, int] = {}
        self._packed: dict[tuple[int, int, int], int] = {}
        self.parts: list[Packed] = []

    def place(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if id(tensor) not in self._index_of:
            self._index_of[id(tensor)] = len(self.found)
            self.found.append(tensor)
        return self._index_of[id(tensor)]

    def vector(self, tensor: Tensor | None, begin: int = 0, end: int | None = None) -> int:
        """A bias or gain, read from the parameter's own memory."""
        if tensor is None:
            return -1
        if begin == 0 and (end is None or end == tensor.numel()) and tensor.is_contiguous():
            return self.place(tensor)
        self.found.append(tensor.detach()[begin:end].contiguous())
        return len(self.found) - 1

    def weight(self, projection: Projection) -> int:
        key = id(projection.module), projection.begin, projection.end
        if key not in self._packed:
            p = packed_of(projection)
            if isinstance(projection.module, SparseLinear) and not is_whole(projection):
                self.parts.append(p)
            values, index, offsets, scale = (self.place(t) for t in (p.values, p.index, p.offsets, p.scale))
            self._packed[key] = len(self.weights)
            self.weights.append(P.Weight(values, index, offsets, scale, p.plan))
        return self._packed[key]


class _Named(Protocol):
    """Gives the places of a projection's tensors."""

    weights: list[P.Weight]

    def vector(self, tensor: Tensor | None, begin: int = 0, end: int | None = None) -> int: ...
    def weight(self, projection: Projection) -> int: ...


class ProgramSteps:
    """The steps of a program on panels; rounding: the buffer for features in 8 bits, which weights in quads read."""

    def __init__(self, tensors: _Named, rounding: int) -> None:
        self.steps: list[P.Step] = []
        self._tensors, self._rounding = tensors, rounding
        self._held: tuple[int, int] | None = None  # buffer and number of the features that the rounded one holds

    def add(self, step: P.Step) -> None:
        self.steps.append(step)
        if self._held is not None and not isinstance(step, P.Keep) and self._held[0] == step.to:
            self._held = None

    def linear(
        self, to: int, source: int, p: Projection, combine: str = "replace", row: int = 0, together: bool = False
    ) -> None:
        bias, weight = self._tensors.vector(p.bias, p.begin, p.end), self._tensors.weight(p)
        plan = self._tensors.weights[weight].plan
        if plan.kind == Kind.QUADS:
            source = self._rounded(source, plan.columns)
        self.add(P.Linear(to, source, weight, bias, p.activation, combine, row, together=together))

    def _rounded(self, source: int, features: int) -> int:
        """The buffer with this one's features in 8 bits, made once for all that read them."""
        if self._held != (source, features):
            self.add(P.Round(self._rounding, source, features))
            self._held = source, features
        return self._rounding


@torch.no_grad()
def build(layers: Sequence[LayerParts]) -> StackProgram:
    """layers: of one hidden size, in order. What the program reads are float32 vectors of the layers themselves and the
    packed forms of their weights.
    """
    tensors, tables = _Tensors(), _tables(layers)
    made = ProgramSteps(tensors, _NORMED + any(layer.before for layer in layers))
    add, linear = made.add, made.linear

    def norm(to: int, source: int, module: nn.Module | None) -> int:
        if module is None:
            return source
        assert isinstance(module, nn.LayerNorm)
        gain, shift = tensors.vector(module.weight), tensors.vector(module.bias)
        add(P.Norm(to, source, module.normalized_shape[0], gain, shift, module.eps))
        return to

    for layer in layers:
        width, row = layer.heads * layer.depth, 0
        source = norm(_NORMED, _HIDDEN, layer.attention_norm) if layer.before else _HIDDEN
        for i, projection in enumerate(layer.inputs):
            linear(_QKV, source, projection, row=row, together=i + 1 < len(layer.inputs))
            row += projection.outputs
        if layer.rotary:
            table = tables[layer.kind]
            add(P.Rotary(_QKV, layer.heads, layer.depth, table, 0, together=True))
            add(P.Rotary(_QKV, layer.heads, layer.depth, table, width))
        bias = tables[layer.kind] if layer.biased else -1
        heads, depth = layer.heads, layer.depth
        add(P.Attention(_MIXED, _QKV, heads, heads, depth, 0, width, 2 * width, layer.factor, layer.window, bias))
        linear(_HIDDEN, _MIXED, layer.output, "add")
        if layer.before:
            source = norm(_NORMED, _HIDDEN, layer.ffn_norm)
        else:
            source = norm(_HIDDEN, _HIDDEN, layer.attention_norm)
        linear(_FFN, source, layer.up)
        if layer.gate is not None:
            linear(_FFN, source, layer.gate, "multiply")
        linear(_HIDDEN, _FFN, layer.down, "add")
        if not layer.before:
            norm(_HIDDEN, _HIDDEN, layer.ffn_norm)
    hidden, width = layers[0].hidden, max(layer.heads * layer.depth for layer in layers)
    buffers = [hidden, 3 * width, width, max(layer.up.outputs for layer in layers)]
    buffers += [hidden] * any(layer.before for layer in layers)
    quads = [weight.columns for weight in tensors.weights if weight.plan.kind == Kind.QUADS]
    if quads:
        buffers.append(max(quads) // QUAD + 2)
    program = P.Program(tuple(buffers), tuple(tensors.weights), tuple(made.steps), _HIDDEN)
    return StackProgram(program, tuple(tensors.found), tables, tuple(tensors.parts))


def _tables(layers: Sequence[LayerParts]) -> dict[str, int]:
    """kind of layers -> the place of its first table: cos and sin, or a bias of the scores."""
    tables: dict[str, int] = {}
    count = 0
    for layer in layers:
        if (layer.rotary or layer.biased) and layer.kind not in tables:
            tables[layer.kind] = count
            count += 2 if layer.rotary else 1
    return tables
