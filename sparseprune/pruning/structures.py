"""Attention blocks and feed-forward blocks, found by their structure, and shrinking them for real."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.unpack import is_conv1d, refuse_save_pretrained_

__all__ = [
    "AttentionBlock",
    "FeedForward",
    "Share",
    "ShrinkReport",
    "attention_blocks",
    "feed_forwards",
    "head_groups",
    "position_biases",
    "restore_shapes",
    "shrink_",
]

_QKV = (
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
)
# One Linear for all three, and how its rows usually lie: all queries, all keys, all values, or query, key and value of
# one head after the other.
_PACKED = {"query_key_value": "by head", **dict.fromkeys(("qkv", "Wqkv", "c_attn", "qkv_proj"), "by kind")}
_OUTPUTS = ("out_proj", "o_proj", "out_lin", "output", "to_out", "wo", "o", "out", "proj", "dense", "c_proj", "Wo")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
_HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim")
_WIDTHS = ("all_head_size", "inner_dim", "split_size", "attn_dim")
_FFN = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("Wi",), "Wo"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("up_proj",), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("expand",), "contract"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("intermediate.dense",), "output.dense"),
)
_BIAS = "relative_attention_bias"
# Where a transformers configuration keeps these sizes.
_CONFIG_HEADS = (*_HEAD_COUNTS, "encoder_attention_heads", "decoder_attention_heads", "num_decoder_heads")
_CONFIG_NEURONS = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "d_ff", "n_inner",
)  # fmt: skip


@dataclass(frozen=True)
class Share:
    """What every unit owns of one weight: along ``dim`` (0 rows, 1 columns), for each width w of ``widths``, w lines of
    a segment of units * w; the segments lie one after the other.
    """

    layer: str
    dim: int
    widths: tuple[int, ...]

    def lines(self, units: int) -> Tensor:
        """int64 `[units, sum(widths)]`: the lines of each unit."""
        found, start = [], 0
        for width in self.widths:
            found.append(start + torch.arange(units * width).view(units, width))
            start += units * width
        return torch.cat(found, 1)

    def units(self, size: int) -> int | None:
        """How many units give ``size`` lines; None where they would not be whole."""
        return None if size % sum(self.widths) else size // sum(self.widths)


@dataclass(frozen=True)
class AttentionBlock:
    """One attention. ``units`` groups of ``queries`` query heads share one key/value head (one head each without
    grouping); every head is ``head_dim`` wide. ``shares``: what a unit owns of the Linears, ``output`` the last.

    ``bias``: its column of an Embedding of position biases. ``tied``: blocks with one name here read one bias and must
    keep the same units. ``from_config``: the number of heads is read from the configuration at every call.
    """

    name: str
    shares: tuple[Share, ...]
    units: int
    queries: int
    head_dim: int
    bias: Share | None = None
    tied: str = ""
    from_config: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(share.layer for share in self.shares)

    @property
    def output(self) -> str:
        return self.shares[-1].layer

    @property
    def heads(self) -> int:
        return self.units * self.queries


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block of ``neurons``: their rows in the expanding Linears (one, or gate and up, or both in one),
    their columns in ``down``, the last of ``shares``.
    """

    name: str
    shares: tuple[Share, ...]
    neurons: int

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(share.layer for share in self.shares)

    @property
    def down(self) -> str:
        return self.shares[-1].layer


def head_groups(blocks: Iterable[AttentionBlock]) -> list[list[AttentionBlock]]:
    """The blocks, those that are tied together in one list."""
    groups: dict[str, list[AttentionBlock]] = {}
    for block in blocks:
        groups.setdefault(block.tied or f" {block.name}", []).append(block)
    return list(groups.values())


def attention_blocks(model: nn.Module) -> tuple[list[AttentionBlock], dict[str, str]]:
    """The attention blocks found, and name -> why not for those that cannot be cut by heads."""
    blocks, reasons = [], {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[fqn] = (
                "nn.MultiheadAttention packs query, key and value in one weight; call sparseprune.use_linears_(model) "
                "first"
            )
            continue
        names = next((n for n in _QKV if all(isinstance(getattr(module, c, None), nn.Linear) for c in n)), None)
        packed = next((n for n in _PACKED if hasattr(module, n)), None)
        if names is not None:
            found = _separate(model, fqn, module, names)
        elif packed is not None and isinstance(getattr(module, packed), nn.Linear):
            found = _packed(model, fqn, module, packed)
        elif packed is not None and is_conv1d(getattr(module, packed)):
            found = f"{packed} is a Conv1D, no nn.Linear; call sparseprune.use_linears_(model) first"
        else:
            continue
        if isinstance(found, str):
            reasons[fqn] = found
        else:
            blocks.append(found)
    return _tie(model, blocks, reasons), reasons


def position_biases(model: nn.Module) -> set[str]:
    """The names of the Embeddings that hold a column for each head of attentions that can be cut."""
    return {block.bias.layer for block in attention_blocks(model)[0] if block.bias}


def _separate(model: nn.Module, fqn: str, module: nn.Module, names: Sequence[str]) -> AttentionBlock | str:
    query, key, value = (getattr(module, n) for n in names)
    if key.out_features != value.out_features:
        return f"key and value differ in width: {key.out_features} and {value.out_features}"
    head_dim = _integer(module, _HEAD_SIZES)
    if head_dim is None:
        count = _integer(module, _HEAD_COUNTS)
        if count is None or count < 1 or query.out_features % count:
            return f"the number of heads is not known: none of {', '.join(_HEAD_COUNTS)} is an attribute"
        head_dim = query.out_features // count
    if head_dim < 1 or key.out_features % head_dim or query.out_features % key.out_features:
        return f"widths {query.out_features} and {key.out_features} are not whole heads of {head_dim}"
    units, queries = key.out_features // head_dim, query.out_features // key.out_features
    widths = ((queries * head_dim,), (head_dim,), (head_dim,))
    rows = tuple(Share(_join(fqn, name), 0, width) for name, width in zip(names, widths))
    return _block(model, fqn, module, rows, units, queries, head_dim)


def _packed(model: nn.Module, fqn: str, module: nn.Module, name: str) -> AttentionBlock | str:
    """One Linear for query, key and value. How its rows lie is a convention of its name; where the attention can be
    called with nothing but hidden states, it is called to see.
    """
    rows = getattr(module, name).out_features
    if getattr(module, "multi_query", False) or getattr(module, "new_decoder_architecture", False):
        return f"{name} packs keys and values that heads share in a way of its own"
    head_dim, count = _integer(module, _HEAD_SIZES), _integer(module, _HEAD_COUNTS)
    key_values = _integer(module, ("num_key_value_heads",))
    if name == "qkv_proj":
        if key_values is None or head_dim is None:
            return f"how {name} packs query, key and value is not known: expected num_key_value_heads and head_dim"
        queries, rest = divmod(rows - 2 * key_values * head_dim, max(1, key_values * head_dim))
        if rest or queries < 1:
            return f"{rows} rows of {name} are not whole heads of {head_dim} for {key_values} keys"
        shares = (Share(_join(fqn, name), 0, (queries * head_dim, head_dim, head_dim)),)
        found = _block(model, fqn, module, shares, key_values, queries, head_dim)
        return replace(found, from_config=count is None) if isinstance(found, AttentionBlock) else found
    if name == "c_attn" and (hasattr(module, "q_attn") or getattr(module, "split_size", 0) * 3 != rows):
        return "c_attn packs something else than query, key and value of equal width"
    if head_dim is None and count and rows % (3 * count) == 0:
        head_dim = rows // (3 * count)
    if not head_dim or rows % (3 * head_dim) or (count and count * 3 * head_dim != rows):
        return f"{rows} rows of {name} are not query, key and value of whole heads; their number or size is not known"
    ways = {"by kind": (head_dim,) * 3, "by head": (3 * head_dim,)}
    for way in sorted(ways, key=lambda w: w != _PACKED[name]):
        share = Share(_join(fqn, name), 0, ways[way])
        found = _block(model, fqn, module, (share,), rows // (3 * head_dim), 1, head_dim)
        if isinstance(found, str) or _holds(model, found) is not False:
            return found
    return "its forward does not follow when a head is cut out"


@torch.no_grad()
def _holds(model: nn.Module, block: AttentionBlock) -> bool | None:
    """Whether the attention alone computes the same with its first unit cut out as with it silenced; None where it
    cannot be called with hidden states alone, or has one unit.
    """
    module = model.get_submodule(block.name)
    prefix = f"{block.name}." if block.name else ""
    if block.units < 2 or not all(layer.startswith(prefix) for layer in block.layers):
        return None
    alone = replace(
        block, name="", shares=tuple(replace(s, layer=s.layer[len(prefix) :]) for s in block.shares), bias=None
    )
    weight = _weight(module, alone.shares[0].layer)
    x = torch.randn(2, 3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    silenced = copy.deepcopy(module).eval()
    _weight(silenced, alone.output)[:, alone.shares[-1].lines(block.units)[0]] = 0
    try:
        expected = _first(silenced(x))
    except Exception:
        return None
    _cut_units(silenced, alone, torch.arange(1, block.units))
    try:
        return bool(torch.allclose(_first(silenced(x)), expected, rtol=1e-3, atol=1e-5))
    except Exception:
        return False


def _first(out: Any) -> Tensor:
    found = out[0] if isinstance(out, tuple | list) else out
    if not isinstance(found, Tensor):
        raise TypeError(f"expected a tensor, got {type(found).__name__}")
    return found


def _block(
    model: nn.Module, fqn: str, module: nn.Module, rows: Sequence[Share], units: int, queries: int, head_dim: int
) -> AttentionBlock | str:
    output = _output_of(model, fqn, module)
    if output is None:
        return "no Linear found that reads the attention's output"
    width, heads = _weight(model, output).shape[1], units * queries
    if width != heads * head_dim:
        return f"{output} reads {width} features, not the {heads * head_dim} of all heads"
    called_with = inspect.signature(module.forward).parameters
    if "alibi" in called_with:
        return "it is given a slope for each head (alibi) that is computed for all heads of all layers"
    bias = None
    if isinstance(getattr(module, _BIAS, None), nn.Embedding):
        bias = Share(_join(fqn, _BIAS), 1, (queries,))
        if getattr(module, _BIAS).embedding_dim != heads:
            return f"{bias.layer} expected one column for each of {heads} heads, got {getattr(module, _BIAS)}"
    known = {share.layer for share in rows} | {output} | ({bias.layer} if bias else set())
    for name, part in module.named_modules():
        if _join(fqn, name) in known or "norm" in name.lower() or heads == 1:
            continue
        for own, parameter in part.named_parameters(recurse=False):
            shape = parameter.shape[:1] if isinstance(part, nn.Linear) else parameter.shape
            if heads in shape and "norm" not in own:
                whose = _join(_join(fqn, name), own)
                return f"{whose} {list(parameter.shape)} may hold something for each of the {heads} heads"
    shares = (*rows, Share(output, 1, (queries * head_dim,)))
    return AttentionBlock(fqn, shares, units, queries, head_dim, bias)


def _tie(model: nn.Module, blocks: list[AttentionBlock], reasons: dict[str, str]) -> list[AttentionBlock]:
    """Ties the blocks that read one position bias, and drops those whose bias comes from where it cannot be cut."""
    shared = {}  # the module that holds a bias for the attentions below it -> the bias
    owners = {block.name for block in blocks if block.bias}
    for fqn, module in model.named_modules():
        parent, _, last = fqn.rpartition(".")
        if last == _BIAS and parent not in owners:
            shared[parent] = (fqn, module)
    families: dict[str, list[AttentionBlock]] = {}
    for block in blocks:
        if hasattr(model.get_submodule(block.name), f"has_{_BIAS}"):
            families.setdefault(_numbered(block.name), []).append(block)
    made = []
    for block in blocks:
        module = model.get_submodule(block.name)
        family = families.get(_numbered(block.name), [])
        near = [p for p in shared if not p or block.name.startswith(f"{p}.")]
        if block in family and not all(b.bias for b in family):
            # The first one's bias is handed on to the others (T5), in cross attention one of zeros.
            made.append(replace(block, tied=_numbered(block.name)))
        elif near and not block.bias:
            bias, holder = shared[max(near, key=len)]
            if not isinstance(holder, nn.Embedding) or holder.embedding_dim != block.heads:
                reasons[block.name] = f"{bias} holds a position bias for every head, but not one column for each"
            else:
                made.append(replace(block, tied=bias, bias=Share(bias, 1, (block.queries,))))
        elif not block.bias and "position_bias" in inspect.signature(module.forward).parameters and not family:
            reasons[block.name] = "it is given a position bias that holds something for each head"
        else:
            made.append(block)
    return made


def _numbered(name: str) -> str:
    """The name with its first number, the layer's, taken out."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join([*parts[:first], "#", *parts[first + 1 :]])


def _output_of(model: nn.Module, fqn: str, module: nn.Module) -> str | None:
    for name in _OUTPUTS:
        if isinstance(getattr(module, name, None), nn.Linear):
            return _join(fqn, name)
        if name == "to_out" and _linear_at(module, "to_out.0") is not None:
            return _join(fqn, "to_out.0")
    if not fqn:
        return None
    parent = fqn.rpartition(".")[0]
    around = model.get_submodule(parent) if parent else model
    sibling = getattr(getattr(around, "output", None), "dense", None)
    return _join(parent, "output.dense") if isinstance(sibling, nn.Linear) else None


def feed_forwards(model: nn.Module) -> tuple[list[FeedForward], dict[str, str]]:
    """The feed-forward blocks found, and name -> why not for those that cannot be cut by neurons."""
    blocks, reasons = [], {}
    for fqn, module in model.named_modules():
        for ups, down in _FFN:
            last = _linear_at(module, down)
            linears = [_linear_at(module, name) for name in ups]
            if last is None or any(linear is None for linear in linears):
                conv = [name for name in (*ups, down) if is_conv1d(getattr(module, name, None))]
                if len(conv) == len(ups) + 1:
                    reasons[fqn] = f"{conv[0]} is a Conv1D, no nn.Linear; call sparseprune.use_linears_(model) first"
                continue
            # Twice the width: gate and up in one Linear, one below the other.
            parts = {linear.out_features / last.in_features for linear in linears if linear is not None}
            if parts != {1} and not (parts == {2} and len(ups) == 1):
                continue
            inner = [
                m for m in _near(module) if isinstance(m, nn.LayerNorm) and m.normalized_shape[-1] == last.in_features
            ]
            if inner and last.in_features != last.out_features:
                reasons[fqn] = "a LayerNorm runs over the neurons"
            else:
                rows = tuple(Share(_join(fqn, up), 0, (1,) * int(max(parts))) for up in ups)
                blocks.append(FeedForward(fqn, (*rows, Share(_join(fqn, down), 1, (1,))), last.in_features))
            break
    return blocks, reasons


def _linear_at(module: nn.Module, path: str) -> nn.Linear | None:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Linear) else None


def _near(module: nn.Module) -> list[nn.Module]:
    return [m for name, m in module.named_modules() if name.count(".") < 2]


@dataclass
class ShrinkReport:
    """What :func:`shrink_` did: name -> (units before, units after) of each block, and the parameters of the whole
    model. ``unconfigured``: why no transformers configuration describes the new sizes; empty where one does, or where
    there is none.
    """

    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    left: dict[str, str] = field(default_factory=dict)
    unconfigured: str = ""

    def __str__(self) -> str:
        lines = [f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"]
        lines += [f"  {name}: heads {a} -> {b}" for name, (a, b) in self.heads.items()]
        lines += [f"  {name}: neurons {a} -> {b}" for name, (a, b) in self.neurons.items()]
        lines += [f"  {name}: left as it is: {why}" for name, why in self.left.items()]
        lines += [f"  save_pretrained: {self.unconfigured}"] if self.unconfigured else []
        return "\n".join(lines)


@torch.no_grad()
def shrink_(model: nn.Module) -> ShrinkReport:
    """Cuts out, in place, the heads and neurons whose output columns are all zero; the model computes the same as
    before.

    Modules and parameter names stay, sizes change, and the number of heads is set where an attention keeps it. One unit
    of every block stays, zeroed or not, for reshapes need one. Attentions that read one position bias keep the same
    heads, and the bias loses the columns of the others. The parameters are new tensors: make the optimiser afterwards.
    :func:`restore_shapes` brings a fresh model to the shrunken sizes before a checkpoint is loaded.

    A transformers model's configuration is brought in line where it can describe the sizes (all layers alike, and a
    width of a head that does not follow from the number of heads), so that ``save_pretrained`` and ``from_pretrained``
    work; elsewhere ``save_pretrained`` raises from now on and names :func:`sparseprune.save`.
    """
    report = ShrinkReport(parameters_before=sum(p.numel() for p in model.parameters()))
    attentions, reasons = attention_blocks(model)
    report.left.update(reasons)
    plan: list[tuple[AttentionBlock, Tensor]] = []
    for group in head_groups(attentions):
        alive = torch.stack([_alive(model, block.shares[-1], block.units) for block in group]).any(0)
        plan += [(block, _kept(alive)) for block in group]
    counts = {len(keep) for block, keep in plan if block.from_config}
    for block, keep in plan:
        if block.from_config and len(counts) > 1:
            report.left[block.name] = (
                f"the configuration holds one number of heads for all layers, expected as many in each, got "
                f"{', '.join(map(str, sorted(counts)))}; prune with scope='layer'"
            )
            continue
        report.heads[block.name] = (block.heads, len(keep) * block.queries)
        if len(keep) < block.units:
            _cut_units(model, block, keep)
    forwards, reasons = feed_forwards(model)
    report.left.update(reasons)
    for forward in forwards:
        keep = _kept(_alive(model, forward.shares[-1], forward.neurons))
        report.neurons[forward.name] = (forward.neurons, len(keep))
        if len(keep) < forward.neurons:
            for share in forward.shares:
                _cut(model, share, share.lines(forward.neurons), keep)
    report.parameters_after = sum(p.numel() for p in model.parameters())
    cut = [(block, len(keep)) for block, keep in plan if block.name in report.heads]
    report.unconfigured = _configure(model, cut, report.neurons)
    return report


@torch.no_grad()
def restore_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Brings the weights named to the sizes given, fqn -> (out_features, in_features) of a Linear or, of an Embedding
    that holds a position bias for each head, (buckets, heads); returns the names that changed.

    New weights are zero, to be overwritten by a checkpoint. The number of heads is set where an attention keeps it, and
    in the configuration as by :func:`shrink_`. ValueError where a name is neither, or where a size is not that of a
    shrunken block of this model: what a block's weights say about its heads or neurons must be whole and agree.
    """
    changed: dict[str, tuple[int, int]] = {}
    for fqn, shape in shapes.items():
        found = dict(model.named_modules()).get(fqn)
        if not isinstance(found, nn.Linear | nn.Embedding):
            raise ValueError(
                f"restore_shapes: {fqn!r} is no Linear of {type(model).__name__}; load into the "
                "architecture it was saved from"
            )
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"restore_shapes: {fqn} expected (out_features, in_features), got {list(shape)}")
        if tuple(shape) != tuple(found.weight.shape):
            changed[fqn] = (int(shape[0]), int(shape[1]))
    heads: list[tuple[AttentionBlock, int]] = []
    neurons: list[tuple[FeedForward, int]] = []
    for group in head_groups(attention_blocks(model)[0]):
        shares = [share for block in group for share in (*block.shares, *([block.bias] if block.bias else []))]
        if any(share.layer in changed for share in shares):
            heads += [(block, _units(model, group[0].name, shares, changed, group[0].head_dim)) for block in group]
    for forward in feed_forwards(model)[0]:
        if any(share.layer in changed for share in forward.shares):
            neurons.append((forward, _units(model, forward.name, forward.shares, changed)))
    made: dict[str, tuple[int, int]] = {}
    parts = [(s, units) for block, units in heads for s in (*block.shares, *([block.bias] if block.bias else []))]
    parts += [(s, units) for forward, units in neurons for s in forward.shares]
    for share, units in parts:
        rows, columns = made.get(share.layer, tuple(_weight(model, share.layer).shape))
        size = units * sum(share.widths)
        made[share.layer] = (rows, size) if share.dim else (size, columns)
    for fqn, wanted in changed.items():
        own = list(_weight(model, fqn).shape)
        if made.get(fqn) != wanted:
            raise ValueError(
                f"restore_shapes: {fqn} expected {list(made.get(fqn, own))}, got {list(wanted)}, and it belongs to no "
                "block that can be shrunk so; load into the architecture it was saved from"
            )
    for fqn, shape in made.items():
        _put(model.get_submodule(fqn), _weight(model, fqn).new_zeros(shape))
    for block, units in heads:
        _set_heads(model.get_submodule(block.name), block, units)
    _configure(model, heads, {forward.name: (forward.neurons, units) for forward, units in neurons})
    return [fqn for fqn in made if fqn in changed]


def _units(
    model: nn.Module, name: str, shares: Iterable[Share], changed: Mapping[str, tuple[int, int]], head_dim: int = 0
) -> int:
    """How many units the sizes leave; ValueError unless all shares say the same."""
    said = {}
    for share in shares:
        size = changed.get(share.layer, tuple(_weight(model, share.layer).shape))[share.dim]
        said[share.layer] = (size, share.units(size))
    found = {units for _, units in said.values()}
    if len(found) == 1 and (units := next(iter(found))):
        return units
    what = f"whole heads of {head_dim} that agree" if head_dim else "to agree"
    got = ", ".join(f"{layer} {size}" for layer, (size, _) in said.items())
    raise ValueError(f"restore_shapes: sizes of {name or 'the model'} expected {what}, got {got}")


def _matrix(model: nn.Module, fqn: str) -> nn.Linear | nn.Embedding:
    found = model.get_submodule(fqn)
    if not isinstance(found, nn.Linear | nn.Embedding):
        raise ValueError(f"{fqn!r} expected to be an nn.Linear, got {type(found).__name__}; densify_ the model first")
    return found


def _weight(model: nn.Module, fqn: str) -> Tensor:
    return _matrix(model, fqn).weight.detach()


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn and name else fqn or name


def _integer(module: nn.Module, names: Iterable[str]) -> int | None:
    return next((int(getattr(module, n)) for n in names if isinstance(getattr(module, n, None), int)), None)


def _alive(model: nn.Module, share: Share, units: int) -> Tensor:
    """bool `[units]`: the units with any weight left in this share."""
    used = _weight(model, share.layer).ne(0).any(1 - share.dim)
    return used[share.lines(units)].any(1)


def _kept(alive: Tensor) -> Tensor:
    kept = alive.nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=alive.device)


def _cut_units(model: nn.Module, block: AttentionBlock, keep: Tensor) -> None:
    """Cuts an attention down to the units ``keep``; a bias that several share is cut with the first of them."""
    for share in (*block.shares, *([block.bias] if block.bias else [])):
        lines = share.lines(block.units)
        if _weight(model, share.layer).shape[share.dim] == lines.numel():
            _cut(model, share, lines, keep)
    _set_heads(model.get_submodule(block.name), block, len(keep))


def _cut(model: nn.Module, share: Share, lines: Tensor, keep: Tensor) -> None:
    """``lines`` of all units `[units, width]`; those of ``keep`` stay, in their order."""
    module = _matrix(model, share.layer)
    left = lines[keep.to(lines.device)].flatten().sort().values.to(module.weight.device)
    bias = module.bias if isinstance(module, nn.Linear) and share.dim == 0 else None
    _put(module, module.weight.detach().index_select(share.dim, left), None if bias is None else bias.detach()[left])


def _put(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """A weight of another size, and a bias where it has one: as given, else zeros."""
    assert isinstance(module, nn.Linear | nn.Embedding)
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    if isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
        return
    module.out_features, module.in_features = weight.shape
    if module.bias is not None and len(module.bias) != len(weight):
        bias = module.bias.new_zeros(len(weight)) if bias is None else bias
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=module.bias.requires_grad)


def _set_heads(module: nn.Module, block: AttentionBlock, units: int) -> None:
    heads, left = block.heads, units * block.queries
    sizes = [(name, heads, left) for name in _HEAD_COUNTS]
    sizes += [(name, heads * block.head_dim, left * block.head_dim) for name in _WIDTHS]
    sizes += [("num_key_value_heads", block.units, units)]
    for name, before, after in sizes:
        if getattr(module, name, None) == before:
            setattr(module, name, after)
    if block.from_config:
        config: Any = module.config
        config.num_attention_heads, config.num_key_value_heads, config.head_dim = left, units, block.head_dim


def _configure(
    model: nn.Module, blocks: Sequence[tuple[AttentionBlock, int]], neurons: Mapping[str, tuple[int, int]]
) -> str:
    """Brings a transformers configuration in line with the model's sizes: ``blocks`` with the units they keep, neurons
    before and after. Where a model built from it would not have them, the configuration stays and ``save_pretrained``
    is made to refuse; returns why.
    """
    config = getattr(model, "config", None)
    heads = {block.name: (block.heads, units * block.queries) for block, units in blocks}
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return ""
    if all(before == left for before, left in (*heads.values(), *neurons.values())):
        return ""
    changes: dict[str, int] = {}
    for sizes, names in ((heads, _CONFIG_HEADS), (neurons, _CONFIG_NEURONS)):
        after: dict[int, set[int]] = {}
        for before, left in sizes.values():
            after.setdefault(before, set()).add(left)
        for before, left_in in after.items():
            if len(left_in) > 1:
                what = "heads" if sizes is heads else "neurons"
                return _refuse(model, f"the layers keep unlike numbers of {what}: {sorted(left_in)} of {before}")
            for name in names:
                own = getattr(config, name, None)
                if own == before or (name == "n_inner" and hasattr(config, name) and own is None):
                    changes[name] = next(iter(left_in))
    widths: dict[str, int] = {}  # of a head, for configurations that would derive it from the number of heads
    for block, units in blocks:
        if units < block.units:
            widths["head_dim"] = block.head_dim
            if getattr(config, "num_key_value_heads", None) == block.units:
                changes["num_key_value_heads"] = units
    why = ""
    for extra in ({}, widths):
        wanted = copy.deepcopy(config)
        for name, value in (changes | extra).items():
            setattr(wanted, name, value)
        try:
            with torch.device("meta"):
                template = type(model)(wanted)
        except Exception as error:
            why = f"no {type(model).__name__} can be built with {changes | extra}: {error}"
            continue
        if _sizes(template) == _sizes(model):
            for name, value in (changes | extra).items():
                setattr(config, name, value)
            return ""
        why = f"{type(config).__name__} cannot describe these sizes: with {changes | extra} a model differs"
    return _refuse(model, why)


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Everything about sizes in which two models of one class can differ."""
    found: dict[str, Any] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for fqn, module in model.named_modules():
        for name in (*_HEAD_COUNTS, *_HEAD_SIZES, *_WIDTHS, "num_key_value_heads", "num_key_value_groups"):
            if isinstance(getattr(module, name, None), int):
                found[f"{fqn}.{name}"] = getattr(module, name)
    return found


def _refuse(model: nn.Module, why: str) -> str:
    refuse_save_pretrained_(model, why)
    return why
