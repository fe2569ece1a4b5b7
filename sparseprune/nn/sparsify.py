"""sparsify_ and densify_: ``nn.Linear`` to :class:`SparseLinear` where it pays, measured on this machine, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _native, backends, bench, native
from .filters import FilterFn, select_linears, take_fast_path_, take_slow_path_
from .fusion import Fusion, fuse_, hooked, unfuse_
from .linear import VALUES, SparseLinear, why_not_direct
from .rounded import RoundedLinear

__all__ = ["DensifyReport", "LayerChoice", "SparsifyReport", "densify_", "explain", "sparsify_"]

LAYOUTS = ("auto", "csr", "bsr", "nm")
DENSE_VALUES = ("float32", "bfloat16")

# What layout="auto" tries: column blocks along the outputs for bsr, widest first, and the usual N:M patterns.
_BLOCKSIZES = ((16, 1), (8, 1), (4, 1))
_PATTERNS = ((2, 4), (4, 8), (1, 4))
_MIN_FILL = 0.8  # share of non-zeros in the stored blocks below which a bsr layout is not tried
_MIN_RATIO = 1.1

# A decode step passes over the whole model between two calls of a layer. Its weights are then in memory unless all of
# them fit what one program can count on of the last cache, however large a shared one says it is.
# Timing a call right after a flush would count the interpreter's own misses; copies of the layer in turn do not.
_FEW = 8
_CACHED = 32 << 20
_IN_TURN = 64 << 20


@dataclass(frozen=True)
class LayerChoice:
    """One layer: ``layout`` it runs in now ("dense" where it was left), ``ratio`` over dense (None: not measured),
    ``reason``.
    """

    name: str
    shape: tuple[int, int]
    density: float
    layout: str
    ratio: float | None
    reason: str


@dataclass(frozen=True)
class SparsifyReport:
    """What :func:`sparsify_` did: ``layers`` in the model's order, ``fusions``, ``skipped`` Linears with the reason,
    and with ``dense_values`` the Linears that are not sparse: ``rounded``, layout "bfloat16" where that is faster.
    """

    layers: list[LayerChoice]
    fusions: list[Fusion] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    rounded: list[LayerChoice] = field(default_factory=list)

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

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':<{width}}  {'shape':>11}  density  layout     ratio  reason"]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            ratio = "    -" if layer.ratio is None else f"{layer.ratio:5.2f}"
            lines.append(
                f"{layer.name:<{width}}  {shape:>11}  {layer.density:7.4f}  {layer.layout:<9}  {ratio}  {layer.reason}"
            )
        lines.append(f"{len(self.converted)} of {len(self.layers)} layers sparse, {len(self.skipped)} Linears left out")
        done = [f for f in self.fusions if not f.reason]
        lines += [f"fused: {f.name} + {f.what}" for f in done]
        lines += [f"not fused: {f.name} + {f.what}: {f.reason}" for f in self.fusions if f.reason]
        lines += [f"{r.layout}, {r.ratio:.2f} times dense: {r.name}" for r in self.rounded if r.layout != "dense"]
        lines += [f"not rounded: {r.name}: {r.reason}" for r in self.rounded if r.layout == "dense"]
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


def sparsify_(
    model: nn.Module,
    layout: str = "auto",
    tokens: int | Sequence[int] = 128,
    fuse: bool = True,
    filter_fn: FilterFn | None = None,
    *,
    blocksize: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
    values: str = "float32",
    per_call: bool = True,
    dense_values: str = "float32",
) -> SparsifyReport:
    """Replaces in place the model's pruned Linears by :class:`SparseLinear` where that pays, and reports why or why
    not.

    ``layout="auto"`` times dense and every layout that fits the zeros of a layer, at its shape and density, with
    ``tokens`` rows of x, interleaved, on this machine with the threads torch is set to; a sparse one is taken from a
    ratio of 1.1 up, else the layer stays dense. Several numbers, with ``per_call``: each gets the packed form that
    suits it, and from where dense wins the unpacked weight serves, which is kept beside it (the reason
    says so); without ``per_call`` one packed form serves all and the worst case decides. Up to 8 rows are timed
    with the weight coming from memory where the selected Linears take more than 32 MiB together. "csr" | "bsr"
    (``blocksize``, 16x1 by default) | "nm" (``nm``, 2:4 by default) forces one on every selected Linear without
    measuring. ``fuse``: activations, residuals and LayerNorms that follow move into the kernels' epilogues where that
    is safe, and RMSNorms run in one pass. ``values``: how inference holds the weights, "float32" (exact), "bfloat16" or
    "int8".

    ``dense_values="bfloat16"`` also holds the Linears that stay dense, the head among them, rounded for calls of up to
    8 rows, those of ``tokens`` where that is measured faster (ratio of 1.1 up): a copy beside the exact weight, which
    longer calls, training and a tied embedding go on using (:class:`RoundedLinear`). It changes the results of layers
    that were not pruned, hence not by default.

    ``filter_fn(module, fqn)`` replaces the default choice of Linears. Raises ValueError on an unknown layout, a layout
    that does not fit, a filter that selects nothing, and for a model that is itself a Linear (use
    ``SparseLinear.from_linear``); the model is then as it was.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "sparsify_: expected a model that holds Linears, got a Linear; use SparseLinear.from_linear(linear)"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"sparsify_: layout expected one of {LAYOUTS}, got {layout!r}")
    if values not in VALUES:
        raise ValueError(f"sparsify_: values expected one of {VALUES}, got {values!r}")
    if dense_values not in DENSE_VALUES:
        raise ValueError(f"sparsify_: dense_values expected one of {DENSE_VALUES}, got {dense_values!r}")
    counts = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if not counts or min(counts) < 1:
        raise ValueError(f"sparsify_: tokens expected one or more numbers >= 1, got {tokens!r}")
    selection = select_linears(model, filter_fn)
    per_call = per_call and len(counts) > 1
    options: dict[str, Any] = {"tokens": counts if per_call else max(counts), "value_dtype": values}
    weights = sum(linear.weight.numel() * linear.weight.element_size() for linear in selection.selected.values())
    cold = weights > _CACHED
    choices: list[LayerChoice] = []
    replacements: dict[int, nn.Module] = {}
    memo: dict[Any, tuple[str, dict[str, Any], float | None, str]] = {}
    for name, linear in selection.selected.items():
        kept = _kept(linear)
        density = kept.float().mean().item()
        shape = (linear.out_features, linear.in_features)
        if layout == "auto":
            chosen, arguments, ratio, reason = _measure(linear, kept, density, counts, options, memo, cold)
        else:
            arguments = (
                {"layout": layout}
                | ({"blocksize": blocksize} if layout == "bsr" else {})
                | ({"nm": nm} if layout == "nm" else {})
            )
            chosen, ratio, reason = layout, None, f"layout={layout!r} was asked for"
        if chosen != "dense":
            try:
                sparse = SparseLinear.from_linear(linear, **arguments, **options)
            except ValueError as error:
                raise ValueError(f"sparsify_: {name}: {error}") from None
            replacements[id(linear)] = sparse
        choices.append(LayerChoice(name, shape, density, chosen, ratio, reason))
    _replace_(model, replacements)
    if replacements:
        take_slow_path_(model)
    fusions = fuse_(model) if fuse and replacements else []
    rounded = _round_(model, counts) if dense_values == "bfloat16" else []
    return SparsifyReport(choices, fusions, selection.skipped, rounded)


def _round_(model: nn.Module, counts: tuple[int, ...]) -> list[LayerChoice]:
    """Puts a RoundedLinear wherever a dense Linear in float32 is slower at one of the counts of up to 8 rows."""
    few = sorted(rows for rows in counts if rows <= _FEW)
    choices: list[LayerChoice] = []
    replacements: dict[int, nn.Module] = {}
    for name, linear in model.named_modules():
        if type(linear) is not nn.Linear or not isinstance(linear._parameters.get("weight"), nn.Parameter):
            continue
        weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        ratio, reason, most = None, "", 0
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            reason = f"needs float32 on the CPU, got {weight.dtype} on {weight.device}"
        elif _native.C is None:
            reason = _native.why_no_c() or ""
        elif hooked(linear):
            reason = "a hook observes the module"
        elif not few:
            reason = f"no call of up to {_FEW} rows among tokens={counts}"
        else:
            found = {rows: _rounded_ratio(weight, bias, rows) for rows in few}
            most = max((rows for rows, gain in found.items() if gain >= _MIN_RATIO), default=0)
            ratio = max(found.values())
            reason = "bfloat16 runs " + ", ".join(f"{gain:.2f} at {rows} tokens" for rows, gain in found.items())
        if most:
            replacements[id(linear)] = RoundedLinear.from_linear(linear, most)
        density = float(torch.count_nonzero(weight)) / max(1, weight.numel())
        layout = "bfloat16" if most else "dense"
        choices.append(LayerChoice(name, (linear.out_features, linear.in_features), density, layout, ratio, reason))
    _replace_(model, replacements)
    return choices


def _rounded_ratio(weight: Tensor, bias: Tensor | None, rows: int) -> float:
    """Dense time / time from a copy in bfloat16, each from memory."""
    copies = max(1, _IN_TURN // max(1, weight.numel() * weight.element_size()))

    def dense(count: int) -> Callable[[], object]:
        x, weights = torch.randn(count, weight.shape[1]), [weight, *(weight.clone() for _ in range(copies - 1))]
        return _without_grad(lambda: [F.linear(x, each, bias) for each in weights])

    def rounded(count: int) -> Callable[[], object]:
        x, weights = torch.randn(count, weight.shape[1]), [weight.bfloat16() for _ in range(copies)]
        return _without_grad(lambda: [native.decode.rounded_linear(x, each, bias) for each in weights])

    shape = (weight.shape[0], weight.shape[1])
    found = bench.choose_fastest(
        {"dense": dense, "rounded": rounded},
        tokens=(rows,),
        min_ratio=_MIN_RATIO,
        key=lambda label, count: bench.layer_key(shape, 1.0, label, count, weight.dtype, "values=bfloat16"),
    )
    return found.ratios["rounded"][rows]


def densify_(model: nn.Module) -> DensifyReport:
    """Puts an ``nn.Linear`` back in place of every :class:`SparseLinear` and :class:`RoundedLinear`, and undoes the
    fusions.

    The weights are bit-identical to those that were sparsified, except where a low-rank term was added in; the report
    says so.
    """
    unfuse_(model)
    take_fast_path_(model)
    replacements: dict[int, nn.Module] = {}
    names, notes = [], {}
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear):
            replacements[id(module)] = module.to_linear()
            names.append(name)
            if module.low_rank_a is not None:
                notes[name] = (
                    f"its low-rank term (rank {module.low_rank_a.shape[0]}) was added to the weight, which is dense now"
                )
        elif isinstance(module, RoundedLinear):
            replacements[id(module)] = module.to_linear()
    _replace_(model, replacements)
    return DensifyReport(names, notes)


def explain(layer: nn.Module, input: Tensor) -> str:
    """Which kernel runs ``layer(input)``, and why the others do not. layer: a :class:`SparseLinear`; input: `[...,
    K]`.
    """
    if not isinstance(layer, SparseLinear):
        raise TypeError(
            f"explain: expected a SparseLinear, got {type(layer).__name__}; "
            "sparsify_ says per layer why it stayed dense"
        )
    lines = [
        f"SparseLinear({layer.extra_repr()}) on x {list(input.shape)} {input.dtype} {input.device}"
    ]
    reason = why_not_direct(input, layer.bias, layer.values)
    forced = backends.forced_backend()
    if reason is None and forced not in (None, "native"):
        reason = f"SPARSEPRUNE_BACKEND={forced} asks for another backend"
    if reason is None:
        form = layer._form(input)
        if form == "unpacked":
            lines.append(f"F.linear on the unpacked weight: dense from {layer.dense_from} rows on")
            return "\n".join(lines)
        packed = layer._packed(form)
        reason = "; ".join(native.matmul.why_not_linear(input, packed))
    if not reason:
        lines.append(f"direct call, past torch's dispatcher: native.matmul.linear, tier {_native.require_c().tier()}")
        lines.append(
            f"  packed: {packed.nbytes} bytes, plan {packed.plan}, values {packed.values.dtype}"
        )
    else:
        lines.append(f"through torch's dispatcher: {reason}")
        lines.append(_explain_op(layer, input))
    return "\n".join(lines)


def _explain_op(layer: SparseLinear, input: Tensor) -> str:
    tensors = layer.to_layout()
    op = f"{layer.layout}_linear"
    if layer.layout == "nm":
        assert layer.nm is not None
        return backends.explain_op(
            op, input, layer.values, tensors.tensors()["indices"], *layer.nm, layer.bias, layer.activation
        )
    return backends.explain_op(
        op, input, layer.crow_indices, layer.col_indices, layer.values, layer.bias, layer.activation
    )


def _kept(linear: nn.Linear) -> Tensor:
    kept = linear.weight.detach() != 0
    mask = getattr(linear, "mask", None)
    return kept & mask if isinstance(mask, Tensor) else kept


def _fitting(kept: Tensor) -> dict[str, dict[str, Any]]:
    """Label -> arguments of from_linear, for every layout that fits the pattern of kept entries `[N, K]`."""
    rows, columns = kept.shape
    nnz = int(kept.sum())
    fitting: dict[str, dict[str, Any]] = {"csr": {"layout": "csr"}}
    for r, c in _BLOCKSIZES:
        if rows % r == 0 and columns % c == 0 and nnz:
            stored = int(kept.view(rows // r, r, columns // c, c).any(3).any(1).sum()) * r * c
            if nnz >= _MIN_FILL * stored:
                fitting[f"bsr{r}x{c}"] = {"layout": "bsr", "blocksize": (r, c)}
                break  # a narrower block has the same zeros and less reuse
    for n, m in _PATTERNS:
        if columns % m == 0 and nnz and int(kept.view(rows, columns // m, m).sum(2).max()) <= n:
            fitting[f"nm{n}:{m}"] = {"layout": "nm", "nm": (n, m)}
            break
    return fitting


def _measure(
    linear: nn.Linear,
    kept: Tensor,
    density: float,
    counts: tuple[int, ...],
    options: dict[str, Any],
    memo: dict[Any, tuple[str, dict[str, Any], float | None, str]],
    cold: bool,
) -> tuple[str, dict[str, Any], float | None, str]:
    """(label, arguments of from_linear, ratio, reason): what runs this layer fastest, "dense" included."""
    if density == 1.0:
        return "dense", {}, 1.0, "it has no zeros; prune it first"
    weight = linear.weight.detach()
    shape = (linear.out_features, linear.in_features)
    fitting = _fitting(kept)
    known = (shape, round(density, 2), tuple(fitting), weight.dtype, linear.bias is None)
    if known in memo:
        return memo[known]

    def inputs(rows: int) -> Tensor:
        return torch.randn(rows, shape[1], device=weight.device).to(weight.dtype)

    def copies(rows: int) -> int:
        in_memory = cold and rows <= _FEW
        return max(1, _IN_TURN // (weight.numel() * weight.element_size())) if in_memory else 1

    def dense(rows: int) -> Callable[[], object]:
        x, bias = inputs(rows), None if linear.bias is None else linear.bias.detach()
        weights = [weight, *(weight.clone() for _ in range(copies(rows) - 1))]
        return _without_grad(lambda: [F.linear(x, each, bias) for each in weights])

    def sparse(label: str) -> bench.choose.Setup:
        def setup(rows: int) -> Callable[[], object]:
            tuned = rows if isinstance(options["tokens"], tuple) else options["tokens"]
            layer = SparseLinear.from_linear(linear, **fitting[label], **{**options, "tokens": tuned}).eval()
            x = inputs(rows)
            layers = [layer, *(copy.deepcopy(layer) for _ in range(copies(rows) - 1))]
            return _without_grad(lambda: [each(x) for each in layers])

        return setup

    def choose(sizes: tuple[int, ...]) -> bench.Choice:
        note = f"values={options['value_dtype']}" + (",in turn" if cold and max(sizes) <= _FEW else "")
        return bench.choose_fastest(
            {"dense": dense, **{label: sparse(label) for label in fitting}},
            tokens=sizes,
            min_ratio=_MIN_RATIO,
            key=lambda label, rows: bench.layer_key(shape, round(density, 2), label, rows, weight.dtype, note),
        )

    if isinstance(options["tokens"], tuple):
        choices = {rows: choose((rows,)) for rows in sorted(counts)}
        ratios = {rows: {label: per[rows] for label, per in c.ratios.items()} for rows, c in choices.items()}
        memo[known] = _by_call(ratios, fitting)
    else:
        choice = choose(counts)
        memo[known] = choice.name, fitting.get(choice.name, {}), choice.ratio, choice.reason
    return memo[known]


def _by_call(
    ratios: dict[int, dict[str, float]], fitting: dict[str, dict[str, Any]]
) -> tuple[str, dict[str, Any], float | None, str]:
    """ratios: rows of x, rising -> label -> dense time / its time. The layout that gains most in the product over the
    call sizes, each of which takes what is faster; dense may win from some size on, not below it.
    """
    best, arguments, gain, reason = "dense", {}, 1.0, ""
    for label in fitting:
        found = {rows: per[label] for rows, per in ratios.items() if label in per}
        wins = [rows for rows, ratio in found.items() if ratio >= 1.0]
        losing = [rows for rows in found if rows not in wins]
        table = ", ".join(f"{ratio:.2f} at {rows} tokens" for rows, ratio in found.items())
        reason = reason or f"dense wins: {label} runs {table}"
        if not wins or max(found.values()) < _MIN_RATIO or (losing and min(losing) < max(wins)):
            continue
        product = math.prod(max(1.0, ratio) for ratio in found.values())
        if product > gain:
            best, gain, arguments = label, product, dict(fitting[label])
            reason = f"{label} runs {table}"
            if losing:
                arguments["dense_from"] = math.isqrt(max(wins) * min(losing)) + 1
                reason += f"; dense from {arguments['dense_from']} on"
    top = max((per.get(best, 1.0) for per in ratios.values()), default=1.0)
    return best, arguments, top if best != "dense" else 1.0, reason or "dense wins"


def _without_grad(call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return call()

    return run


def _replace_(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Puts each replacement wherever the module with that id hangs, be it under one name or several."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(module, name, replacements[id(child)])
