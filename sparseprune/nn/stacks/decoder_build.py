"""The program of a stack of decoder layers, the tensors it reads, and whether they are what they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ... import decoder_program as P
from ...native.decoder import BoundDecoder
from ..linear import SparseLinear
from ..rounded import Copy, RoundedLinear
from .build import StackProgram
from .decoder_parts import DecoderParts, NormParts
from .recognise import Projection, UnknownLayer
from .state import StackWeights

__all__ = ["RowWeights", "Tensors", "build_decoder", "make_rows", "weights_in_turn"]

_HIDDEN, _QKV, _MIXED, _FFN = range(4)  # buffers


class RowWeights(StackWeights):
    """Those of a decoder, whose program reads dense weights where they lie; and rounded copies."""

    def __init__(self, layers: Sequence[DecoderParts]) -> None:
        modules = list({id(p.module): p.module for layer in layers for p in layer.projections}.values())
        norms = [n for layer in layers for n in layer.norms]
        sparse = [m for m in modules if isinstance(m, SparseLinear)]
        self._rounded = [(m, m._rounded(m.weight)) for m in modules if isinstance(m, RoundedLinear)]
        read: list[Tensor | None] = [p.bias for layer in layers for p in layer.projections]
        read += [m.weight for m in modules if isinstance(m, nn.Linear)]  # rounded ones: by prompts
        read += [t for n in norms if not n.plus_one for t in (n.weight, n.bias)]
        changed = [n.weight for n in norms if n.plus_one]
        copied = [t for m in sparse for t in m.sources()] + changed
        super().__init__(sparse, read, copied, {id(t) for t in changed})

    def fresh(self) -> bool:
        return super().fresh() and all(m._rounded(m.weight) is copy for m, copy in self._rounded)


class Tensors:
    """Tensors in the order in which steps name them; one that is named twice is there once."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.weights: list[P.Weight] = []
        self._index_of: dict[int, int] = {}
        self._made: dict[int, int] = {}

    def place(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return -1
        if not tensor.is_contiguous():
            raise UnknownLayer(f"it reads a tensor of strides {tensor.stride()}, needed contiguous")
        if id(tensor) not in self._index_of:
            self._index_of[id(tensor)] = len(self.found)
            self.found.append(tensor)
        return self._index_of[id(tensor)]

    def norm(self, norm: NormParts | None) -> P.RowNorm:
        if norm is None:
            return P.RowNorm()
        gain = self.place(norm.weight.detach() + 1 if norm.plus_one else norm.weight)
        return P.RowNorm(gain, self.place(norm.bias), norm.eps, norm.centred)

    def weight(self, projection: Projection) -> int:
        module = projection.module
        if id(module) not in self._made:
            self._made[id(module)] = len(self.weights)
            self.weights.append(self._weight(module))
        return self._made[id(module)]

    def again(self, place: int) -> int:
        """A copy of this weight, elsewhere in memory."""
        values, index, offsets, scale, plan = self.weights[place]

        def copy(i: int) -> int:
            return -1 if i < 0 else self.place(self.found[i].clone())

        self.weights.append(P.Weight(copy(values), copy(index), copy(offsets), copy(scale), plan))
        return len(self.weights) - 1

    def _weight(self, module: nn.Module) -> P.Weight:
        if isinstance(module, SparseLinear):
            p = module._packed(module._forms.for_rows(1))
            values, index, offsets, scale = (self.place(t) for t in (p.values, p.index, p.offsets, p.scale))
            return P.Weight(values, index, offsets, scale, p.plan)
        assert isinstance(module, nn.Linear)
        held = module._rounded(module.weight) if isinstance(module, RoundedLinear) else Copy(module.weight, None)
        plan = P.whole_plan(module.out_features, module.in_features)
        return P.Weight(self.place(held.values), -1, -1, self.place(held.scale), plan)


@torch.no_grad()
def build_decoder(layers: Sequence[DecoderParts]) -> StackProgram:
    """layers: of one hidden size, in order. Layer i takes cache i of a call, and the mask and rotary table of its
    kind, in the order in which kinds come first.
    """
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    tensors, steps = Tensors(), list[P.Step]()
    buffers = [layers[0].hidden, 0, 0, 0]
    for i, layer in enumerate(layers):
        depth, width, kv = layer.depth, layer.heads * layer.depth, layer.kv_heads * layer.depth
        before, behind = tensors.norm(layer.attention_norm), tensors.norm(layer.ffn_norm)
        ffn = [layer.up] if layer.gate is None else [layer.gate, layer.up]
        entering = [P.Linear(
            _FFN, _HIDDEN, tensors.weight(p), tensors.place(p.bias), p.activation, norm=behind, to_row=n * layer.inner,
            together=n + 1 < len(ffn),
        ) for n, p in enumerate(ffn)]  # fmt: skip
        row = 0
        for n, p in enumerate(layer.inputs):
            more = layer.parallel or n + 1 < len(layer.inputs)
            steps.append(P.Linear(
                _QKV, _HIDDEN, tensors.weight(p), tensors.place(p.bias), p.activation, norm=before, to_row=row,
                together=more,
            ))  # fmt: skip
            row += p.outputs
        steps += entering if layer.parallel else []
        places = (
            ((0, 3 * depth), (depth, 3 * depth), (2 * depth, 3 * depth)) if layer.interleaved
            else ((0, depth), (width, depth), (width + kv, depth))
        )  # fmt: skip
        steps.append(P.Attention(
            _MIXED, _QKV, layer.heads, layer.kv_heads, depth, *places, layer.factor, i, layer.turned,
            kinds.index(layer.kind), kinds.index(layer.kind),
            tensors.norm(layer.q_norm), tensors.norm(layer.k_norm),
        ))  # fmt: skip
        o, down = layer.output, layer.down
        steps.append(P.Linear(_HIDDEN, _MIXED, tensors.weight(o), tensors.place(o.bias), o.activation, add=True))
        steps += [] if layer.parallel else entering
        steps.append(P.Linear(
            _HIDDEN, _FFN, tensors.weight(down), tensors.place(down.bias), down.activation, add=True,
            gated=layer.gate is not None,
        ))  # fmt: skip
        for buffer, features in ((_QKV, width + 2 * kv), (_MIXED, width), (_FFN, layer.inner * len(ffn))):
            buffers[buffer] = max(buffers[buffer], features)
    program = P.Program(tuple(buffers), tuple(tensors.weights), tuple(steps), _HIDDEN)
    return StackProgram(program, tuple(tensors.found), {})


def weights_in_turn(module: nn.Linear | SparseLinear, copies: int = 1, steps: int = 1) -> Callable[[Tensor], Tensor]:
    """What takes x float32 `[M, K]`, up to 16 rows, through ``copies`` of the module's weight `[N, K]`, one after the
    other in ``steps`` or more steps of one program, as :func:`build_decoder` has them; gives what the last says,
    `[M, N]`, without the bias.
    """
    tensors = Tensors()
    first = tensors.weight(Projection(module, 0, module.out_features))
    weights = [first, *(tensors.again(first) for _ in range(copies - 1))]
    rounds = -(-steps // len(weights))
    program = P.Program(
        (module.in_features, module.out_features), tuple(tensors.weights),
        tuple(P.Linear(1, 0, weight) for weight in weights * rounds), 1,
    )  # fmt: skip
    bound = BoundDecoder(tuple(tensors.found), *program.encode())
    return lambda x: bound(x[None], [], x.shape[0], 0, [], [])[0]


def make_rows(layers: Sequence[DecoderParts]) -> tuple[StackProgram, RowWeights]:
    """A program, and what it was made of."""
    weights = RowWeights(layers)
    return build_decoder(layers), weights.packed()
