"""Prompts: whole sequences from their first token through a stack of decoder layers, as one native call on panels.

The steps are those of encoders, :mod:`sparseprune.encoder_program`, with attention that sees no token behind itself and
keys and values that are kept. Weights are the forms that the layers hold for their largest number of tokens, and dense
ones where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import encoder_program as P
from ...native.encoder import BoundEncoder
from ...packing import QUAD, Kind
from ..linear import SparseLinear
from .build import ProgramSteps, StackProgram
from .decoder_build import Tensors
from .decoder_parts import DecoderParts, NormParts
from .masks import Unsupported, real_in_prompt
from .recognise import UnknownLayer

__all__ = ["BoundPrompt", "build_prompt", "cos_and_sin", "positions_of", "real_tokens_of"]

_HIDDEN, _QKV, _MIXED, _FFN, _NORMED, _ROUNDED = range(6)  # buffers


class _Tensors(Tensors):
    """Weights as panels of many tokens read them."""

    def vector(self, tensor: Tensor | None, begin: int = 0, end: int | None = None) -> int:
        return self.place(tensor)

    def _weight(self, module: nn.Module) -> P.Weight:
        if not isinstance(module, SparseLinear):
            assert isinstance(module, nn.Linear)
            plan = P.whole_plan(module.out_features, module.in_features)
            return P.Weight(self.place(module.weight), -1, -1, -1, plan)
        p = module._packed(module._forms.largest)
        if p.plan.kind not in (Kind.GROUPS, Kind.QUADS):
            raise UnknownLayer(
                f"a weight is packed as {Kind(p.plan.kind).name.lower()}, for few tokens alone; "
                "sparsify_(model, tokens=(1, 128)) packs it for prompts too"
            )
        values, index, offsets, scale = (self.place(t) for t in (p.values, p.index, p.offsets, p.scale))
        return P.Weight(values, index, offsets, scale, p.plan)


@torch.no_grad()
def build_prompt(layers: Sequence[DecoderParts]) -> StackProgram:
    """layers: of one hidden size, in order. Layer i keeps its keys and values in layer i of a call's cache, and takes
    the rotary tables of its kind; kinds in the order in which they come first, but for those that turn nothing.
    """
    turning = list(dict.fromkeys(layer.kind for layer in layers if layer.turned))
    tables = {kind: 2 * i for i, kind in enumerate(turning)}
    tensors = _Tensors()
    made = ProgramSteps(tensors, _ROUNDED)

    def norm(to: int, source: int, parts: NormParts, features: int, row: int = 0, together: bool = False) -> None:
        n = tensors.norm(parts)
        made.add(P.Norm(to, source, features, n.weight, n.bias, n.eps, n.centred, row, row, together))

    def enter(layer: DecoderParts) -> None:
        norm(_NORMED, _HIDDEN, layer.ffn_norm, layer.hidden)
        made.linear(_FFN, _NORMED, layer.up)
        if layer.gate is not None:
            made.linear(_FFN, _NORMED, layer.gate, "multiply")

    for i, layer in enumerate(layers):
        depth, width, kv = layer.depth, layer.heads * layer.depth, layer.kv_heads * layer.depth
        rows, every = ((0, depth, 2 * depth), 3 * depth) if layer.interleaved else ((0, width, width + kv), depth)
        norm(_NORMED, _HIDDEN, layer.attention_norm, layer.hidden)
        row = 0
        for n, p in enumerate(layer.inputs):
            made.linear(_QKV, _NORMED, p, row=row, together=n + 1 < len(layer.inputs))
            row += p.outputs
        if layer.parallel:
            enter(layer)
        for parts, count, first in ((layer.q_norm, layer.heads, rows[0]), (layer.k_norm, layer.kv_heads, rows[1])):
            for head in range(count if parts is not None else 0):
                norm(_QKV, _QKV, parts, depth, first + head * every, head + 1 < count)  # type: ignore[arg-type]
        if layer.turned:
            table = tables[layer.kind]
            for count, first, together in ((layer.heads, rows[0], True), (layer.kv_heads, rows[1], False)):
                made.add(P.Rotary(_QKV, count, layer.turned, table, first, together, every, True))
        made.add(P.Keep(_QKV, layer.kv_heads, depth, *rows[1:], i, every, True))
        made.add(P.Attention(
            _MIXED, _QKV, layer.heads, layer.kv_heads, depth, *rows, layer.factor, every=every, causal=True,
        ))  # fmt: skip
        made.linear(_HIDDEN, _MIXED, layer.output, "add")
        if not layer.parallel:
            enter(layer)
        made.linear(_HIDDEN, _FFN, layer.down, "add")
    hidden = layers[0].hidden
    buffers = [hidden, *(max(sizes) for sizes in zip(*map(_sizes, layers))), hidden]
    quads = [weight.columns for weight in tensors.weights if weight.plan.kind == Kind.QUADS]
    if quads:
        buffers.append(max(quads) // QUAD + 2)
    program = P.Program(tuple(buffers), tuple(tensors.weights), tuple(made.steps), _HIDDEN)
    return StackProgram(program, tuple(tensors.found), tables)


def _sizes(layer: DecoderParts) -> tuple[int, int, int]:
    return (layer.heads + 2 * layer.kv_heads) * layer.depth, layer.heads * layer.depth, layer.inner


class BoundPrompt:
    """The program of these layers. :class:`UnknownLayer` where they have none."""

    def __init__(self, parts: Sequence[DecoderParts]) -> None:
        self.built = build_prompt(parts)
        try:
            self._program = BoundEncoder(self.built.tensors, *self.built.program.encode())
        except (ValueError, TypeError) as error:
            raise UnknownLayer(str(error)) from None

    def __call__(
        self, hidden: Tensor, real: Tensor | None, tables: Sequence[Tensor], cache: Sequence[int] = ()
    ) -> Tensor:
        """hidden: float32 `[B, S, D]`; real: bool `[B, S]`, None: all are; tables: cos and sin `[B, S, turned]` of each
        kind that turns; cache: numbers of layers with room for S tokens; returns `[B, S, D]`, 0 where a token is not
        real.
        """
        return self._program(hidden, real, tables, cache, hidden.shape[1])


def real_tokens_of(masks: Sequence[Any], batch: int, length: int, eager: bool, whole: bool) -> Tensor | None:
    """Of the masks that kinds of layers get, bool `[B, S]`; None: all tokens are real. eager: layers add the mask to
    the scores; whole: masks cover all places of the cache. :class:`Unsupported` where a mask says more.
    """
    found: list[Tensor | None] = []
    for mask in masks:
        if mask is None and eager and length > 1:
            raise Unsupported("no mask says what the tokens of the prompt see")
        if isinstance(mask, Tensor) and mask.dtype is torch.bool and eager:
            raise Unsupported("the mask has dtype torch.bool, and is added to the scores")
        found.append(real_in_prompt(mask, batch, length, whole))
    first = found[0]
    for other in found[1:]:
        same = first is other or (first is not None and other is not None and torch.equal(first, other))
        if not same:
            raise Unsupported("layers of different kinds get masks with different padding")
    if first is not None and not bool(first.any(1).all()):
        raise Unsupported("a sequence of the prompt is padding alone")
    return first


def positions_of(positions: Any, batch: int, length: int, turned: int) -> list[Tensor]:
    """cos and sin `[B, S, turned]`; none where nothing turns."""
    if not turned:
        return []
    return [table.expand(batch, length, turned).contiguous() for table in cos_and_sin(positions, batch, length, turned)]


def cos_and_sin(positions: Any, batch: int, length: int, turned: int) -> tuple[Tensor, Tensor]:
    """What layers get as ``position_embeddings``, float32 `[B or 1, S, turned]`. :class:`Unsupported` on anything
    else.
    """
    if not isinstance(positions, tuple) or len(positions) != 2:
        raise Unsupported("its layers get no position_embeddings of cos and sin")
    for table in positions:
        fits = type(table) is Tensor and table.dtype is torch.float32 and table.is_cpu and table.dim() == 3
        if not fits or table.shape[0] not in (1, batch) or table.shape[1:] != (length, turned):
            raise Unsupported(f"expected positions as float32 [{batch} or 1, {length}, {turned}]")
    return positions
