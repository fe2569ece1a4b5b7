"""Checkpoints that are really smaller: safetensors files in which every pruned weight is encoded sparsely.

The file is read by any safetensors reader. Tensors are named as in the model's own state dict; a pruned weight NAME is
held as ``NAME::values``, ``NAME::index`` (and ``::crow``, ``::scale``), see :mod:`sparseprune.encodings`. The metadata
holds the format version, the structure as JSON (encodings, which layers ran sparse and how, sizes of the Linears, ties)
and a SHA-256 over structure and all tensor bytes. Nothing in it names code. A file is validated whole before a model is
touched, and its sizes are compared with the model's before memory is taken for them.

:mod:`.state` takes a model apart, :mod:`.structure` is the JSON, :mod:`.file` the bytes, :mod:`.fit` fills a model.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from ..report import SparsityReport, file_report
from .error import CheckpointError, about
from .file import FORMAT, VERSION, read, write, write_plain
from .fit import fill
from .state import State, gather
from .structure import FACTORS, Structure, prefixed

__all__ = ["FORMAT", "VERSION", "CheckpointError", "convert", "describe", "load", "save"]


def save(model: nn.Module, path: str | os.PathLike[str], value_dtype: str = "float32") -> None:
    """Writes the model's state to ``path`` (.safetensors); every pruned weight in its smallest encoding.

    value_dtype: how the kept values of pruned Linears (5 % zeros or more) are stored: "float32" leaves them as they
    are, without loss; "bfloat16" and "int8" (one scale an output) round; "inference" takes that of each SparseLinear,
    so that the file says what its kernels compute, and leaves other layers as they are. Everything else is stored as it
    is; tied tensors once. A model compiled, or wrapped for data parallelism, is saved as the model inside.

    The file is written beside its place and renamed: on any failure what was there stays. A link is followed, and a
    file that was there keeps its permissions. Raises CheckpointError on state that is no tensor with memory, on int8
    with values that are not finite and bfloat16 with such as would become infinite, where ``path`` is no regular file,
    cannot be written, or is the name under which another library would load it as its own (``model.safetensors`` beside
    a ``config.json``), and where the disk is full.
    """
    write(gather(model, value_dtype), path, value_dtype)


def load(
    model: nn.Module | str | os.PathLike[str], path: str | os.PathLike[str] | None = None, *, keep: str = "canonical"
) -> nn.Module:
    """Loads a checkpoint into ``model``, the original architecture, in place; returns the model.

    ``load(path)`` alone builds the model first, from the ``config.json`` of transformers in the same folder; there path
    may also be a folder that ``save_pretrained`` wrote (:func:`sparseprune.integrations.folder.load_folder`).

    Layers that were saved as SparseLinear or MaskedLinear become so again, with their layout and fusions, and stacks
    that ran as one program do again; Linears that pruning made smaller are made smaller. Values are cast to the model's
    floating dtypes, devices stay; what is on the meta device is made on the CPU. A model that is itself a Linear keeps
    its class.

    ``keep="packed"``, for a model that will only be run: its parameters are frozen, and its sparse layers
    keep their packed forms alone, as :func:`sparseprune.sparsify_` describes. Layers are read from the file, which is
    mapped, and packed one after the other: at no time is more in memory than what stays and the work on one layer (of a
    folder that ``save_pretrained`` wrote in shards or as ``model.safetensors``, transformers' own loading comes first).

    Raises CheckpointError, the model untouched, where the file is missing, truncated, altered or of an unknown version,
    where an index, a shape or a scale is wrong, where names, shapes or kinds of dtype do not fit, and where something
    of the model would stay on the meta device because the file cannot hold it.
    """
    if path is None:
        if isinstance(model, nn.Module):
            raise CheckpointError("load: expected a path, got a model alone; use load(model, path)")
        from ..integrations.folder import load_folder

        return load_folder(model, keep)
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"load: expected (model, path) or (path), got {type(model).__name__} as the model")
    content = read(path)
    with about(path):
        fill(model, content, keep)
    return model


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], value_dtype: str = "float32", dense: bool = False
) -> None:
    """Rewrites a .safetensors file: a dense state dict with zeros becomes a sparse checkpoint, or, with ``dense``, a
    checkpoint becomes the plain dense state dict of a model with Linears alone. ``value_dtype`` as in :func:`save`, and
    "float32" with ``dense``. Takes memory for the dense tensors. Raises CheckpointError as :func:`save` and
    :func:`load`, and where that is more than the machine has.
    """
    if dense and value_dtype != "float32":
        raise CheckpointError(
            f"convert: value_dtype rounds weights that are held sparse, expected none with dense, got {value_dtype!r}"
        )
    content = read(source, plain=True)
    with about(source):
        _check_memory(sum(content.nbytes(name) for name in content.names()))
        tensors = {name: content.tensor(name) for name in (*content.plain, *content.structure.encoded)}
    if dense:
        tensors |= {name: tensors[other] for name, other in content.structure.ties.items()}
        write_plain(_as_plain(tensors, content.structure), target)
    else:
        write(State(tensors, content.structure), target, value_dtype)


def _as_plain(tensors: dict[str, torch.Tensor], structure: Structure) -> dict[str, torch.Tensor]:
    """The state dict of the model with Linears alone: a low-rank term is part of its weight, as in
    :meth:`sparseprune.SparseLinear.dense`, and a mask is said by the zeros.
    """
    for fqn in structure.sparse:
        a, b = (tensors.pop(prefixed(fqn, name), None) for name in FACTORS)
        if a is not None and b is not None:
            weight = prefixed(fqn, "weight")
            tensors[weight] = tensors[weight] + (b @ a).to(tensors[weight].dtype)
    for fqn in structure.masked:
        tensors.pop(prefixed(fqn, "mask"), None)
    return tensors


def describe(path: str | os.PathLike[str]) -> SparsityReport:
    """Density, encoding and bytes of every matrix in a file, validated as in :func:`load`. The report prints."""
    content = read(path, plain=True)
    encoded = content.structure.encoded
    with about(path):
        kept = {name: content.nnz(name) for name in encoded}
        tensors = {name: content.tensor(name) for name in content.plain}
        for name in encoded:  # the file may declare more than there is memory
            tensors[name] = torch.empty(content.shape(name), dtype=content.dtype(name), device="meta")
    return file_report(tensors, content.sizes, {name: spec["encoding"] for name, spec in encoded.items()}, kept)


def _check_memory(nbytes: int) -> None:
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > there:
        raise ValueError(f"dense it expected up to {there} bytes, the memory of this machine, got {nbytes}")
