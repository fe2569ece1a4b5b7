"""Puts stacks into a model where a program runs them faster than their layers, and takes them out again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ... import bench
from ..instance_forward import is_replaced
from ..linear import SparseLinear
from ..modes import evaluating
from .decoder_forward import DecoderForward
from .decoder_measure import measure_decoder, measure_prompts
from .decoder_parts import may_be_decoder
from .forward import StackForward, stack_of
from .masks import Unsupported
from .proof import example, run_layers
from .recognise import LayerParts, UnknownLayer, may_be_layer, recognise

__all__ = ["ENGINES", "StackChoice", "decoder_linears", "drop_stacks_", "find_stacks", "in_encoder", "layered_prompts",
           "leave_to_layers_", "put_stacks_", "stacks_in_use", "use_stacks_", "why_layers"]  # fmt: skip

ENGINES = ("auto", "program", "layers")
_MIN_RATIO = 1.1
_NOTE = "_sparseprune_stack_note"  # on an owner whose layers run one by one
_LENGTH = 64  # tokens of the sequences that are timed
_ACROSS = (
    nn.modules.conv._ConvNd, nn.RNNBase, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
)  # fmt: skip


@dataclass(frozen=True)
class StackChoice:
    """One stack: ``name`` of the module that loops over its ``layers``, how many there are; the ``engine`` that runs
    them ("program": all in one native call; "layers": one by one), ``ratio`` over the layers (None: not measured),
    ``reason``; of a program the bytes that it reads, ``nbytes``, and those of the same weights dense in float32,
    ``dense_nbytes``. The layers keep their own beside them. ``doubt``: what speaks against the timing.
    ``prompts``: what runs those of a decoder, and why.
    """

    name: str
    layers: int
    engine: str
    ratio: float | None
    reason: str
    nbytes: int = 0
    dense_nbytes: int = 0
    doubt: str = ""
    prompts: str = ""


def find_stacks(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """fqn -> (module, name of its ModuleList of layers), for every module that may loop over encoder layers."""
    found: dict[str, tuple[nn.Module, str]] = {}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            continue
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and may_be_layer(child[0]):
                found.setdefault(fqn, (module, name))
    return found


def use_stacks_(model: nn.Module, engine: str = "auto", tokens: Sequence[int] = (128,)) -> list[StackChoice]:
    """Gives a native program to the stacks of encoder and of decoder layers in ``model``, in place; returns what was
    chosen, and why.

    engine: "program": every stack that is recognised; "auto": those with a sparse layer that the program runs at least
    1.1 times as fast as the layers at each number of ``tokens``, in sequences of 64 or of ``tokens`` where that is
    less; "layers": none. A stack is recognised by its structure, and accepted only if layers and program agree on
    random input.

    Hidden states of tokens under the mask leave a stack as zeros; its layers answer where those are known to be read:
    when a sequence begins with padding, and when a module of ``model`` behind the stack reads across tokens. ValueError
    on another engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"use_stacks_: engine expected one of {ENGINES}, got {engine!r}")
    choices = []
    for fqn, (module, name) in find_stacks(model).items():
        layers = module._modules[name]
        assert isinstance(layers, nn.ModuleList)
        choices.append(_choose_(fqn, _stack(model, module, name), layers, engine, tokens))
    return choices


def decoder_linears(model: nn.Module) -> frozenset[int]:
    """The ids of the Linears that a program would take new tokens through: those of stacks of decoder layers that are
    recognised, and proven as they are now.
    """
    found: set[int] = set()
    for module, name in find_stacks(model).values():
        stack, layers = _stack(model, module, name), module._modules[name]
        if not isinstance(stack, DecoderForward) or is_replaced(module, StackForward) or layers is None:
            continue
        try:
            with torch.no_grad(), evaluating(layers):
                parts = stack.ready().parts
        except (Unsupported, UnknownLayer):
            continue
        found.update(id(projection.module) for layer in parts for projection in layer.projections)
    return frozenset(found)


def _stack(model: nn.Module, module: nn.Module, name: str) -> StackForward:
    layers = module._modules[name]
    assert isinstance(layers, nn.ModuleList)
    kind = DecoderForward if may_be_decoder(layers[0]) else StackForward
    return kind(module, name, _reader(model, module))


def _reader(model: nn.Module, owner: nn.Module) -> str | None:
    """The first module behind ``owner``, in the model's order, that reads across tokens and takes no mask: convolution,
    recurrence, pooling, or a head that compares the tokens of a sequence.
    """
    modules = list(model.named_modules())
    inside = {id(m) for m in owner.modules()}
    last = max(place for place, (_, m) in enumerate(modules) if id(m) in inside)
    for fqn, module in modules[last + 1 :]:
        if isinstance(module, _ACROSS) or fqn.rpartition(".")[2] == "qa_outputs":
            return f"{fqn} ({type(module).__name__})"
    return None


def _choose_(
    fqn: str, stack: StackForward, layers: nn.ModuleList, engine: str, tokens: Sequence[int]
) -> StackChoice:
    module = stack.owner

    def left(reason: str, ratio: float | None = None, doubt: str = "") -> StackChoice:
        leave_to_layers_(module, reason)
        return StackChoice(fqn, len(layers), "layers", ratio, reason, doubt=doubt)

    if engine == "layers":
        return left("engine='layers' was asked for")
    if engine == "auto" and not any(isinstance(m, SparseLinear) for m in layers.modules()):
        return left("none of its layers is sparse")
    if is_replaced(module, StackForward):
        return left("its forward was replaced")
    try:
        with torch.no_grad(), evaluating(layers):
            built = stack.ready().built
    except (Unsupported, UnknownLayer) as reason:
        return left(str(reason))
    sizes = built.nbytes, built.dense_nbytes
    if engine == "program":
        module.__dict__["forward"] = stack
        prompts = _prompts_(stack, layers, ()) if isinstance(stack, DecoderForward) else ""
        return StackChoice(
            fqn, len(layers), "program", None, "engine='program' was asked for", *sizes, prompts=prompts
        )  # fmt: skip
    try:
        with torch.no_grad(), evaluating(layers):
            choice = _measure(stack, layers, tokens)
    except Unsupported as reason:
        return left(str(reason))
    if choice.name != "program":
        return left(choice.reason, min(choice.ratios["program"].values()), choice.doubt)
    prompts = _prompts_(stack, layers, tokens) if isinstance(stack, DecoderForward) else ""
    module.__dict__["forward"] = stack
    return StackChoice(fqn, len(layers), "program", choice.ratio, choice.reason, *sizes, choice.doubt, prompts)


def _prompts_(stack: DecoderForward, layers: nn.ModuleList, tokens: Sequence[int]) -> str:
    """Leaves prompts to the layers where these are faster at one of ``tokens``; says what was chosen."""
    try:
        with torch.no_grad(), evaluating(layers):
            stack.prompts()
            choice = measure_prompts(stack, layers, tokens, _note(layers))
    except Unsupported as reason:
        return f"layers: {reason}"
    if choice is None:
        return "program"
    if choice.name == "program":
        return f"program, {choice.ratio:.2f} times the layers: {choice.reason}"
    stack.by_layers = f"prompts run layer by layer: {choice.reason}"
    return f"layers: {choice.reason}"


def leave_to_layers_(owner: nn.Module, reason: str) -> None:
    """Takes the program of an earlier choice, where there is one, from the owner of a stack."""
    if stack_of(owner) is not None:
        del owner.__dict__["forward"]
    note_layers_(owner, reason)


def note_layers_(owner: nn.Module, reason: str) -> None:
    """Keeps with the owner of a stack why its layers run one by one, for :func:`explain`."""
    owner.__dict__[_NOTE] = reason


def why_layers(owner: nn.Module) -> str | None:
    """Why the layers that ``owner`` loops over run one by one, as far as that is known; None where it has no stack or
    one with a program.
    """
    if stack_of(owner) is not None or "" not in find_stacks(owner):
        return None
    unknown = "nobody gave it a program; sparsify_(model) looks whether one pays"
    found: str = owner.__dict__.get(_NOTE, unknown)
    return found


def stacks_in_use(model: nn.Module) -> list[str]:
    """The names of the modules whose layers run as a program where they can."""
    return [fqn for fqn, module in model.named_modules() if stack_of(module) is not None]


def layered_prompts(model: nn.Module) -> list[str]:
    """Those of :func:`stacks_in_use` that leave prompts to their layers."""
    return [fqn for fqn in stacks_in_use(model) if _leaves_prompts(stack_of(model.get_submodule(fqn)))]


def _leaves_prompts(stack: StackForward | None) -> bool:
    return isinstance(stack, DecoderForward) and stack.by_layers is not None


def in_encoder(model: nn.Module, names: Sequence[str]) -> Callable[[str], bool]:
    """Whether a module of this name lies in one of the encoders of these names, whose program shares its weights."""
    found = find_stacks(model) if names else {}
    owners = [fqn for fqn in names if fqn in found and type(_stack(model, *found[fqn])) is StackForward]
    return lambda name: any(not fqn or name.startswith(f"{fqn}.") for fqn in owners)


def put_stacks_(model: nn.Module, names: Sequence[str], by_layers: Sequence[str] = ()) -> None:
    """Gives these modules programs again, as :func:`stacks_in_use` named them when the model was saved, and leaves the
    prompts of ``by_layers`` to their layers, as :func:`layered_prompts` named those. A program is built, and proven on
    random input, by the first call that it may answer. Warns of a name that is no stack here.
    """
    found, layered = find_stacks(model) if names else {}, set(by_layers)
    for fqn in names:
        if fqn in found:
            module, name = found[fqn]
            module.__dict__["forward"] = stack = _stack(model, module, name)
            if fqn in layered and isinstance(stack, DecoderForward):
                stack.by_layers = "prompts run layer by layer: they did so when the model was saved"
        else:
            warnings.warn(
                f"{fqn!r} ran as one program when the model was saved; expected layers of an encoder or a decoder "
                "there, found none, so its layers run one by one",
                stacklevel=2,
            )


def drop_stacks_(model: nn.Module) -> list[str]:
    """Undoes :func:`use_stacks_`; returns the names of the modules whose layers run one by one again."""
    found = stacks_in_use(model)
    for fqn in found:
        del model.get_submodule(fqn).__dict__["forward"]
    for module in model.modules():
        module.__dict__.pop(_NOTE, None)
    return found


def _measure(stack: StackForward, layers: nn.ModuleList, tokens: Sequence[int]) -> bench.Choice:
    """Layers against program."""
    if isinstance(stack, DecoderForward):
        return measure_decoder(stack, layers, tokens, _MIN_RATIO, _note(layers))
    return _measure_encoder(stack, layers, [recognise(layer) for layer in layers], tokens)


def _measure_encoder(
    stack: StackForward, layers: nn.ModuleList, parts: Sequence[LayerParts], tokens: Sequence[int]
) -> bench.Choice:
    """Layers against program, each on whole sequences without padding."""
    first = parts[0]

    def shape(count: int) -> tuple[int, int]:
        length = min(_LENGTH, count)
        return max(1, count // length), length

    def one_by_one(count: int) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(*shape(count), first.hidden, generator=generator, dtype=torch.float32)
        calls, _ = example(parts, torch.ones(shape(count), dtype=torch.bool), False, generator)
        x = hidden.transpose(0, 1).contiguous() if first.sequence_first else hidden
        return lambda: run_layers(list(layers), calls, x)

    def program(count: int) -> Callable[[], object]:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(*shape(count), first.hidden, generator=generator, dtype=torch.float32)
        _, tables = example(parts, torch.ones(shape(count), dtype=torch.bool), False, generator)
        if first.sequence_first:  # as it comes, and as it is handed on
            x = hidden.transpose(0, 1).contiguous()
            return lambda: stack.ready().program(x.transpose(0, 1), None, tables).transpose(0, 1).contiguous()
        return lambda: stack.ready().program(hidden, None, tables)

    kinds = [_summary(p.module) for layer in parts for p in layer.projections]
    note = f"heads={first.heads}x{first.depth},ffn={first.up.outputs}," + ",".join(sorted(set(kinds)))
    linears = [p.module for layer in parts for p in layer.projections if isinstance(p.module, SparseLinear)]
    density = sum(m.density for m in linears) / max(1, len(linears))
    return bench.choose_fastest(
        {"layers": one_by_one, "program": program},
        tokens=sorted(tokens),
        baseline="layers",
        min_ratio=_MIN_RATIO,
        key=lambda label, count: bench.layer_key(
            (len(layers), first.hidden), round(density, 2), label, count, torch.float32, note
        ),
    )


def _note(layers: nn.Module) -> str:
    return ",".join(sorted({_summary(m) for m in layers.modules() if isinstance(m, SparseLinear | nn.Linear)}))


def _summary(module: nn.Module) -> str:
    if isinstance(module, SparseLinear):
        rounds = "" if module.activations == "float32" else f"x{module.activations}"
        return f"{module.layout}{module.blocksize or module.nm or ''}{module.value_dtype}{rounds}"
    return "dense"
