"""Attention blocks and feed-forward blocks of a model, found by their structure."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from ..nn.expose import is_conv1d
from .alone import holds
from .cut import weight_of
from .units import HEAD_COUNTS, HEAD_SIZES, AttentionBlock, FeedForward, Share

__all__ = ["attention_blocks", "feed_forwards", "position_biases"]

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


def attention_blocks(model: nn.Module) -> tuple[list[AttentionBlock], dict[str, str]]:
    """The attention blocks found, and name -> why not for those that cannot be cut by heads."""
    blocks, reasons = [], {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[fqn] = (
                "nn.MultiheadAttention packs query, key and value in one weight; call "
                "sparseprune.expose_linears_(model) first"
            )
            continue
        names = next((n for n in _QKV if all(isinstance(getattr(module, c, None), nn.Linear) for c in n)), None)
        packed = next((n for n in _PACKED if hasattr(module, n)), None)
        if names is not None:
            found = _separate(model, fqn, module, names)
        elif packed is not None and isinstance(getattr(module, packed), nn.Linear):
            found = _packed(model, fqn, module, packed)
        elif packed is not None and is_conv1d(getattr(module, packed)):
            found = f"{packed} is a Conv1D, no nn.Linear; call sparseprune.expose_linears_(model) first"
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
    head_dim = _integer(module, HEAD_SIZES)
    if head_dim is None:
        count = _integer(module, HEAD_COUNTS)
        if count is None or count < 1 or query.out_features % count:
            return f"the number of heads is not known: none of {', '.join(HEAD_COUNTS)} is an attribute"
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
    head_dim, count = _integer(module, HEAD_SIZES), _integer(module, HEAD_COUNTS)
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
    why = "its forward does not follow when a head is cut out"
    for way in sorted(ways, key=lambda w: w != _PACKED[name]):
        share = Share(_join(fqn, name), 0, ways[way])
        found = _block(model, fqn, module, (share,), rows // (3 * head_dim), 1, head_dim)
        if isinstance(found, str):
            why = found
        elif holds(model, found) is not False:
            return found
    return why


def _block(
    model: nn.Module, fqn: str, module: nn.Module, rows: Sequence[Share], units: int, queries: int, head_dim: int
) -> AttentionBlock | str:
    output = _output_of(model, fqn, module)
    if output is None:
        return "no Linear found that reads the attention's output"
    width, heads = weight_of(model, output).shape[1], units * queries
    if width != heads * head_dim:
        return f"{output} reads {width} features, not the {heads * head_dim} of all heads"
    called_with = inspect.signature(module.forward).parameters
    if "alibi" in called_with:
        return "it is given a slope for each head (alibi) that is computed for all heads of all layers"
    if "rel_pos" in called_with:
        return "it is given a position bias for each head (rel_pos) that is computed for all heads of all layers"
    bias = None
    if isinstance(getattr(module, _BIAS, None), nn.Embedding):
        bias = Share(_join(fqn, _BIAS), 1, (queries,))
        if getattr(module, _BIAS).embedding_dim != heads:
            return f"{bias.layer} expected one column for each of {heads} heads, got {getattr(module, _BIAS)}"
    known = {share.layer for share in rows} | {output} | ({bias.layer} if bias else set())
    shares = (*rows, Share(output, 1, (queries * head_dim,)))
    block = AttentionBlock(fqn, shares, units, queries, head_dim, bias)
    return _unfit(model, block, known) or block


def _unfit(model: nn.Module, block: AttentionBlock, known: set[str]) -> str:
    """Why heads cannot be cut: what the attention holds beside the layers ``known`` that goes by the head, or may."""
    if block.units == 1:
        return ""
    module, counts = model.get_submodule(block.name), {block.heads, block.units}
    widths = {count * block.head_dim for count in counts}
    doubts: dict[str, str] = {}  # the part -> why
    for name, part in module.named_modules():
        fqn = _join(block.name, name)
        if fqn in known:
            continue
        several = isinstance(part, nn.ModuleList | nn.ParameterList) and len(part) in counts
        if several and not any(layer.startswith(f"{fqn}.") for layer in known):
            return f"{fqn} holds {len(part)} parts and may have one for each of the {block.heads} heads"
        norm = "norm" in f"{name} {type(part).__name__}".lower()
        for own, parameter in part.named_parameters(recurse=False):
            shape, whose = list(parameter.shape), _join(fqn, own)
            if norm and shape == [block.head_dim]:
                continue  # one for all heads
            if counts.intersection(shape):
                return f"{whose} {shape} may hold something for each of the {block.heads} heads"
            if widths.intersection(shape):
                why = f"{whose} {shape} may run over all {block.heads} heads of {block.head_dim} features"
                doubts.setdefault(name, why)
    # That is the width of hidden states as well: whether it is theirs, or the heads', a run says.
    if doubts and not holds(model, block, doubts):
        return next(iter(doubts.values()))
    loose = [name for name, parameter in module.named_parameters(recurse=False) if parameter.numel() > 1]
    if loose and holds(model, block) is False:
        return f"its forward does not follow when a head is cut out; its own {', '.join(loose)} may mix heads"
    return ""


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
                    reasons[fqn] = f"{conv[0]} is a Conv1D, no nn.Linear; call sparseprune.expose_linears_(model) first"
                continue
            # Twice the width: gate and up in one Linear, one below the other.
            parts = {linear.out_features / last.in_features for linear in linears if linear is not None}
            if parts != {1} and not (parts == {2} and len(ups) == 1):
                continue
            rows = tuple(Share(_join(fqn, up), 0, (1,) * int(max(parts))) for up in ups)
            block = FeedForward(fqn, (*rows, Share(_join(fqn, down), 1, (1,))), last.in_features)
            over = _over_neurons(module, block)
            # A size that is the hidden states' as well says little, unless a run does.
            held = holds(model, block) if over else True
            if held is False or (held is None and last.in_features != last.out_features):
                reasons[fqn] = over
            else:
                blocks.append(block)
            break
    return blocks, reasons


def _over_neurons(module: nn.Module, block: FeedForward) -> str:
    """What the block holds beside its shares that has the size of the neurons; empty where nothing has."""
    for name, part in module.named_modules():
        if name.count(".") > 1 or _join(block.name, name) in block.layers or block.neurons == 1:
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if block.neurons in parameter.shape:
                whose = _join(_join(block.name, name), own)
                return f"a {type(part).__name__} runs over the neurons: {whose} {list(parameter.shape)}"
    return ""


def _linear_at(module: nn.Module, path: str) -> nn.Linear | None:
    found: object = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, nn.Linear) else None


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn and name else fqn or name


def _integer(module: nn.Module, names: Iterable[str]) -> int | None:
    return next((int(getattr(module, n)) for n in names if isinstance(getattr(module, n, None), int)), None)
