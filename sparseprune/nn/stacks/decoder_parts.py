"""Decoder layers by structure: what one computes for a new token, read off its children.

Each recogniser looks at the children and attributes of a layer, never at its class name alone. What it gives is a
claim: :mod:`.decoder_proof` runs both forms before anything is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fusion import FusedRMSNorm
from ..fusion.patterns import eps_of
from .recognise import Projection, UnknownLayer, _at, _projection, first_known

__all__ = ["DecoderParts", "NormParts", "may_be_decoder", "recognise_decoder"]


class NormParts(NamedTuple):
    """LayerNorm, or without ``centred`` RMSNorm; plus_one: the gain is 1 + weight."""

    module: nn.Module
    eps: float
    centred: bool = False
    plus_one: bool = False

    @property
    def weight(self) -> Tensor:
        found: Tensor = self.module.weight  # type: ignore[assignment]
        return found

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias if self.centred else None  # type: ignore[return-value]


@dataclass(frozen=True)
class DecoderParts:
    """One decoder layer, its norms in front: x + output(attention(norm x)), then + down(feed-forward(norm of that)), or
    where ``parallel`` both of the same x.

    inputs: the projections to queries, keys and values, one behind the other; or one whose heads each have the three
    beside each other (``interleaved``). gate: activated and multiplied with ``up``. place: of the layer in the cache.
    turned: features of a head that rotary places turn, 0: none. kind: layers of one kind get the same masks and places.
    mask, cache: the names of these arguments.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    up: Projection
    down: Projection
    gate: Projection | None
    heads: int
    kv_heads: int
    depth: int
    factor: float
    turned: int
    attention_norm: NormParts
    ffn_norm: NormParts
    place: int
    parallel: bool = False
    interleaved: bool = False
    q_norm: NormParts | None = None
    k_norm: NormParts | None = None
    kind: str = ""
    cache: str = "past_key_values"
    mask: str = "attention_mask"

    @property
    def hidden(self) -> int:
        return self.inputs[0].inputs

    @property
    def inner(self) -> int:
        return self.up.outputs

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output, *([] if self.gate is None else [self.gate]), self.up, self.down]

    @property
    def norms(self) -> list[NormParts]:
        return [n for n in (self.attention_norm, self.ffn_norm, self.q_norm, self.k_norm) if n is not None]

    def check(self) -> None:
        """:class:`UnknownLayer` where the parts do not fit each other."""
        heads, kv, depth, hidden = self.heads, self.kv_heads, self.depth, self.hidden
        if heads < 1 or kv < 1 or heads % kv or sum(p.outputs for p in self.inputs) != (heads + 2 * kv) * depth:
            raise UnknownLayer(f"its projections do not give {heads} heads of {depth} features, {kv} of keys")
        if self.output.inputs != heads * depth or self.turned % 2 or not 0 <= self.turned <= depth:
            raise UnknownLayer(f"its output does not read {heads} heads of {depth} features")
        gate = self.up if self.gate is None else self.gate
        if not (self.output.outputs == self.down.outputs == hidden and gate.outputs == self.inner == self.down.inputs):
            raise UnknownLayer("its projections do not fit each other")
        if any(p.inputs != hidden for p in (*self.inputs, self.up, gate)):
            raise UnknownLayer("its projections do not read the hidden states")
        sizes = (hidden, hidden, depth, depth)
        for norm, size in zip((self.attention_norm, self.ffn_norm, self.q_norm, self.k_norm), sizes):
            if norm is not None and norm.weight.shape != (size,):
                raise UnknownLayer(f"a norm is over {list(norm.weight.shape)}, expected [{size}]")
        if self.place is None or not isinstance(self.place, int):
            raise UnknownLayer("its attention has no layer_idx")


def may_be_decoder(layer: nn.Module) -> bool:
    """Whether this has the looks of a decoder's layer."""
    return any(_at(layer, *paths) is not None for paths in (_LLAMA, _PHI, _NEOX, _GPT2))


def recognise_decoder(layer: nn.Module) -> DecoderParts:
    """What this layer claims to compute. Raises :class:`UnknownLayer` where it is none that is known."""
    known: tuple[Callable[[Any], DecoderParts | None], ...] = (_llama, _phi, _neox, _gpt2)
    return first_known(known, layer, "decoder layers")


def _only(module: nn.Module, names: Collection[str]) -> None:
    """:class:`UnknownLayer` where the module has children beside these and dropouts."""
    more = [n for n, m in module._modules.items() if n not in names and m is not None and type(m) is not nn.Dropout]
    if more:
        raise UnknownLayer(f"its {type(module).__name__} has more children than are known: {sorted(more)}")


@torch.no_grad()
def _norm(module: Any) -> NormParts:
    if type(module) is nn.LayerNorm:
        if module.weight is None or len(module.normalized_shape) != 1:
            raise UnknownLayer("its LayerNorm has no weight")
        return NormParts(module, module.eps, True)
    if type(module) is FusedRMSNorm:
        return NormParts(module, module.eps)
    eps = eps_of(module)
    if eps is None:
        raise UnknownLayer(f"its norm is {type(module).__name__}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, module.weight.numel(), generator=generator, dtype=torch.float32)
    found, plain = module(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    for plus_one in (False, True):
        if torch.allclose(found, plain * (module.weight + plus_one), rtol=1e-4, atol=1e-5):
            return NormParts(module, eps, False, plus_one)
    raise UnknownLayer(f"its norm {type(module).__name__} is no RMSNorm")


_LLAMA = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.act_fn", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def _llama(layer: Any) -> DecoderParts | None:
    """Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma."""
    found = _at(layer, *_LLAMA)
    if found is None:
        return None
    norm, q, k, v, o, behind, gate, activation, up, down = found
    attention = layer.self_attn
    _only(layer, ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"))
    _only(attention, ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"))
    _only(layer.mlp, ("gate_proj", "up_proj", "down_proj", "act_fn"))
    depth = attention.head_dim
    norms = _at(attention, "q_norm", "k_norm") or (None, None)
    q_norm, k_norm = (None if n is None else _norm(n) for n in norms)
    inputs = tuple(map(_projection, (q, k, v)))
    return DecoderParts(
        inputs, _projection(o), _projection(up), _projection(down), _projection(gate, activation),
        inputs[0].outputs // depth, inputs[1].outputs // depth, depth, attention.scaling, depth, _norm(norm),
        _norm(behind), attention.layer_idx, q_norm=q_norm, k_norm=k_norm,
        kind=str(getattr(attention, "layer_type", None) or getattr(layer, "attention_type", "")),
    )  # fmt: skip


_PHI = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1",
    "mlp.activation_fn", "mlp.fc2",
)  # fmt: skip


def _phi(layer: Any) -> DecoderParts | None:
    """Phi: attention and feed-forward of the same norm, partial rotary places."""
    found = _at(layer, *_PHI)
    if found is None:
        return None
    norm, q, k, v, o, up, activation, down = found
    attention = layer.self_attn
    _only(layer, ("input_layernorm", "self_attn", "mlp"))
    _only(attention, ("q_proj", "k_proj", "v_proj", "dense", "q_layernorm", "k_layernorm"))
    depth = attention.head_dim
    norms = _at(attention, "q_layernorm", "k_layernorm") or (None, None)
    q_norm, k_norm = (None if n is None else _norm(n) for n in norms)
    inputs, before = tuple(map(_projection, (q, k, v))), _norm(norm)
    return DecoderParts(
        inputs, _projection(o), _projection(up, activation), _projection(down), None, inputs[0].outputs // depth,
        inputs[1].outputs // depth, depth, attention.scaling, attention.rotary_ndims, before, before,
        attention.layer_idx, parallel=True, q_norm=q_norm, k_norm=k_norm,
    )  # fmt: skip


_NEOX = (
    "input_layernorm", "attention.query_key_value", "attention.dense", "post_attention_layernorm",
    "mlp.dense_h_to_4h", "mlp.act", "mlp.dense_4h_to_h",
)  # fmt: skip


def _neox(layer: Any) -> DecoderParts | None:
    """GPT-NeoX, Pythia: the three of a head beside each other."""
    found = _at(layer, *_NEOX)
    if found is None:
        return None
    norm, qkv, o, behind, up, activation, down = found
    attention = layer.attention
    _only(layer, ("input_layernorm", "attention", "post_attention_layernorm", "mlp"))
    _only(attention, ("query_key_value", "dense"))
    depth, whole = attention.head_size, _projection(qkv)
    heads = whole.outputs // (3 * depth)
    return DecoderParts(
        (whole,), _projection(o), _projection(up, activation), _projection(down), None, heads, heads, depth,
        attention.scaling, attention.rotary_ndims, _norm(norm), _norm(behind), attention.layer_idx,
        parallel=bool(layer.use_parallel_residual), interleaved=True, cache="layer_past",
    )  # fmt: skip


_GPT2 = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.act", "mlp.c_proj")


def _gpt2(layer: Any) -> DecoderParts | None:
    """GPT-2, its Conv1D made Linears."""
    found = _at(layer, *_GPT2)
    if found is None:
        return None
    norm, qkv, o, behind, up, activation, down = found
    attention = layer.attn
    _only(layer, ("ln_1", "attn", "ln_2", "mlp"))
    _only(attention, ("c_attn", "c_proj"))
    heads, depth = attention.num_heads, attention.head_dim
    return DecoderParts(
        (_projection(qkv),), _projection(o), _projection(up, activation), _projection(down), None, heads, heads, depth,
        attention.scaling, 0, _norm(norm), _norm(behind), attention.layer_idx,
    )  # fmt: skip
