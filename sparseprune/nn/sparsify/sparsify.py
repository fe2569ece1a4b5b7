"""sparsify_: ``nn.Linear`` to :class:`SparseLinear` where it pays, measured on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..filters import FilterFn, own_forward, select_linears, take_slow_path_
from ..fusion import fuse_
from ..linear import SparseLinear
from ..matrices import unpack_pruned_
from ..packed_only import KEEP
from ..replace import replace_
from ..rounded import ROUNDED_DTYPES
from ..simulated import check_dtypes
from ..stacks import ENGINES, StackChoice, decoder_linears, use_stacks_
from .measure import Choice, measure
from .memory import check_keep, keep_packed_forms_, memory_of
from .reports import LayerChoice, SparsifyReport, note_dense_
from .rounding import round_
from .timing import CACHED, FEW

__all__ = ["sparsify_"]

LAYOUTS = ("auto", "csr", "bsr", "nm")
DENSE_VALUE_DTYPES = ("float32", *ROUNDED_DTYPES)


def sparsify_(
    model: nn.Module,
    layout: str = "auto",
    tokens: int | Sequence[int] = 128,
    fuse: bool = True,
    filter_fn: FilterFn | None = None,
    *,
    blocksize: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
    value_dtype: str = "float32",
    activations: str = "float32",
    per_call: bool = True,
    exact_layers: Sequence[str] = (),
    dense_value_dtype: str = "float32",
    engine: str = "auto",
    keep: str = "canonical",
) -> SparsifyReport:
    """Replaces in place the model's pruned Linears by :class:`SparseLinear` where that pays, and reports why or why
    not. Pruned Conv1D, packed attention and experts get Linears first, as by :func:`expose_linears_`.

    ``layout="auto"`` times dense and every layout that fits the zeros of a layer, at its shape and density, with
    ``tokens`` rows of x, interleaved, on this machine with the threads torch is set to; a sparse one is taken from a
    ratio of 1.1 up, else the layer stays dense. Several numbers, with ``per_call``: each gets the packed form that
    suits it, and from where dense wins the unpacked weight serves, which is kept beside it (the reason
    says so); without ``per_call`` one packed form serves all and the worst case decides. Up to 8 rows are timed
    with the weight coming from memory where the selected Linears take more than 32 MiB together, frozen ones of decoder
    layers as steps of a program unless ``engine`` says "layers". "csr" | "bsr" (``blocksize``, 16x1 by default) | "nm"
    (``nm``, 2:4 by default) forces one on every selected Linear without measuring. ``fuse``: activations, residuals and
    LayerNorms that follow move into the kernels' epilogues where that is safe, and RMSNorms run in one pass.
    ``value_dtype``: how inference holds the weights, "float32" (exact), "bfloat16" or "int8". ``activations="int8"``,
    for int8 weights, lets products round x to 8 bits with a scale a token: "auto" then times every layout exactly and
    in int8, and int8 without zeros, the layer's shape permitting.
    ``exact_layers``: names of Linears that are to stay in float32 all the same, sparse or dense, such as
    :func:`~sparseprune.choose_exact_layers` finds.

    ``dense_value_dtype="bfloat16"`` or ``"int8"`` also holds the Linears that stay dense, the head among them, rounded
    for calls of up to 8 rows, those of ``tokens`` where that is measured faster (ratio of 1.1 up): a copy beside the
    exact weight, which longer calls, training and a tied embedding go on using (:class:`RoundedLinear`). It changes the
    results of layers that were not pruned, hence not by default.

    ``engine``: what runs a stack of encoder layers (BERT and its kin, DistilBERT, MPNet, ModernBERT, ViT,
    ``nn.TransformerEncoder``): "program", all of its layers in one native call on real tokens only, after which hidden
    states under the attention mask are zero; "layers", one by one; "auto", the program where the stack holds a sparse
    layer and it is measured faster (ratio of 1.1 up) in sequences of up to 64 tokens. The layers go on answering what
    the program does not take: training, hooks, hidden states of every layer, other masks than padding. So does a stack
    of decoder layers (Llama, Mistral, Qwen2 and 3, SmolLM, Gemma, Phi, GPT-NeoX, GPT-2) run up to 16 new tokens, with
    what came before them in a DynamicCache or a StaticCache of ``transformers``; "auto" times it where ``tokens`` has
    a number up to 8.

    ``keep="packed"``, for a frozen model that will only be run: of every sparse weight only the packed form stays that
    runs (one for each of ``tokens``, in a program one), and no dense copy serves longer calls. ``state_dict``,
    ``save``, ``densify_`` and ``to`` unpack it where it holds every value exactly, as it does in float32 and of values
    that were rounded before; else they raise RuntimeError, ``save`` CheckpointError. Training does so in any case.
    "canonical" keeps the layers' own tensors beside it. The report's ``memory`` has the bytes of both.

    ``filter_fn(module, fqn)`` replaces the default choice of Linears. Raises ValueError on an unknown layout, a layout
    that does not fit, a filter that selects nothing, under ``torch.inference_mode``, with ``keep="packed"`` where a
    parameter wants a gradient or the kernels of its device are missing, and for a model that is itself a Linear (use
    ``SparseLinear.from_linear``); the model is then as it was.
    """
    if isinstance(model, nn.Linear):
        raise ValueError(
            "sparsify_: expected a model that holds Linears, got a Linear; use SparseLinear.from_linear(linear)"
        )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "sparsify_: expected a mode in which weights can be made that learn, got torch.inference_mode; call it "
            "outside (it turns gradients off itself where it needs none)"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"sparsify_: layout expected one of {LAYOUTS}, got {layout!r}")
    check_dtypes("sparsify_", value_dtype, activations)
    if dense_value_dtype not in DENSE_VALUE_DTYPES:
        raise ValueError(
            f"sparsify_: dense_value_dtype expected one of {DENSE_VALUE_DTYPES}, got {dense_value_dtype!r}"
        )
    if engine not in ENGINES:
        raise ValueError(f"sparsify_: engine expected one of {ENGINES}, got {engine!r}")
    if keep not in KEEP:
        raise ValueError(f"sparsify_: keep expected one of {KEEP}, got {keep!r}")
    if keep == "packed":
        check_keep(model)
    counts = tuple(tokens) if isinstance(tokens, Iterable) else (tokens,)
    if not counts or not all(isinstance(count, Integral) and count >= 1 for count in counts):
        raise ValueError(f"sparsify_: tokens expected one or more whole numbers >= 1, got {tokens!r}")
    unpack_pruned_(model)
    selection = select_linears(model, filter_fn)
    if unknown := [name for name in exact_layers if name not in selection.selected]:
        raise ValueError(
            f"sparsify_: exact_layers expected names of selected Linears, got {unknown[0]!r}; these are "
            f"{', '.join(list(selection.selected)[:5])}, ..."
        )
    per_call = per_call and len(counts) > 1
    options: dict[str, Any] = {"tokens": counts if per_call else max(counts)}
    weights = sum(linear.weight.numel() * linear.weight.element_size() for linear in selection.selected.values())
    cold = weights > CACHED
    frozen = any(not linear.weight.requires_grad for linear in selection.selected.values())
    timed = layout == "auto" and engine != "layers" and min(counts) <= FEW and frozen
    in_programs = decoder_linears(model) if timed else frozenset()
    choices: list[LayerChoice] = []
    replacements: dict[int, nn.Module] = {}
    memo: dict[Any, Choice] = {}
    for name, linear in selection.selected.items():
        kept = _kept(linear)
        density = kept.float().mean().item()
        shape = (linear.out_features, linear.in_features)
        if (own := own_forward(linear)) is not None:
            choices.append(LayerChoice(name, shape, density, "dense", None, own))
            continue
        exact = name in exact_layers
        options["value_dtype"] = "float32" if exact else value_dtype
        takes = "float32" if exact else activations
        if layout == "auto":
            in_program = id(linear) in in_programs
            found = measure(linear, kept, density, counts, options, memo, cold, takes, in_program)
            chosen, arguments, ratio, reason, doubt = found
        else:
            arguments = (
                {"layout": layout}
                | ({"blocksize": blocksize} if layout == "bsr" else {})
                | ({"nm": nm} if layout == "nm" else {})
            )
            arguments |= {"activations": takes}
            chosen, ratio, reason, doubt = layout, None, f"layout={layout!r} was asked for", ""
        if keep == "packed" and "dense_from" in arguments:
            arguments = {name: value for name, value in arguments.items() if name != "dense_from"}
            reason += ", but keep='packed' has no dense copy"
        if exact and value_dtype != "float32":
            reason += "; exact_layers keeps it in float32"
        if chosen != "dense":
            try:
                sparse = SparseLinear.from_linear(linear, **{**options, **arguments})
            except ValueError as error:
                raise ValueError(f"sparsify_: {name}: {error}") from None
            replacements[id(linear)] = sparse
        choices.append(LayerChoice(name, shape, density, chosen, ratio, reason, doubt))
    _note(model, choices, selection.skipped)
    replace_(model, replacements)
    if replacements:
        take_slow_path_(model)
    fusions = fuse_(model) if fuse and replacements else []
    exact_linears = [selection.selected[name] for name in exact_layers]
    rounded = round_(model, counts, dense_value_dtype, exact_linears) if dense_value_dtype != "float32" else []
    stacks = use_stacks_(model, engine, counts)
    if keep == "packed":
        why = keep_packed_forms_(model)
        stacks = [StackChoice(s.name, s.layers, "layers", s.ratio, why[s.name]) if s.name in why else s for s in stacks]
    memory = memory_of(model)
    return SparsifyReport(choices, fusions, selection.skipped, rounded, selection.other_weights, stacks, memory)


def _note(model: nn.Module, choices: Sequence[LayerChoice], skipped: Mapping[str, str]) -> None:
    """Every Linear that stays dense knows why; one that becomes sparse knows nothing from before."""
    for name, reason in skipped.items():
        note_dense_(model.get_submodule(name), reason)
    for choice in choices:
        note_dense_(model.get_submodule(choice.name), choice.reason if choice.layout == "dense" else None)


def _kept(linear: nn.Linear) -> Tensor:
    kept = linear.weight.detach() != 0
    mask = getattr(linear, "mask", None)
    return kept & mask if isinstance(mask, Tensor) else kept
