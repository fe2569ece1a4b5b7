"""Checkpoints that are really smaller: safetensors files in which every pruned weight is encoded sparsely.

The file is read by any safetensors reader. Tensors are named as in the model's own state dict; a pruned weight NAME is
held as ``NAME::values``, ``NAME::index`` (and ``::crow``, ``::scale``), see :mod:`sparseprune.encodings`. The metadata
holds the format version, the structure as JSON (encodings, which layers ran sparse and how, sizes of the Linears, ties)
and a SHA-256 over structure and all tensor bytes. Nothing in it names code. A file is validated whole before a model is
touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import encodings, layouts
from ._files import replacing
from .nn import MaskedLinear, RoundedLinear, SparseLinear, fuse_, unfuse_
from .nn.filters import take_slow_path_
from .nn.fusion import FUSED
from .nn.linear import ACTIVATIONS, VALUES
from .nn.unpack import is_conv1d, using_linears
from .pruning.structures import position_biases, restore_shapes
from .report import LayerSparsity, SparsityReport

__all__ = ["FORMAT", "VERSION", "CheckpointError", "convert", "describe", "load", "save"]

FORMAT, VERSION = "sparseprune", 1
_PRUNED = 0.05  # share of zeros from which a weight counts as pruned, and its values may be rounded
_SHOWN = 8  # names listed in an error before "and N more"
_T = TypeVar("_T")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or does not fit the model."""


@dataclass
class _State:
    """A model's state apart from the model: ``tensors`` name -> dense tensor, and what the structure JSON holds.

    ``ties``: name -> the name it shares its tensor with; ``linears``: fqn -> (out_features, in_features); ``sparse``:
    fqn -> how its SparseLinear ran; ``masked``: fqns of MaskedLinears; ``fused``: whether fuse_ had been at work;
    ``rounded``: fqn -> up to how many rows of x a RoundedLinear answers from its copy.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    linears: dict[str, list[int]] = field(default_factory=dict)
    sparse: dict[str, dict[str, Any]] = field(default_factory=dict)
    masked: list[str] = field(default_factory=list)
    fused: bool = False
    rounded: dict[str, int] = field(default_factory=dict)
    encoded: dict[str, dict[str, Any]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # bytes in the file, after reading


def save(model: nn.Module, path: str | os.PathLike[str], values: str = "float32") -> None:
    """Writes the model's state to ``path`` (.safetensors); every pruned weight in its smallest encoding.

    values: how the kept values of pruned Linears (5 % zeros or more) are stored: "float32" leaves them as they are,
    without loss; "bfloat16" and "int8" (one scale an output) round. Everything else is stored as it is; tied tensors
    once.

    The file is written beside its place and renamed: on any failure what was there stays. Raises CheckpointError on
    state that is no tensor, on int8 with values that are not finite, and where the disk is full.
    """
    _write(_state_of(model), path, values)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Loads a checkpoint into ``model``, the original architecture, in place; returns the model.

    Layers that were saved as SparseLinear or MaskedLinear become so again, with their layout and fusions; Linears that
    pruning made smaller are made smaller. Values are cast to the model's dtypes, devices stay. A model that is itself a
    Linear keeps its class. Raises CheckpointError, the model untouched, where the file is missing, truncated, altered
    or of an unknown version, where an index, a shape or a scale is wrong, and where names or shapes do not fit.
    """
    state = _read(path)
    with _about(path):
        _fill(model, state)
    return model


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], values: str = "float32", dense: bool = False
) -> None:
    """Rewrites a .safetensors file: a dense state dict with zeros becomes a sparse checkpoint, or, with ``dense``, a
    checkpoint becomes a plain dense state dict. ``values`` as in :func:`save`. Raises CheckpointError as :func:`load`.
    """
    state = _read(source, plain=True)
    if dense:
        tensors = {**state.tensors, **{name: state.tensors[other] for name, other in state.ties.items()}}
        _write_file(_apart(tensors), {"format": "pt"}, target)
    else:
        _write(state, target, values)


def describe(path: str | os.PathLike[str]) -> SparsityReport:
    """Density, encoding and bytes of every matrix in a file, validated as in :func:`load`. The report prints."""
    state = _read(path, plain=True)
    layers = []
    for name, tensor in state.tensors.items():
        if tensor.dim() != 2 or not name.endswith("weight"):
            continue
        layers.append(
            LayerSparsity(
                name.removesuffix(".weight"),
                (tensor.shape[0], tensor.shape[1]),
                int(torch.count_nonzero(tensor)),
                state.encoded[name]["encoding"] if name in state.encoded else "dense",
                tensor.numel() * tensor.element_size(),
                state.sizes[name],
            )
        )
    dense_bytes = sum(t.numel() * t.element_size() for t in state.tensors.values())
    other = dense_bytes - sum(layer.dense_bytes for layer in layers)
    return SparsityReport(layers, other, sum(t.numel() for t in state.tensors.values()))


def _state_of(model: nn.Module) -> _State:
    state = _State(fused=any(isinstance(m, FUSED) for m in model.modules()))
    found: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for fqn, module in model.named_modules(remove_duplicate=False):
        prefix = f"{fqn}." if fqn else ""
        if isinstance(module, SparseLinear):
            layout = module.to_layout()
            for name in layout.tensors():
                found.pop(prefix + name)
            found[prefix + "weight"] = layout.to_dense()
            state.sparse[fqn] = _how(module)
        elif isinstance(module, MaskedLinear):
            state.masked.append(fqn)
        elif isinstance(module, RoundedLinear):
            state.rounded[fqn] = module.rows
        if isinstance(module, SparseLinear | nn.Linear):
            state.linears[fqn] = [module.out_features, module.in_features]
    first: dict[tuple[Any, ...], str] = {}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"save: {name} expected a tensor, got {type(value).__name__}; it cannot be stored")
        tensor = value.detach()
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"save: {name} expected a strided tensor with memory, got {tensor.layout} on {tensor.device}"
            )
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            state.ties[name] = first[key]
            continue
        first[key] = name
        state.tensors[name] = tensor
    return state


def _how(layer: SparseLinear) -> dict[str, Any]:
    """How a SparseLinear ran: everything but its tensors, plain JSON."""
    return {
        "layout": layer.layout,
        "blocksize": list(layer.blocksize) if layer.blocksize else None,
        "nm": list(layer.nm) if layer.nm else None,
        "activation": layer.activation,
        "value_dtype": layer.value_dtype,
        "tokens": list(layer.tokens),
        "dense_from": layer.dense_from,
    }


def _write(state: _State, path: str | os.PathLike[str], values: str) -> None:
    if values not in VALUES:
        raise CheckpointError(f"save: values expected one of {', '.join(VALUES)}, got {values!r}")
    pruned = {f"{fqn}.weight" if fqn else "weight" for fqn in state.linears}
    tensors: dict[str, Tensor] = {}
    encoded: dict[str, dict[str, Any]] = {}
    for name, tensor in state.tensors.items():
        if tensor.dtype == torch.bool:
            encoded[name] = {"encoding": "bits", "shape": list(tensor.shape)}
            tensors[f"{name}::index"] = encodings.pack_bits(tensor)
            continue
        if tensor.dim() == 2 and str(tensor.dtype).removeprefix("torch.") in encodings.DTYPES:
            made = _encoded(name, tensor, values if name in pruned or not state.linears else "float32", state)
            if made is not None:
                encoded[name] = made.spec()
                tensors.update({f"{name}::{part}": value for part, value in made.tensors.items()})
                continue
        tensors[name] = tensor
    tensors = _apart({name: t.detach().cpu() for name, t in tensors.items()})
    structure = json.dumps(
        {
            "encoded": encoded,
            "ties": state.ties,
            "linears": state.linears,
            "sparse": state.sparse,
            "masked": state.masked,
            "fused": state.fused,
            **({"rounded": state.rounded} if state.rounded else {}),
        },
        sort_keys=True,
    )
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "structure": structure,
        "digest": _digest(tensors, structure),
    }
    _write_file(tensors, metadata, path)


def _encoded(name: str, tensor: Tensor, values: str, state: _State) -> encodings.Encoded | None:
    """The sparse encoding of one matrix; None where it is not pruned or dense is smaller."""
    if not tensor.numel() or bool((tensor != 0).all()):
        return None
    if float((tensor == 0).float().mean()) < _PRUNED:
        values = "float32"
    how = state.sparse.get(name.removesuffix(".weight"), {})
    extra = [tuple(how["blocksize"])] if how.get("blocksize") else []
    try:
        made = encodings.encode(tensor, None if values == "float32" else values, extra)
    except ValueError as error:
        raise CheckpointError(f"save: {name}: {error}") from None
    return made if made.nbytes < tensor.numel() * tensor.element_size() else None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as the file format wants them."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        where = tensor.untyped_storage().data_ptr()
        if where in seen or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        apart[name] = tensor
    return apart


def _write_file(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]) -> None:
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: could not be written, nothing is left behind: {error}") from None


def _digest(tensors: Mapping[str, Tensor], structure: str) -> str:
    digest = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a ValueError of what runs inside into a CheckpointError that names the file."""
    try:
        yield
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error or 'not enough memory'}") from None


def _read(path: str | os.PathLike[str], plain: bool = False) -> _State:
    """Reads and validates a whole file; ``plain``: a state dict that this library did not write will do."""
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: expected a checkpoint, found no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); it is truncated or damaged") from None
    with _about(path):
        if metadata.get("format") != FORMAT:
            if plain:
                return _State(tensors, sizes={name: t.numel() * t.element_size() for name, t in tensors.items()})
            raise ValueError(
                f"expected a checkpoint of format {FORMAT!r}, got {metadata.get('format')!r}; "
                "`sparseprune convert` makes one of a dense file"
            )
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"expected format version {VERSION}, got {metadata.get('version')!r}; use the sparseprune that wrote it"
            )
        structure = metadata.get("structure", "")
        if _digest(tensors, structure) != metadata.get("digest"):
            raise ValueError("its digest does not match its content; the file was altered or damaged")
        return _parsed(structure, tensors)


def _field(found: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = found.get(key)
    if not isinstance(value, kind):
        raise ValueError(f"structure: {key} expected {kind.__name__}, got {type(value).__name__}")
    return value


def _parsed(structure: str, tensors: dict[str, Tensor]) -> _State:
    try:
        found = json.loads(structure)
    except json.JSONDecodeError as error:
        raise ValueError(f"structure expected JSON ({error})") from None
    known = {"encoded", "ties", "linears", "sparse", "masked", "fused"}
    if not isinstance(found, dict) or set(found) - {"rounded"} != known:
        raise ValueError(f"structure expected the keys {sorted(known)}, got {sorted(found) if found else found}")
    state = _State(
        ties=_field(found, "ties", dict),
        linears=_field(found, "linears", dict),
        sparse=_field(found, "sparse", dict),
        masked=_field(found, "masked", list),
        fused=_field(found, "fused", bool),
        encoded=_field(found, "encoded", dict),
        rounded=_field({"rounded": {}, **found}, "rounded", dict),
    )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        whole, separator, part = name.rpartition("::")
        if separator and whole in state.encoded:
            parts.setdefault(whole, {})[part] = tensor
        else:
            state.tensors[name] = tensor
        key = whole if separator and whole in state.encoded else name
        state.sizes[key] = state.sizes.get(key, 0) + tensor.numel() * tensor.element_size()
    for name, spec in state.encoded.items():
        if not isinstance(spec, dict) or name in state.tensors:
            raise ValueError(f"structure: {name} expected one encoding, got {spec!r}")
        try:
            state.tensors[name] = _decoded(spec, parts.get(name, {}))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, other in state.ties.items():
        if other not in state.tensors or name in state.tensors:
            raise ValueError(f"structure: {name} expected to share a tensor of the file, got {other!r}")
    for fqn, shape in state.linears.items():
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(v) is int and v >= 0 for v in shape):
            raise ValueError(f"structure: size of {fqn} expected [out_features, in_features], got {shape!r}")
    for fqn, how in state.sparse.items():
        _check_how(fqn, how, state)
    if not all(isinstance(fqn, str) and fqn in state.linears for fqn in state.masked):
        raise ValueError("structure: masked expected names of Linears in the file")
    for fqn, rows in state.rounded.items():
        if fqn not in state.linears or fqn in state.sparse or fqn in state.masked or type(rows) is not int or rows < 1:
            raise ValueError(f"structure: rounded expected rows of a dense Linear in the file, got {fqn!r}: {rows!r}")
    return state


def _decoded(spec: dict[str, Any], parts: dict[str, Tensor]) -> Tensor:
    if spec.get("encoding") != "bits":
        return encodings.decode(spec, parts)
    shape = spec.get("shape")
    if not isinstance(shape, list) or not all(type(v) is int and v >= 0 for v in shape) or set(parts) != {"index"}:
        raise ValueError(f"bits expected a shape and one index, got {shape!r} and {sorted(parts)}")
    count = 1
    for size in shape:
        count *= size
    return encodings.unpack_bits(parts["index"], count).view(shape)


def _check_how(fqn: str, how: Any, state: _State) -> None:
    def pair(key: str) -> bool:
        value = how.get(key)
        return isinstance(value, list) and len(value) == 2 and all(type(v) is int and v >= 1 for v in value)

    def count(value: Any, lists: bool = False) -> bool:
        if lists and isinstance(value, list):  # one number before several call sizes had a form each
            return bool(value) and all(count(v) for v in value)
        return type(value) is int and value >= 1

    good = isinstance(how, dict) and fqn in state.linears
    expected = {"layout", "blocksize", "nm", "activation", "value_dtype", "tokens"}
    good = good and set(how) - {"dense_from"} == expected
    good = good and how["layout"] in ("csr", "bsr", "nm") and how["activation"] in ACTIVATIONS
    good = good and how["value_dtype"] in VALUES and count(how["tokens"], lists=True)
    good = good and (how.get("dense_from") is None or count(how["dense_from"]))
    good = good and (pair("blocksize") if how["layout"] == "bsr" else how["blocksize"] is None)
    good = good and (pair("nm") if how["layout"] == "nm" else how["nm"] is None)
    if not good:
        raise ValueError(f"structure: how {fqn} ran sparse expected layout and options, got {how!r}")


def _names(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _prefixed(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name


def _fill(model: nn.Module, state: _State) -> None:
    """Checks everything, builds everything, and only then writes to the model."""
    content = {**state.tensors, **{name: state.tensors[other] for name, other in state.ties.items()}}
    unpacked = [
        fqn
        for fqn, module in model.named_modules()
        if (is_conv1d(module) and fqn in state.linears)
        or (isinstance(module, nn.MultiheadAttention) and _prefixed(fqn, "q_proj") in state.linears)
    ]
    with using_linears(model, unpacked):
        _fill_linears(model, state, content)


def _fill_linears(model: nn.Module, state: _State, content: Mapping[str, Tensor]) -> None:
    linears = {
        fqn: module
        for fqn, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear | SparseLinear)
    }
    wanted = _wanted(model, linears)
    optional = {_prefixed(fqn, name) for fqn in state.sparse for name in ("low_rank_a", "low_rank_b")}
    optional |= {_prefixed(fqn, "mask") for fqn in (*state.masked, *linears)}
    for fqn, module in linears.items():
        if isinstance(module, SparseLinear):
            optional |= {_prefixed(fqn, "low_rank_a"), _prefixed(fqn, "low_rank_b")}
    missing = [name for name in wanted if name not in content and name not in optional]
    unexpected = [name for name in content if name not in wanted and name not in optional]
    if missing or unexpected:
        text = [f"does not fit {type(model).__name__}"]
        text += [f"the file lacks {_names(missing)}"] if missing else []
        text += [f"the model has no {_names(unexpected)}"] if unexpected else []
        raise ValueError("; ".join([*text, "load into the architecture it was saved from"]))
    resized = _resized(linears, state, content)
    biases = {  # of positions, one column a head, which is cut with the heads
        fqn: tuple(content[f"{fqn}.weight"].shape)
        for fqn in position_biases(model)
        if f"{fqn}.weight" in content and content[f"{fqn}.weight"].shape != wanted[f"{fqn}.weight"].shape
    }
    by_linear = {_prefixed(fqn, name) for fqn in (*resized, *biases) for name in ("weight", "bias", "mask")}
    for name, value in wanted.items():
        if name in content and content[name].shape != value.shape and name not in by_linear | optional:
            raise ValueError(
                f"{name} expected shape {list(value.shape)} as in the model, got {list(content[name].shape)}; "
                "load into the architecture it was saved from"
            )
    replacements = _replacements(model, linears, state, content)
    if resized or biases:
        restore_shapes(model, {**{fqn: tuple(state.linears[fqn]) for fqn in resized}, **biases})
    if any(isinstance(m, FUSED) for m in model.modules()):
        unfuse_(model)
    with torch.no_grad():
        for fqn, value in _targets(model):
            if fqn in content:
                value.copy_(content[fqn])
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    if any(isinstance(m, SparseLinear) for m in replacements.values()):
        take_slow_path_(model)
        if state.fused:
            fuse_(model)
    for fqn, rows in state.rounded.items():
        owner, _, child_name = fqn.rpartition(".")
        linear = model.get_submodule(fqn)
        if fqn and isinstance(linear, nn.Linear):
            setattr(model.get_submodule(owner), child_name, RoundedLinear.from_linear(linear, rows))


def _wanted(model: nn.Module, linears: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Names and tensors that a file for this model holds: a SparseLinear counts as a dense weight."""
    wanted: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    for fqn, module in linears.items():
        if isinstance(module, SparseLinear):
            for name in module.to_layout().tensors():
                wanted.pop(_prefixed(fqn, name))
            wanted[_prefixed(fqn, "weight")] = module.values.new_empty(
                module.out_features, module.in_features, device="meta"
            )
    return wanted


def _resized(linears: Mapping[str, nn.Module], state: _State, content: Mapping[str, Tensor]) -> list[str]:
    """Linears that the file holds in another size than the model does."""
    resized = []
    for fqn, shape in state.linears.items():
        module = linears.get(fqn)
        if module is None or [module.out_features, module.in_features] == shape:
            continue
        if not isinstance(module, nn.Linear):
            raise ValueError(
                f"{fqn} expected {shape}, the model's SparseLinear is {[module.out_features, module.in_features]}; "
                "load into the original, dense architecture"
            )
        held = [
            list(content[name].shape) for name in (_prefixed(fqn, "weight"), _prefixed(fqn, "bias")) if name in content
        ]
        if held not in ([shape], [shape, shape[:1]]):
            raise ValueError(f"{fqn} expected weight and bias of {shape}, as the file says, got {held}")
        resized.append(fqn)
    return resized


def _replacements(
    model: nn.Module, linears: Mapping[str, nn.Module], state: _State, content: Mapping[str, Tensor]
) -> dict[int, nn.Module]:
    """id of a Linear -> the layer that takes its place. Built apart from the model."""
    replacements: dict[int, nn.Module] = {}
    for fqn, module in linears.items():
        if not fqn or id(module) in replacements:
            continue
        sparse, masked = fqn in state.sparse, fqn in state.masked
        if not (sparse or masked or isinstance(module, SparseLinear | MaskedLinear)):
            continue
        old = module.values if isinstance(module, SparseLinear) else module.weight
        assert isinstance(old, Tensor)

        def like(name: str, fqn: str = fqn, old: Tensor = old) -> Tensor | None:
            found = content.get(_prefixed(fqn, name))
            return None if found is None else found.to(old.device, old.dtype, copy=True)

        weight, bias = like("weight"), like("bias")
        assert weight is not None
        if sparse or isinstance(module, SparseLinear):
            how = state.sparse[fqn] if sparse else _how(module)  # type: ignore[arg-type]
            layer: nn.Module = _sparse_layer(fqn, how, weight, bias, like("low_rank_a"), like("low_rank_b"))
            layer.values.requires_grad_(old.requires_grad)
        else:
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=old.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias)
            mask = content.get(_prefixed(fqn, "mask"))
            layer = MaskedLinear.from_linear(linear, None if mask is None else mask.to(old.device))
        replacements[id(module)] = layer.train(module.training)
    return replacements


def _sparse_layer(
    fqn: str,
    how: dict[str, Any],
    weight: Tensor,
    bias: Tensor | None,
    low_rank_a: Tensor | None,
    low_rank_b: Tensor | None,
) -> SparseLinear:
    blocksize = None if how["blocksize"] is None else (how["blocksize"][0], how["blocksize"][1])
    nm = None if how["nm"] is None else (how["nm"][0], how["nm"][1])
    try:
        return SparseLinear(
            layouts.from_dense(weight, how["layout"], blocksize, nm),
            None if bias is None else nn.Parameter(bias),
            low_rank_a=low_rank_a,
            low_rank_b=low_rank_b,
            value_dtype=how["value_dtype"],
            tokens=how["tokens"],
            dense_from=how.get("dense_from"),
        )
    except ValueError as error:
        raise ValueError(f"{fqn}: {error}") from None


def _targets(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the model's state, tied ones under each of their names."""
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            yield name, value
