"""A checked file into a model: every comparison first, then everything is made, and only then the model changes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import layouts
from ..nn import MaskedLinear, SparseLinear, fuse_, unfuse_
from ..nn.expose import exposing_linears, is_conv1d
from ..nn.filters import take_slow_path_
from ..nn.fusion import is_fused
from ..nn.matrices import unpackable, unpacking
from ..nn.packed_only import KEEP, give_back, keep_packed_, without_canonical
from ..nn.replace import replace_
from ..nn.stacks import in_encoder, put_stacks_
from ..structured import position_biases, restore_shapes
from .error import names
from .file import Content
from .state import how, options_of, round_as_, unwrapped
from .structure import FACTORS, Structure, prefixed

__all__ = ["fill"]

_ARCHITECTURE = "load into the architecture it was saved from"
_Linears = Mapping[str, nn.Linear | SparseLinear]


def fill(model: nn.Module, content: Content, keep: str = "canonical") -> None:
    """See :func:`sparseprune.load`. ValueError, and the model as it was, where the file does not fit it."""
    if keep not in KEEP:
        raise ValueError(f"keep expected one of {KEEP}, got {keep!r}")
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise ValueError(
            "expected a model that DistributedDataParallel does not wrap yet, whose gradients it would lose sight of; "
            "load first, then wrap"
        )
    sizes = content.structure.linears
    with unwrapped(model) as inside:
        unpacked = [
            fqn
            for fqn, module in inside.named_modules()
            if (is_conv1d(module) and fqn in sizes)
            or (isinstance(module, nn.MultiheadAttention) and prefixed(fqn, "q_proj") in sizes)
        ]
        others = [
            fqn
            for fqn, module in inside.named_modules()
            if any(prefixed(fqn, name) in sizes for name in ("parts.0.gate_up", "linear"))
            and unpackable(module, convolutions=True)
        ]
        with exposing_linears(inside, unpacked), unpacking(inside, others):
            _fill(inside, content, keep)
    if keep == "packed":
        model.requires_grad_(False)


class _Tensors:
    """The tensors of a file, decoded as they are asked for: no two of them need be there at once."""

    def __init__(self, content: Content) -> None:
        self._content, self._ties = content, content.structure.ties
        self._names = set(content.names())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        return self._content.tensor(self.place(name))

    def place(self, name: str) -> str:
        """The name under which the file holds it, one for all that are tied."""
        return self._ties.get(name, name)

    def forget(self, name: str) -> None:
        """Gives back the memory into which it was read."""
        self._content.forget(self.place(name))


def _fill(model: nn.Module, content: Content, keep: str) -> None:
    structure = content.structure
    linears: _Linears = {
        fqn: module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | SparseLinear)
    }
    wanted = _wanted(model, linears)
    _check_names(model, linears, wanted, content)
    resized = _resized(linears, content)
    biases = {  # of positions, one column a head, which is cut with the heads
        fqn: content.shape(f"{fqn}.weight")
        for fqn in position_biases(model)
        if f"{fqn}.weight" in wanted and content.shape(f"{fqn}.weight") != wanted[f"{fqn}.weight"].shape
    }
    _check_shapes(linears, wanted, content, resized, biases)
    _check_meta(model)
    _check_own(model, linears)
    tensors = _Tensors(content)
    # Sizes are those of the model from here on: what is decoded fits where the model does.
    content.check()
    _check_shared(model, linears, wanted, content, tensors)
    shared = in_encoder(model, structure.programs)
    replacements = _replacements(linears, structure, tensors, keep, shared)
    if resized or biases:
        restore_shapes(model, {**{fqn: tuple(structure.linears[fqn]) for fqn in resized}, **biases})
    if is_fused(model):
        unfuse_(model)
    replaced = {fqn for fqn, module in linears.items() if id(module) in replacements}
    with without_canonical():
        _write(model, tensors, {prefixed(fqn, name) for fqn in replaced for name in linears[fqn].state_dict()})
    replace_(model, replacements)
    if any(isinstance(m, SparseLinear) for m in replacements.values()):
        take_slow_path_(model)
        if structure.fused:
            fuse_(model)
    round_as_(model, structure.rounded)
    put_stacks_(model, structure.programs, structure.layered_prompts)


def _wanted(model: nn.Module, linears: _Linears) -> dict[str, Any]:
    """Names and tensors that a file for this model holds: a SparseLinear counts as a dense weight."""
    with without_canonical():
        wanted: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for fqn, module in linears.items():
        if isinstance(module, SparseLinear):
            for name in module.canonical_names:
                wanted.pop(prefixed(fqn, name), None)
            wanted[prefixed(fqn, "weight")] = module.like.new_empty(
                module.out_features, module.in_features, device="meta"
            )
    return wanted


def _check_names(model: nn.Module, linears: _Linears, wanted: Mapping[str, Any], content: Content) -> None:
    structure, held = content.structure, set(content.names())
    sparse = {fqn for fqn, module in linears.items() if isinstance(module, SparseLinear)} | set(structure.sparse)
    optional = {prefixed(fqn, name) for fqn in sparse for name in FACTORS}
    optional |= {prefixed(fqn, "mask") for fqn in (*structure.masked, *linears)}
    missing = [name for name in wanted if name not in held and name not in optional]
    missing += [name for fqn in structure.masked if (name := prefixed(fqn, "mask")) not in held]
    unexpected = [name for name in content.names() if name not in wanted and name not in optional]
    if missing or unexpected:
        text = [f"does not fit {type(model).__name__}"]
        text += [f"the file lacks {names(missing)}"] if missing else []
        text += [f"the model has no {names(unexpected)}"] if unexpected else []
        raise ValueError("; ".join([*text, _ARCHITECTURE]))
    for fqn in (*structure.sparse, *structure.masked, *structure.rounded):
        if fqn not in linears or prefixed(fqn, "weight") not in held:
            raise ValueError(f"{names([fqn])} expected a Linear of the model with its weight; {_ARCHITECTURE}")


def _resized(linears: _Linears, content: Content) -> list[str]:
    """Linears that the file holds in a smaller size than the model does."""
    resized = []
    for fqn, (rows, columns) in content.structure.linears.items():
        module = linears.get(fqn)
        if module is None or [module.out_features, module.in_features] == [rows, columns]:
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{fqn} expected {[rows, columns]}, the model's SparseLinear is "
                f"{[module.out_features, module.in_features]}; load into the original, dense architecture"
            )
        if rows > module.out_features or columns > module.in_features:
            raise ValueError(
                f"{fqn} expected up to {[module.out_features, module.in_features]}, as in the model, got "
                f"{[rows, columns]}; load into the original architecture"
            )
        resized.append(fqn)
    return resized


def _check_shapes(
    linears: _Linears,
    wanted: Mapping[str, Any],
    content: Content,
    resized: Iterable[str],
    biases: Mapping[str, tuple[int, ...]],
) -> None:
    """Every size that the file declares against the model's own."""
    structure = content.structure
    sizes = {fqn: (module.out_features, module.in_features) for fqn, module in linears.items()}
    sizes |= {fqn: (structure.linears[fqn][0], structure.linears[fqn][1]) for fqn in resized}
    expected: dict[str, tuple[int, ...]] = {}
    for name, value in wanted.items():
        if not isinstance(value, Tensor) or nn.parameter.is_lazy(value):
            raise ValueError(
                f"{name} expected to be a tensor with a size in the model, got {type(value).__name__}; run a lazy "
                "model once before it is filled"
            )
        expected[name] = tuple(value.shape)
    for fqn, (rows, columns) in sizes.items():
        own: dict[str, tuple[int, ...]] = {"weight": (rows, columns), "bias": (rows,), "mask": (rows, columns)}
        expected |= {
            prefixed(fqn, name): shape for name, shape in own.items() if prefixed(fqn, name) in wanted or name == "mask"
        }
    for fqn, shape in biases.items():
        most = expected[f"{fqn}.weight"]
        if len(shape) != 2 or shape[0] != most[0] or shape[1] > most[1]:
            raise ValueError(f"{fqn}.weight expected shape {list(most)} or fewer columns, got {list(shape)}")
        expected[f"{fqn}.weight"] = shape
    for name in (prefixed(fqn, name) for fqn in sizes for name in FACTORS):
        if name in content.sizes or name in structure.ties:
            expected[name] = content.shape(name)  # which fits the weight of the file
    for name in content.names():
        if content.shape(name) != expected[name]:
            raise ValueError(
                f"{name} expected shape {list(expected[name])} as in the model, got {list(content.shape(name))}; "
                f"{_ARCHITECTURE}"
            )
        dtype = wanted[name].dtype if name in wanted else torch.bool if name.endswith("mask") else torch.float32
        if _kind(content.dtype(name)) != _kind(dtype):
            raise ValueError(
                f"{name} expected {dtype} as in the model, or another of its kind, got {content.dtype(name)}; only "
                "floating and complex values are cast"
            )


def _kind(dtype: torch.dtype) -> Any:
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else dtype


def _check_meta(model: nn.Module) -> None:
    """ValueError where a tensor on the meta device is not part of the state dict, so that no file can fill it."""
    filled = {id(value) for value in model.state_dict(keep_vars=True).values()}
    left = [
        prefixed(fqn, name)
        for fqn, module in model.named_modules()
        for name, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
        if isinstance(value, Tensor) and value.is_meta and id(value) not in filled
    ]
    if left:
        raise ValueError(
            f"{names(left)} would stay on the meta device: no state dict holds them, hence no file; build the model "
            "with its buffers on the CPU (accelerate.init_empty_weights() does), or set them before loading"
        )


def _check_own(model: nn.Module, linears: _Linears) -> None:
    """ValueError where the state dict holds a tensor that is not the model's own, so that a write to it were lost."""
    own = [value for module in model.modules() for value in (*module._parameters.values(), *module._buffers.values())]
    held = {id(value) for value in own}
    memory = {_storage(value) for value in own if value is not None} - {None}
    known = {prefixed(fqn, name) for fqn, m in linears.items() for name in getattr(m, "canonical_names", ())}
    known |= set(_with_extra(model))
    apart = [
        name
        for name, value in model.state_dict(keep_vars=True).items()
        if id(value) not in held and _storage(value) not in memory and name not in known
    ]
    if apart:
        raise ValueError(
            f"{names(apart)} expected to be a parameter or a buffer of the model, got what a hook of its state dict "
            "makes, which cannot be written to; `sparseprune convert FILE OTHER --dense`, and model.load_state_dict("
            "safetensors.torch.load_file(OTHER))"
        )


def _storage(value: Any) -> int | None:
    """Where its memory begins; None where it has none."""
    plain = isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter, nn.Buffer)
    return (value.untyped_storage().data_ptr() or None) if plain and value.layout is torch.strided else None


def _with_extra(model: nn.Module) -> dict[str, nn.Module]:
    """Name in the state dict -> the module that has an extra state of its own."""
    return {
        prefixed(fqn, "_extra_state"): module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if type(module).get_extra_state is not nn.Module.get_extra_state
    }


def _check_shared(
    model: nn.Module, linears: _Linears, wanted: Mapping[str, Any], content: Content, tensors: _Tensors
) -> None:
    """ValueError where the model has one tensor and the file two that differ, of which the last read would win."""
    replaced = {id(module) for fqn, module in linears.items() if _is_replaced(fqn, module, content.structure)}
    first: dict[Any, str] = {}
    for name in sorted(content.names()):
        fqn, _, last = name.rpartition(".")
        module = linears.get(fqn)
        key: Any = name
        if id(module) in replaced:
            key = id(module), last  # a layer of its own, whose weight is no longer that of another one
        elif name in wanted:
            key = _memory(wanted[name])
        other = first.setdefault(key, name)
        if tensors.place(other) == tensors.place(name):
            continue
        dtype = tensors[name].dtype
        if not torch.equal(tensors[other].to(dtype), tensors[name]):
            raise ValueError(
                f"expected one value for each tensor of {type(model).__name__}, got two for {names([other])} and "
                f"{names([name])}, which share one; untie them first (config.tie_word_embeddings=False in "
                f"transformers), or {_ARCHITECTURE}"
            )
        tensors.forget(other)
        tensors.forget(name)


def _memory(value: Tensor) -> Any:
    """The same for two tensors that are written as one."""
    if _made_anew(value) or not value.numel():
        return id(value)
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def _is_replaced(fqn: str, module: nn.Module, structure: Structure) -> bool:
    return fqn in structure.sparse or fqn in structure.masked or isinstance(module, SparseLinear | MaskedLinear)


def _replacements(
    linears: _Linears, structure: Structure, tensors: _Tensors, keep: str, shared: Callable[[str], bool]
) -> dict[int, nn.Module]:
    """id of a Linear -> the layer that takes its place. Built apart from the model. shared: whether a program reads
    the layer of this name.
    """
    replacements: dict[int, nn.Module] = {}
    for fqn, module in linears.items():
        if id(module) in replacements:
            continue
        if not _is_replaced(fqn, module, structure):
            continue
        if not fqn:
            if isinstance(module, SparseLinear):
                raise ValueError(
                    "expected a model that holds layers, got a SparseLinear; load into an nn.Linear, or into "
                    "nn.Sequential(layer)"
                )
            continue
        old = module.like if isinstance(module, SparseLinear) else module.weight

        def like(name: str, fqn: str = fqn, old: Tensor = old) -> Tensor | None:
            whole = prefixed(fqn, name)
            if whole not in tensors:
                return None
            device = torch.device("cpu") if old.is_meta else old.device
            found = tensors[whole].to(device, old.dtype, copy=True)
            tensors.forget(whole)
            return found

        weight, bias = like("weight"), like("bias")
        assert weight is not None  # _check_names
        trained = None if bias is None else nn.Parameter(bias, requires_grad=_trains(module.bias, old))
        if fqn in structure.sparse or isinstance(module, SparseLinear):
            ran = structure.sparse[fqn] if fqn in structure.sparse else how(module)  # type: ignore[arg-type]
            layer: Any = _sparse_layer(fqn, ran, weight, trained, like)
            layer.values.requires_grad_(old.requires_grad and keep != "packed")
            if keep == "packed":
                keep_packed_(layer, shared(fqn))
                del weight
                give_back()
        else:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=old.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
            linear.register_parameter("bias", trained)
            name = prefixed(fqn, "mask")
            mask = tensors[name].to(weight.device) if name in tensors else None
            layer = MaskedLinear.from_linear(linear, mask)
        replacements[id(module)] = layer.train(module.training)
    return replacements


def _trains(bias: Tensor | None, weight: Tensor) -> bool:
    return weight.requires_grad if bias is None else bias.requires_grad


def _sparse_layer(
    fqn: str, ran: Mapping[str, Any], weight: Tensor, bias: nn.Parameter | None, like: Callable[[str], Tensor | None]
) -> SparseLinear:
    blocksize = None if ran["blocksize"] is None else (ran["blocksize"][0], ran["blocksize"][1])
    nm = None if ran["nm"] is None else (ran["nm"][0], ran["nm"][1])
    try:
        return SparseLinear(
            layouts.from_dense(weight, ran["layout"], blocksize, nm),
            bias,
            low_rank_a=like("low_rank_a"),
            low_rank_b=like("low_rank_b"),
            **options_of(ran),
        )
    except ValueError as error:
        raise ValueError(f"{fqn}: {error}") from None


def _write(model: nn.Module, tensors: _Tensors, skipped: set[str]) -> None:
    """Into the model's own tensors, and into new ones of the same dtype where those cannot be written to: on the meta
    device, made under inference_mode, or one memory under several indices.
    """
    extra = _with_extra(model)
    made: dict[int, Tensor] = {}
    tied: dict[Any, Tensor] = {}  # parameters of the file; a model put on the meta device may have lost its ties
    with torch.no_grad():
        for name, value in model.state_dict(keep_vars=True).items():
            if name not in tensors or name in skipped:
                continue
            if name in extra:
                extra[name].set_extra_state(tensors[name].clone())
            elif not _made_anew(value):
                value.copy_(tensors[name])
            elif id(value) not in made:
                parameter = isinstance(value, nn.Parameter)
                key = (tensors.place(name), value.dtype, value.requires_grad)
                if parameter and value.is_meta and key in tied:
                    made[id(value)] = tied[key]
                    continue
                device = torch.device("cpu") if value.is_meta else value.device
                new = tensors[name].to(device, value.dtype, copy=True)
                made[id(value)] = nn.Parameter(new, value.requires_grad) if parameter else new
                if parameter and value.is_meta:
                    tied[key] = made[id(value)]
            tensors.forget(name)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None and id(value) in made:
                    held[name] = made[id(value)]  # type: ignore[assignment]


def _made_anew(value: Tensor) -> bool:
    """Whether it cannot be written to."""
    overlaps = any(step == 0 and size > 1 for step, size in zip(value.stride(), value.shape))
    return value.is_meta or value.is_inference() or overlaps
