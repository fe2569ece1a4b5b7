"""Attention blocks and feed-forward blocks, found by their structure, and shrinking them for real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

__all__ = [
    "AttentionBlock",
    "FeedForward",
    "ShrinkReport",
    "attention_blocks",
    "feed_forwards",
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
_OUTPUTS = ("out_proj", "o_proj", "out_lin", "output", "to_out", "wo", "o", "out", "proj", "dense")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads")
_HEAD_SIZES = ("attention_head_size", "head_dim", "head_size", "key_value_proj_dim")
_WIDTHS = ("all_head_size", "inner_dim")
_FFN = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("lin1",), "lin2"),
    (("linear1",), "linear2"),
    (("up_proj",), "down_proj"),
    (("expand",), "contract"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)


@dataclass(frozen=True)
class AttentionBlock:
    """One attention: the names of its four Linears. ``units`` groups of ``queries`` query heads share one key/value
    head (one head each without grouping); every head is ``head_dim`` wide.
    """

    name: str
    query: str
    key: str
    value: str
    output: str
    units: int
    queries: int
    head_dim: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value, self.output)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward block of ``neurons``: their rows in ``ups`` (one Linear, or gate and up), their columns in
    ``down``.
    """

    name: str
    ups: tuple[str, ...]
    down: str
    neurons: int

    @property
    def layers(self) -> tuple[str, ...]:
        return (*self.ups, self.down)


def attention_blocks(model: nn.Module) -> tuple[list[AttentionBlock], dict[str, str]]:
    """The attention blocks found, and name -> why not for those that cannot be cut by heads."""
    blocks, reasons = [], {}
    per_head_bias = next((n for n, _ in model.named_modules() if "relative_attention_bias" in n), None)
    for fqn, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            reasons[fqn] = "nn.MultiheadAttention packs query, key and value in one weight"
            continue
        names = next((n for n in _QKV if all(isinstance(getattr(module, c, None), nn.Linear) for c in n)), None)
        if names is None:
            continue
        found = _attention(model, fqn, module, names)
        if isinstance(found, str):
            reasons[fqn] = found
        elif per_head_bias is not None:
            reasons[fqn] = f"{per_head_bias} holds a position bias for every head"
        else:
            blocks.append(found)
    return blocks, reasons


def _attention(model: nn.Module, fqn: str, module: nn.Module, names: Sequence[str]) -> AttentionBlock | str:
    query, key, value = (getattr(module, n) for n in names)
    output = _output_of(model, fqn, module, value.out_features)
    if key.out_features != value.out_features:
        return f"key and value differ in width: {key.out_features} and {value.out_features}"
    head_dim = next((int(getattr(module, a)) for a in _HEAD_SIZES if isinstance(getattr(module, a, None), int)), None)
    if head_dim is None:
        count = next((int(getattr(module, a)) for a in _HEAD_COUNTS if isinstance(getattr(module, a, None), int)), None)
        if count is None or count < 1 or query.out_features % count:
            return f"the number of heads is not known: none of {', '.join(_HEAD_COUNTS)} is an attribute"
        head_dim = query.out_features // count
    if head_dim < 1 or key.out_features % head_dim or query.out_features % key.out_features:
        return f"widths {query.out_features} and {key.out_features} are not whole heads of {head_dim}"
    if output is None:
        return "no Linear found that reads the attention's output"
    width = _linear(model, output).in_features
    if width != query.out_features:
        return f"{output} reads {width} features, not the {query.out_features} of all heads"
    prefix = f"{fqn}." if fqn else ""
    units, queries = key.out_features // head_dim, query.out_features // key.out_features
    q, k, v = (prefix + n for n in names)
    return AttentionBlock(fqn, q, k, v, output, units, queries, head_dim)


def _output_of(model: nn.Module, fqn: str, module: nn.Module, width: int) -> str | None:
    prefix = f"{fqn}." if fqn else ""
    for name in _OUTPUTS:
        if isinstance(getattr(module, name, None), nn.Linear):
            return prefix + name
        if name == "to_out" and _linear_at(module, "to_out.0") is not None:
            return f"{prefix}to_out.0"
    if not fqn:
        return None
    parent = fqn.rpartition(".")[0]
    around = model.get_submodule(parent) if parent else model
    sibling = getattr(getattr(around, "output", None), "dense", None)
    if isinstance(sibling, nn.Linear):
        return f"{parent}.output.dense" if parent else "output.dense"
    return None


def feed_forwards(model: nn.Module) -> tuple[list[FeedForward], dict[str, str]]:
    """The feed-forward blocks found, and name -> why not for those that cannot be cut by neurons."""
    blocks, reasons = [], {}
    for fqn, module in model.named_modules():
        for ups, down in _FFN:
            linears = [_linear_at(module, name) for name in (*ups, down)]
            if any(linear is None for linear in linears):
                continue
            widths = {linear.out_features for linear in linears[:-1] if linear is not None}
            last = linears[-1]
            if last is None or widths != {last.in_features}:
                continue
            prefix = f"{fqn}." if fqn else ""
            inner = [
                m for m in _near(module) if isinstance(m, nn.LayerNorm) and m.normalized_shape[-1] == last.in_features
            ]
            if inner and last.in_features != last.out_features:
                reasons[fqn] = "a LayerNorm runs over the neurons"
            else:
                blocks.append(FeedForward(fqn, tuple(prefix + u for u in ups), prefix + down, last.in_features))
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
    model.
    """

    heads: dict[str, tuple[int, int]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, int]] = field(default_factory=dict)
    parameters_before: int = 0
    parameters_after: int = 0
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"]
        lines += [f"  {name}: heads {a} -> {b}" for name, (a, b) in self.heads.items()]
        lines += [f"  {name}: neurons {a} -> {b}" for name, (a, b) in self.neurons.items()]
        lines += [f"  {name}: left as it is: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


@torch.no_grad()
def shrink_(model: nn.Module) -> ShrinkReport:
    """Cuts out, in place, the heads and neurons whose output columns are all zero; the model computes the same as
    before.

    Modules and parameter names stay, sizes change, and the number of heads is set where an attention keeps it. One unit
    of every block stays, zeroed or not, for reshapes need one. The parameters are new tensors: make the optimiser
    afterwards. :func:`restore_shapes` brings a fresh model to the shrunken sizes before a checkpoint is loaded.
    """
    report = ShrinkReport(parameters_before=sum(p.numel() for p in model.parameters()))
    attentions, reasons = attention_blocks(model)
    report.left.update(reasons)
    for block in attentions:
        columns = _weight(model, block.output).reshape(-1, block.units, block.queries * block.head_dim)
        keep = _kept(columns.ne(0).any(dim=2).any(dim=0))
        report.heads[block.name] = (block.units * block.queries, len(keep) * block.queries)
        if len(keep) == block.units:
            continue
        wide = _spread(keep, block.queries * block.head_dim)
        narrow = _spread(keep, block.head_dim)
        _cut_rows(model, block.query, wide)
        _cut_rows(model, block.key, narrow)
        _cut_rows(model, block.value, narrow)
        _cut_columns(model, block.output, wide)
        _set_heads(model.get_submodule(block.name), block, len(keep))
    forwards, reasons = feed_forwards(model)
    report.left.update(reasons)
    for forward in forwards:
        keep = _kept(_weight(model, forward.down).ne(0).any(dim=0))
        report.neurons[forward.name] = (forward.neurons, len(keep))
        if len(keep) == forward.neurons:
            continue
        for up in forward.ups:
            _cut_rows(model, up, keep)
        _cut_columns(model, forward.down, keep)
    report.parameters_after = sum(p.numel() for p in model.parameters())
    return report


@torch.no_grad()
def restore_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Brings the Linears named to the sizes given, fqn -> (out_features, in_features); returns the names that changed.

    New weights are zero, to be overwritten by a checkpoint. The number of heads is set where an attention keeps it.
    ValueError where a name is no Linear, or where a size is not that of a shrunken block of this model: the query
    and its output must agree and hold whole heads, likewise the sides of a feed-forward block.
    """
    linears: dict[str, tuple[int, int]] = {}
    for fqn, shape in shapes.items():
        linear = _linear_at(model, fqn) if fqn else model
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"restore_shapes: {fqn!r} is no Linear of {type(model).__name__}; load into the "
                "architecture it was saved from"
            )
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"restore_shapes: {fqn} expected (out_features, in_features), got {list(shape)}")
        if tuple(shape) != (linear.out_features, linear.in_features):
            linears[fqn] = (int(shape[0]), int(shape[1]))
    cut: set[str] = set()
    heads = []
    for block in attention_blocks(model)[0]:
        if not any(fqn in linears for fqn in block.layers):
            continue
        rows = {fqn: linears.get(fqn, (_linear(model, fqn).out_features, 0))[0] for fqn in block.layers[:3]}
        columns = linears.get(block.output, (0, _linear(model, block.output).in_features))[1]
        units = rows[block.key] // block.head_dim
        wide = units * block.queries * block.head_dim
        if (
            rows[block.key] % block.head_dim
            or rows[block.value] != rows[block.key]
            or {rows[block.query], columns} != {wide}
        ):
            raise ValueError(
                f"restore_shapes: sizes of {block.name} expected whole heads of {block.head_dim} that agree, got query "
                f"{rows[block.query]}, key {rows[block.key]}, value {rows[block.value]}, output {columns}"
            )
        cut.update(block.layers)
        heads.append((block, units))
    for forward in feed_forwards(model)[0]:
        if not any(fqn in linears for fqn in forward.layers):
            continue
        sizes = {linears.get(up, (_linear(model, up).out_features, 0))[0] for up in forward.ups}
        sizes.add(linears.get(forward.down, (0, _linear(model, forward.down).in_features))[1])
        if len(sizes) != 1:
            raise ValueError(f"restore_shapes: sizes of {forward.name} expected to agree, got {sorted(sizes)}")
        cut.update(forward.layers)
    for fqn, shape in linears.items():
        linear = _linear(model, fqn)
        own = (linear.out_features, linear.in_features)
        if fqn not in cut:
            raise ValueError(
                f"restore_shapes: {fqn} expected {list(own)}, got {list(shape)}, and it belongs to no block that can "
                "be shrunk; load into the architecture it was saved from"
            )
        _put(linear, linear.weight.new_zeros(shape), None if linear.bias is None else linear.bias.new_zeros(shape[0]))
    for block, units in heads:
        _set_heads(model.get_submodule(block.name), block, units)
    return list(linears)


def _linear(model: nn.Module, fqn: str) -> nn.Linear:
    linear = model.get_submodule(fqn)
    if not isinstance(linear, nn.Linear):
        raise ValueError(f"{fqn!r} expected to be an nn.Linear, got {type(linear).__name__}; densify_ the model first")
    return linear


def _weight(model: nn.Module, fqn: str) -> Tensor:
    return _linear(model, fqn).weight.detach()


def _kept(alive: Tensor) -> Tensor:
    kept = alive.nonzero().flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.int64, device=alive.device)


def _spread(units: Tensor, width: int) -> Tensor:
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def _cut_rows(model: nn.Module, fqn: str, rows: Tensor) -> None:
    linear = _linear(model, fqn)
    _put(linear, linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _cut_columns(model: nn.Module, fqn: str, columns: Tensor) -> None:
    linear = _linear(model, fqn)
    _put(linear, linear.weight[:, columns], linear.bias)


def _put(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if bias is not None and bias is not linear.bias:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=linear.bias.requires_grad)
    linear.out_features, linear.in_features = weight.shape


def _set_heads(module: nn.Module, block: AttentionBlock, units: int) -> None:
    heads, left = block.units * block.queries, units * block.queries
    sizes = [(name, heads, left) for name in _HEAD_COUNTS]
    sizes += [(name, heads * block.head_dim, left * block.head_dim) for name in _WIDTHS]
    for name, before, after in [*sizes, ("num_key_value_heads", block.units, units)]:
        if getattr(module, name, None) == before:
            setattr(module, name, after)
