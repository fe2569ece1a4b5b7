"""Encoder layers by structure: what one computes, as projections, norms and numbers, read off its children.

Each recogniser looks at the children and attributes of a layer, never at its class name alone. What it gives is a
claim: :mod:`.proof` runs both forms before anything is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ..expose import Attention
from ..fusion import epilogue_of
from ..linear import SparseLinear
from ..packed_only import PackedLinear
from ..rounded import RoundedLinear

__all__ = ["LayerParts", "Projection", "UnknownLayer", "check_claimed", "first_known", "may_be_layer", "recognise"]

_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, RoundedLinear, SparseLinear, PackedLinear)


class _Checked(Protocol):
    def check(self) -> None: ...


Parts = TypeVar("Parts", bound=_Checked)


class UnknownLayer(Exception):
    """A layer that is not one of ours, and why."""


class Projection(NamedTuple):
    """The outputs [begin, end) of a Linear, an activation behind them. module: an ``nn.Linear``, a
    :class:`SparseLinear`, or an ``nn.MultiheadAttention``, whose packed input projection is meant.
    """

    module: nn.Module
    begin: int
    end: int
    activation: str = "none"

    @property
    def bias(self) -> Tensor | None:
        """`[outputs of the module]`."""
        name = "in_proj_bias" if isinstance(self.module, nn.MultiheadAttention) else "bias"
        found: Tensor | None = getattr(self.module, name)
        return found

    @property
    def inputs(self) -> int:
        module: Any = self.module
        return module.embed_dim if isinstance(module, nn.MultiheadAttention) else module.in_features

    @property
    def outputs(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class LayerParts:
    """One encoder layer: attention and feed-forward, each with a residual and a norm, which comes ``before`` or behind.

    inputs: the projections to queries, keys and values, one behind the other, ``heads * depth`` features of each; gate:
    multiplied with the activated ``up``; kind: layers of one kind get the same masks and places; window: the most
    places between a query and its keys, -1 for any; rotary, biased: the call brings cos and sin, or a bias of the
    scores; sequence_first: hidden states are `[S, B, D]`; mask: the argument that says which tokens are real.
    """

    inputs: tuple[Projection, ...]
    output: Projection
    up: Projection
    down: Projection
    heads: int
    depth: int
    factor: float
    attention_norm: nn.Module | None
    ffn_norm: nn.Module
    before: bool
    gate: Projection | None = None
    kind: str = ""
    window: int = -1
    rotary: bool = False
    biased: bool = False
    sequence_first: bool = False
    mask: str = "attention_mask"

    @property
    def hidden(self) -> int:
        return self.inputs[0].inputs

    @property
    def projections(self) -> list[Projection]:
        return [*self.inputs, self.output, self.up, *([] if self.gate is None else [self.gate]), self.down]

    @property
    def norms(self) -> list[nn.Module]:
        return [n for n in (self.attention_norm, self.ffn_norm) if n is not None]

    def check(self) -> None:
        """:class:`UnknownLayer` where the parts do not fit each other."""
        width, hidden = self.heads * self.depth, self.hidden
        if self.heads < 1 or sum(p.outputs for p in self.inputs) != 3 * width or self.output.inputs != width:
            raise UnknownLayer(f"its projections do not give {self.heads} heads of {self.depth} features")
        ffn = self.up.outputs if self.gate is None else self.gate.outputs
        if not (self.output.outputs == self.down.outputs == hidden and ffn == self.up.outputs == self.down.inputs):
            raise UnknownLayer("its projections do not fit each other")
        for norm in (self.attention_norm, self.ffn_norm):
            if norm is not None and (not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (hidden,)):
                raise UnknownLayer(f"its norm is {type(norm).__name__}, not an nn.LayerNorm over [{hidden}]")
            if norm is not None and norm.weight is None:
                raise UnknownLayer("its LayerNorm has no weight")
        if not self.before and self.attention_norm is None:
            raise UnknownLayer("it has no norm behind its attention")


def may_be_layer(layer: nn.Module) -> bool:
    """Whether this has the looks of a transformer's layer: a child for attention and more than one Linear."""
    linears = sum(isinstance(m, (nn.Linear, SparseLinear)) for m in layer.modules())
    names = {name for name, _ in layer.named_children()}
    return linears > 1 and (any("att" in name for name in names) or {"query", "key", "value"} <= names)


def check_claimed(layer: nn.Module, others: Iterable[Tensor], projections: Iterable[Projection]) -> None:
    """:class:`UnknownLayer` where the layer has a parameter that is neither of a projection nor among ``others``: what
    it does to the result may show only later, when it has learned.
    """
    claimed = {id(p) for projection in projections for p in projection.module.parameters()} | set(map(id, others))
    for name, parameter in layer.named_parameters():
        if id(parameter) not in claimed:
            raise UnknownLayer(f"its parameter {name} is no part of what is known")


def recognise(layer: nn.Module) -> LayerParts:
    """What this layer claims to compute. Raises :class:`UnknownLayer` where it is none that is known."""
    known: tuple[Callable[[Any], LayerParts | None], ...]
    known = (_torch, _bert, _distilbert, _mpnet, _modernbert, _vit, _plain)
    return first_known(known, layer, "encoder layers")


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Around code of others that is tried out: whatever it raises is an :class:`UnknownLayer`, ``what`` and why."""
    try:
        yield
    except UnknownLayer:
        raise
    except Exception as error:
        raise UnknownLayer(f"{what}: {str(error) or type(error).__name__}") from error


def first_known(known: Sequence[Callable[[Any], Parts | None]], layer: nn.Module, what: str) -> Parts:
    """What the first recogniser that knows the layer gives, checked. Raises :class:`UnknownLayer` where none does."""
    for one in known:
        with foreign(f"its {type(layer).__name__} is another structure"):  # children by name, something else in them
            parts = one(layer)
            if parts is not None:
                parts.check()
                return parts
    raise UnknownLayer(f"its layers are no {what} of a known structure, but {type(layer).__name__}")


def _at(module: nn.Module, *paths: str) -> list[Any] | None:
    """The descendants with these names, or None where one is missing."""
    found = []
    for path in paths:
        here: Any = module
        for name in path.split("."):
            here = here._modules.get(name) if isinstance(here, nn.Module) else None
        if here is None:
            return None
        found.append(here)
    return found


def _projection(module: nn.Module, activation: nn.Module | None = None) -> Projection:
    """All outputs of a Linear, and the activation module that follows it, which may have been fused into it."""
    if type(module) not in _LINEARS:
        raise UnknownLayer(f"it holds {type(module).__name__} where a Linear is expected")
    linear: Any = module
    name = "none"
    if isinstance(linear, SparseLinear):
        if linear.low_rank_a is not None:
            raise UnknownLayer("a low-rank term")
        name = linear.activation
    if activation is not None:
        following = epilogue_of(activation)
        if following is None or name != "none":
            raise UnknownLayer(f"its activation is {type(activation).__name__}")
        name = following
    return Projection(linear, 0, linear.out_features, name)


def _parts(
    inputs: Sequence[nn.Module], output: nn.Module, up: Projection, down: nn.Module, depth: int, factor: float,
    attention_norm: nn.Module | None, ffn_norm: nn.Module, before: bool, **options: Any,
) -> LayerParts:  # fmt: skip
    projections = tuple(map(_projection, inputs))
    heads = sum(p.outputs for p in projections) // (3 * depth)
    return LayerParts(
        projections, _projection(output), up, _projection(down), heads, depth, factor, attention_norm, ffn_norm, before,
        **options,
    )  # fmt: skip


def _bert(layer: Any) -> LayerParts | None:
    """BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA: post-norm."""
    found = _at(
        layer, "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
        "output.LayerNorm",
    )  # fmt: skip
    if found is None:
        return None
    q, k, v, o, attention_norm, up, activation, down, norm = found
    inner = layer.attention.self
    if getattr(layer, "is_decoder", False) or getattr(inner, "is_decoder", False):
        raise UnknownLayer("its layers are those of a decoder")
    if getattr(inner, "position_embedding_type", None) not in (None, "absolute"):
        raise UnknownLayer(f"its attention adds {inner.position_embedding_type} places")
    depth = inner.attention_head_size
    factor = getattr(inner, "scaling", depth**-0.5)
    return _parts((q, k, v), o, _projection(up, activation), down, depth, factor, attention_norm, norm, False)


def _distilbert(layer: Any) -> LayerParts | None:
    found = _at(
        layer, "attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "sa_layer_norm",
        "ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm",
    )  # fmt: skip
    if found is None:
        return None
    q, k, v, o, attention_norm, up, activation, down, norm = found
    attention = layer.attention
    depth = getattr(attention, "attention_head_size", None) or q.out_features // attention.n_heads
    return _parts((q, k, v), o, _projection(up, activation), down, depth, depth**-0.5, attention_norm, norm, False)


def _mpnet(layer: Any) -> LayerParts | None:
    """Post-norm with a bias of the scores by relative place."""
    found = _at(
        layer, "attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", "attention.LayerNorm",
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "output.LayerNorm",
    )  # fmt: skip
    if found is None:
        return None
    q, k, v, o, attention_norm, up, activation, down, norm = found
    depth = layer.attention.attn.attention_head_size
    up = _projection(up, activation)
    return _parts((q, k, v), o, up, down, depth, depth**-0.5, attention_norm, norm, False, biased=True)


def _modernbert(layer: Any) -> LayerParts | None:
    """Pre-norm, rotary, some layers local, gated feed-forward; the first layer has no norm before its attention."""
    found = _at(layer, "attn.Wqkv", "attn.Wo", "attn_norm", "mlp_norm", "mlp.Wi", "mlp.act", "mlp.Wo")
    if found is None or not hasattr(layer, "attention_type"):
        return None
    qkv, o, attention_norm, norm, both, activation, down = found
    whole, depth = _projection(both), layer.attn.head_dim
    name = epilogue_of(activation)
    if name is None or whole.activation != "none" or whole.outputs % 2:
        raise UnknownLayer(f"its activation is {type(activation).__name__}")
    half = whole.outputs // 2
    up, gate = whole._replace(end=half, activation=name), whole._replace(begin=half)
    # transformers counts one place more than may lie between a query and its keys
    window = layer.attn.sliding_window
    return _parts(
        (qkv,), o, up, down, depth, depth**-0.5, None if isinstance(attention_norm, nn.Identity) else attention_norm,
        norm, True, gate=gate, kind=layer.attention_type, window=-1 if window is None else window - 1, rotary=True,
    )  # fmt: skip


def _vit(layer: Any) -> LayerParts | None:
    """Pre-norm, by the names of transformers 5 or by those before."""
    norms = _at(layer, "layernorm_before", "layernorm_after")
    if norms is None:
        return None
    names = [f"attention.{name}_proj" for name in "qkvo"], ["mlp.fc1", "mlp.activation_fn", "mlp.fc2"]
    older = (
        ["attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense"],
        ["intermediate.dense", "intermediate.intermediate_act_fn", "output.dense"],
    )
    for projections, ffn in (names, older):
        linears, feed = _at(layer, *projections), _at(layer, *ffn)
        if linears is not None and feed is not None:
            break
    else:
        return None
    known = {"attention", "layernorm_before", "layernorm_after", "dropout", "mlp", "intermediate", "output"}
    if set(layer._modules) - known:
        raise UnknownLayer(f"it has more children than those of a ViT layer: {sorted(layer._modules)}")
    attention = _at(layer, "attention.attention") or [layer.attention]
    depth = getattr(attention[0], "head_dim", None) or attention[0].attention_head_size
    factor = getattr(attention[0], "scaling", depth**-0.5)
    up, activation, down = feed
    before, behind = norms
    return _parts(linears[:3], linears[3], _projection(up, activation), down, depth, factor, before, behind, True)


def _plain(layer: Any) -> LayerParts | None:
    """The layers of :class:`sparseprune.runner.text_encoder.TextEncoder`."""
    found = _at(
        layer, "query", "key", "value", "output", "attention_norm", "ffn_norm", "ffn.expand", "ffn.activation",
        "ffn.contract",
    )  # fmt: skip
    if found is None or not isinstance(getattr(layer, "heads", None), int):
        return None
    q, k, v, o, attention_norm, norm, up, activation, down = found
    depth, up = q.out_features // layer.heads, _projection(up, activation)
    return _parts((q, k, v), o, up, down, depth, depth**-0.5, attention_norm, norm, True, mask="keep")


def _torch(layer: Any) -> LayerParts | None:
    """nn.TransformerEncoderLayer, its attention packed or with Linears of its own."""
    if type(layer) is not nn.TransformerEncoderLayer:
        return None
    attention: Any = layer.self_attn
    up = _projection(layer.linear1)
    activation: Callable[..., Any] = layer.activation
    functions = {F.relu: "relu", F.gelu: "gelu"}
    name = epilogue_of(activation) if isinstance(activation, nn.Module) else functions.get(activation)
    if name is None or up.activation != "none":
        raise UnknownLayer(f"its activation is {getattr(activation, '__name__', type(activation).__name__)}")
    up = up._replace(activation=name)
    inputs: tuple[Projection, ...]
    if type(attention) is Attention:
        inputs = tuple(_projection(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    elif type(attention) is nn.MultiheadAttention and attention._qkv_same_embed_dim:
        if attention.bias_k is not None or attention.add_zero_attn:
            raise UnknownLayer("its attention has bias_k or add_zero_attn")
        inputs = (Projection(attention, 0, 3 * attention.embed_dim),)
    else:
        raise UnknownLayer(f"its attention is {type(attention).__name__}")
    return LayerParts(
        inputs, _projection(attention.out_proj), up, _projection(layer.linear2), attention.num_heads,
        attention.head_dim, attention.head_dim**-0.5, layer.norm1, layer.norm2, layer.norm_first,
        sequence_first=not attention.batch_first, mask="src_key_padding_mask",
    )  # fmt: skip
