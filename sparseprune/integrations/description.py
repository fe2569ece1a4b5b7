"""What a folder of transformers says about a model that its configuration cannot: which layers run sparse and how, what
became of Conv1D and packed attention, and sizes that shrinking left. Written by one, read into the model that the
configuration builds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.state import how, round_as_
from ..checkpoint.structure import Structure, prefixed
from ..encodings import shown
from ..nn import Attention, MaskedLinear, RoundedLinear, SparseLinear, expose_linears_, fuse_
from ..nn.filters import take_slow_path_
from ..nn.fusion import is_fused
from ..nn.matrices import Experts, PatchLinear, unpack_, unpackable
from ..nn.packed_only import PackedLinear, without_canonical
from ..nn.stacks import layered_prompts, put_stacks_, stacks_in_use
from .placeholder import Placeholder, headers, placeholder

__all__ = ["Description", "describe", "finish_", "prepare_"]

# Whole numbers of a module that sizes hang on; nothing else may be set by a folder.
_COUNTS = (
    "num_attention_heads", "num_heads", "n_heads", "n_head", "nhead", "heads", "attention_head_size", "head_dim",
    "head_size", "key_value_proj_dim", "all_head_size", "inner_dim", "split_size", "attn_dim", "num_key_value_heads",
    "num_key_value_groups",
)  # fmt: skip
_STRUCTURE = ("linears", "sparse", "masked", "fused", "rounded", "programs")
_OPTIONAL = {"layered_prompts"}  # later than the first folders, and written only where it says something


@dataclass
class Description:
    """``structure``: as in a checkpoint, without encodings; ``unpacked``: modules that ``expose_linears_`` changed;
    ``shapes``: parameter -> its shape, where the configuration gives a larger one; ``counts``: module -> its numbers of
    heads and the like, where they differ.
    """

    structure: Structure = field(default_factory=Structure)
    unpacked: list[str] = field(default_factory=list)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        parts = {key: getattr(self.structure, key) for key in _STRUCTURE}
        parts |= {key: value for key in _OPTIONAL if (value := getattr(self.structure, key))}
        return parts | {"unpacked": self.unpacked, "shapes": self.shapes, "counts": self.counts}

    @classmethod
    def from_dict(cls, found: Any) -> Description:
        """ValueError on anything that :meth:`to_dict` does not give."""
        keys = {*_STRUCTURE, "unpacked", "shapes", "counts"}
        if not isinstance(found, Mapping) or not keys <= set(found) <= keys | _OPTIONAL:
            got = sorted(found) if isinstance(found, Mapping) else found
            raise ValueError(f"quantization_config: layers expected the keys {sorted(keys)}, got {shown(got)}")
        parts = {key: found[key] for key in {*_STRUCTURE, *_OPTIONAL} & set(found)}
        try:
            structure = Structure.from_json(json.dumps({"encoded": {}, "ties": {}, **parts}))
        except ValueError as error:
            raise ValueError(f"quantization_config: {error}") from None
        unpacked, shapes, counts = found["unpacked"], found["shapes"], found["counts"]
        whole = isinstance(unpacked, list) and all(isinstance(name, str) for name in unpacked)
        whole = whole and isinstance(shapes, dict) and all(_is_shape(shape) for shape in shapes.values())
        whole = whole and isinstance(counts, dict) and all(_are_counts(numbers) for numbers in counts.values())
        if not whole:
            raise ValueError(
                "quantization_config: unpacked, shapes and counts expected names, positive sizes and numbers of heads, "
                f"got {shown(unpacked)}, {shown(shapes)} and {shown(counts)}"
            )
        return cls(structure, unpacked, shapes, counts)

    def placed(self, model: nn.Module) -> Description:
        """The same with the names that ``model`` has for them: a folder of a model with a head may be read into one
        without, and the other way round. What the model does not have falls away.
        """
        prefix, modules = str(getattr(model, "base_model_prefix", "")), dict(model.named_modules())

        def own(name: str) -> str | None:
            if not name and prefix in modules:
                return prefix  # of the model without its head
            if name in modules:
                return name
            if name == prefix:
                return ""
            inside = name.removeprefix(f"{prefix}.") if prefix else name
            return next((n for n in (inside, f"{prefix}.{name}") if n in modules), None)

        def names(found: Mapping[str, Any]) -> dict[str, Any]:
            return {mine: value for name, value in found.items() if (mine := own(name)) is not None}

        parameters = {}
        for name, shape in self.shapes.items():
            module, _, last = name.rpartition(".")
            mine = own(module)
            if mine is not None:
                parameters[prefixed(mine, last)] = shape
        s = self.structure
        # A head of the same name elsewhere is another layer: it starts anew.
        structure = Structure(
            linears=names(s.linears), sparse=names(s.sparse), masked=list(names(dict.fromkeys(s.masked))),
            fused=s.fused, rounded=names(s.rounded), programs=list(names(dict.fromkeys(s.programs))),
            layered_prompts=list(names(dict.fromkeys(s.layered_prompts))),
        )  # fmt: skip
        return Description(structure, list(names(dict.fromkeys(self.unpacked))), parameters, names(self.counts))


def describe(model: nn.Module) -> Description:
    """ValueError where what the configuration builds cannot be made into this model."""
    away = [
        fqn
        for fqn, module in model.named_modules()
        if isinstance(module, SparseLinear) and not isinstance(module, PackedLinear) and module.values.is_meta
    ]
    if away:
        raise ValueError(
            f"save_pretrained: expected every sparse layer in memory, got {len(away)} on the disk or the meta device "
            f"({', '.join(away[:3])}); load the model with device_map='cpu' to save it"
        )
    structure = Structure(
        fused=is_fused(model), programs=stacks_in_use(model), layered_prompts=layered_prompts(model)
    )
    for fqn, module in model.named_modules():
        if isinstance(module, SparseLinear):
            structure.sparse[fqn] = how(module)
        elif isinstance(module, MaskedLinear):
            structure.masked.append(fqn)
        elif isinstance(module, RoundedLinear):
            structure.rounded[fqn] = [module.rows, module.value_dtype]
        if isinstance(module, SparseLinear | nn.Linear):
            structure.linears[fqn] = [module.out_features, module.in_features]
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        template = _template(model, config)
    tied: Mapping[str, str] = getattr(template, "all_tied_weights_keys", {})
    shared = sorted({*tied, *tied.values()} & {f"{fqn}.weight" for fqn in structure.sparse})
    if shared:
        raise ValueError(
            f"save_pretrained: expected layers with a weight of their own, got {shown(shared)}, which runs sparse and "
            f"which {type(model).__name__} ties by its configuration. Set model.config.tie_word_embeddings = False "
            "first, or use sparseprune.save(model, path)"
        )
    own = dict(model.named_modules())
    unpacked = [
        fqn
        for fqn, module in template.named_modules()
        if (unpackable(module, convolutions=True) or isinstance(module, nn.MultiheadAttention))
        and isinstance(own.get(fqn), nn.Linear | SparseLinear | Attention | Experts | PatchLinear)
    ]
    _unpack_(template, unpacked)
    mine, built = _shapes(model), _shapes(template)
    added = sorted(mine.keys() - built.keys())  # one that is lacking, such as a pooler left out, is told by loading
    inside = {name.partition(".base_layer.")[0] for name in added if ".base_layer." in name}
    wrapped = sorted(
        fqn
        for fqn in inside
        if hasattr(own.get(fqn), "get_base_layer")
        and all(name.startswith(f"{fqn}.base_layer.") for name in mine if name.startswith(f"{fqn}."))
    )
    if wrapped:
        raise ValueError(
            f"save_pretrained: expected the model's own layers, got wrappers of peft, without an adapter, at "
            f"{shown(wrapped)}; put the layers back first, each with model.set_submodule(name, "
            "model.get_submodule(name).get_base_layer())"
        )
    if added:
        raise ValueError(
            f"save_pretrained: expected the tensors that {type(model).__name__} has by its configuration, got "
            f"{shown(added)} too, which from_pretrained could not read back. Use sparseprune.save(model, path), and "
            "sparseprune.load(model, path) on the original architecture"
        )
    shapes = {name: list(shape) for name, shape in mine.items() if shape != built[name]}
    counts: dict[str, dict[str, int]] = {}
    for fqn, module in template.named_modules():
        for name in _COUNTS:
            before, now = getattr(module, name, None), getattr(own.get(fqn), name, None)
            if type(before) is int and type(now) is int and before != now:
                counts.setdefault(fqn, {})[name] = now
    return Description(structure, unpacked, shapes, counts)


def _template(model: nn.Module, config: Any) -> nn.Module:
    """What the configuration builds."""
    try:
        return type(model)(config)
    except TypeError as error:
        raise ValueError(
            f"save_pretrained: expected {type(model).__name__} to be built from its configuration alone, got: {error}. "
            "Use sparseprune.save(model, path), and sparseprune.load(model, path) on the original architecture"
        ) from None


def prepare_(model: nn.Module, told: Description, files: Sequence[str]) -> Description:
    """Before weights are loaded: ``model``, on the meta device, takes the sizes and the layers of the description,
    which is returned with the model's own names. ``files``: safetensors that say how large the sparse layers are.

    ValueError where the description does not fit the model.
    """
    _unpack_(model, told.placed(model).unpacked)
    described = told.placed(model)  # within what was unpacked, too
    structure = described.structure
    _resize_(model, described)
    modules = dict(model.named_modules())
    for fqn in (*structure.sparse, *structure.masked, *structure.rounded):
        module, expected = modules[fqn], structure.linears[fqn]
        got = [module.out_features, module.in_features] if isinstance(module, nn.Linear) else type(module).__name__
        if got != expected or not fqn:
            raise ValueError(f"quantization_config: {fqn!r} expected a Linear {expected} in the model, got {got}")
    shapes, prefix = headers(files), str(getattr(model, "base_model_prefix", ""))
    dense = [fqn for fqn in structure.sparse if "weight" in _held(shapes, prefix, fqn)]
    if dense:
        raise ValueError(
            f"quantization_config: expected files with {len(structure.sparse)} sparse layers, got dense weights of "
            f"{len(dense)} of them ({shown(dense[:3])}): config.json is that of another, sparse model; remove "
            "quantization_config from it"
        )
    for fqn, ran in structure.sparse.items():
        linear = modules[fqn]
        assert isinstance(linear, nn.Linear)
        model.set_submodule(fqn, placeholder(linear, ran, _held(shapes, prefix, fqn)))
    for fqn in structure.masked:
        linear = modules[fqn]
        assert isinstance(linear, nn.Linear)
        model.set_submodule(fqn, MaskedLinear.from_linear(linear))
    return described


def _unpack_(model: nn.Module, names: Sequence[str]) -> None:
    if names:
        expose_linears_(model, names)
        unpack_(model, names)


def finish_(model: nn.Module, described: Description) -> None:
    """After weights are loaded: what runs differently without holding other tensors."""
    structure = described.structure
    for module in model.modules():
        if isinstance(module, Placeholder):
            module.done_()
    if structure.sparse:
        take_slow_path_(model)
    away = any(parameter.is_meta for parameter in model.parameters())  # left on the disk: nothing to prove fusions on
    if structure.fused and not away:
        fuse_(model)
    if not away:
        round_as_(model, structure.rounded)
    put_stacks_(model, structure.programs, structure.layered_prompts)


def _held(shapes: Mapping[str, list[int]], prefix: str, fqn: str) -> dict[str, list[int]]:
    """What the files hold of one layer, under the name it has in the model, or in one with or without a head."""
    for name in (fqn, f"{prefix}.{fqn}", fqn.removeprefix(f"{prefix}.")):
        found = {n[len(name) + 1 :]: shape for n, shape in shapes.items() if n.startswith(f"{name}.")}
        if found:
            return found
    return {}


def _resize_(model: nn.Module, described: Description) -> None:
    for name, shape in described.shapes.items():
        fqn, _, last = name.rpartition(".")
        module = model.get_submodule(fqn)
        before = getattr(module, last, None)
        if (
            not isinstance(before, nn.Parameter)
            or not isinstance(module, nn.Linear | nn.Embedding)
            or len(shape) != before.dim()
            or any(now > was for now, was in zip(shape, before.shape))
        ):
            got = list(before.shape) if isinstance(before, Tensor) else type(module).__name__
            raise ValueError(f"quantization_config: {name!r} expected at least {shape} in the model, got {got}")
        setattr(module, last, nn.Parameter(before.new_empty(shape), before.requires_grad))
        if isinstance(module, nn.Linear) and last == "weight":
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = shape
    for fqn, numbers in described.counts.items():
        module = model.get_submodule(fqn)
        for name, number in numbers.items():
            was = getattr(module, name, None)
            if type(was) is not int:
                raise ValueError(f"quantization_config: {fqn!r} expected to have {name}, a whole number, got {was!r}")
            setattr(module, name, number)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the state, as the dense architecture has them."""
    with without_canonical():
        found: dict[str, Any] = dict(model.state_dict(keep_vars=True))
    for fqn, module in model.named_modules():
        if isinstance(module, SparseLinear):
            for name in (*module.canonical_names, "low_rank_a", "low_rank_b"):
                found.pop(prefixed(fqn, name), None)
            found[prefixed(fqn, "weight")] = torch.empty(module.out_features, module.in_features, device="meta")
        elif isinstance(module, MaskedLinear):
            found.pop(prefixed(fqn, "mask"), None)
    return {name: tuple(tensor.shape) for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and 0 < len(shape) <= 2 and all(type(v) is int and v > 0 for v in shape)


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, dict) and all(k in _COUNTS and type(v) is int and v > 0 for k, v in numbers.items())
