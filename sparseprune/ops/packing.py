"""Canonical layouts in the order of their kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .. import cuda, layouts
from ..packing import (
    ACTIVATION_DTYPES,
    VALUE_DTYPES,
    Packed,
    nm_as_csr,
    pack_bitmask8,
    pack_quads,
    pack_structure,
    wants_bitmask8,
    why_not_quads,
    with_values,
)
from ._library import define

__all__ = ["pack", "pack_for_gpu", "refill", "structure_of_layout", "unpack"]

_OPS = torch.ops.sparseprune


def pack(
    layout: layouts.Layout,
    tokens: int = 128,
    value_dtype: str = "float32",
    transpose: bool = False,
    activations: str = "float32",
) -> Packed:
    """Packs a valid layout for its kernel: once, at load; never saved.

    tokens: the N it is tuned for (every N works); value_dtype: "float32" | "bfloat16" | "int8" (with one scale an
    output); transpose: pack W^T, for the gradient of x; activations: "float32" | "int8": products round x to 8 bits a
    token, for values in int8. ValueError on a structure that the kernel must not see, and on int8 activations with
    other values.
    """
    if activations not in ACTIVATION_DTYPES:
        raise ValueError(f"pack: activations expected one of {ACTIVATION_DTYPES}, got {activations!r}")
    if activations == "int8" and (value_dtype != "int8" or transpose):
        raise ValueError(
            f"pack: activations='int8' expected value_dtype='int8' and no transpose, got value_dtype={value_dtype!r}"
        )
    if value_dtype not in VALUE_DTYPES:
        raise ValueError(f"pack: value_dtype expected one of {', '.join(VALUE_DTYPES)}, got {value_dtype!r}")
    layout.validate()
    structure = structure_of_layout(layout, tokens, VALUE_DTYPES[value_dtype], transpose, activations)
    return refill(structure, layout.values)


def pack_for_gpu(layout: layouts.Layout, tokens: int) -> Packed:
    """Packs a valid layout on a GPU as the CUDA kernels read it: the values as they are, and no way to take others.

    tokens: the N that the kind is chosen for (every N works). ValueError on a structure that a kernel must not see.
    """
    layout.validate()
    values = layout.values.detach()
    if isinstance(layout, layouts.NM):
        return cuda.packed.pack_nm(values, layout.indices, layout.n, layout.m, tokens)
    crow, col = layout.crow_indices, layout.col_indices
    if isinstance(layout, layouts.BSR):
        return cuda.packed.pack_blocks(crow, col, values, layout.shape[1], tokens)
    return cuda.packed.pack_entries(cuda.structures.Csr(crow, col), layout.shape[1], values, tokens)


def structure_of_layout(
    layout: layouts.Layout, tokens: int, dtype: torch.dtype, transpose: bool = False, activations: str = "float32"
) -> Packed:
    """:func:`pack` without the values, which may not be there: its ``values`` are empty, of this dtype. ValueError on a
    structure that the kernel must not see.
    """
    layout.validate_structure()
    if activations == "int8":
        blocksize = layout.blocksize if isinstance(layout, layouts.BSR) else (1, 1)
        canonical = _canonical_places(layout)
        fits = why_not_quads(layout.shape) is None  # else the packing says why not
        bits = fits and wants_bitmask8(canonical, tokens)
        parts = pack_bitmask8(canonical) if bits else pack_quads(canonical, blocksize, tokens)
        stored = int((parts[-1] >= 0).sum())
        return Packed(*parts, torch.empty(0, dtype=dtype, device=parts[1].device), stored=stored)
    if isinstance(layout, layouts.NM):
        (crow, col), blocksize = nm_as_csr(layout.indices, layout.n, layout.m), (1, 1)
    else:
        crow, col = layout.crow_indices, layout.col_indices
        blocksize = layout.blocksize if isinstance(layout, layouts.BSR) else (1, 1)
    return pack_structure(layout.shape, blocksize, crow, col, tokens, transpose, dtype)


def _canonical_places(layout: layouts.Layout) -> Tensor:
    """int64 `[N_out, K]`: the flat place of each stored value among the canonical ones, -1 where none is."""
    stored = layout.indices if isinstance(layout, layouts.NM) else layout.col_indices
    shape = (*stored.shape, *(layout.blocksize if isinstance(layout, layouts.BSR) else ()))
    count = torch.arange(1, math.prod(shape) + 1, device=stored.device).view(shape)
    return replace(layout, values=count).to_dense() - 1


def unpack(
    packed: Packed,
    layout: str,
    blocksize: tuple[int, int] | None = None,
    nm: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> layouts.Layout:
    """The canonical layout that :func:`pack` was given, with the values that the packed form holds, in ``dtype``. Zeros
    that it stored are lost in quads, which fill up theirs.
    """
    return layouts.from_dense(packed.to_dense().to(dtype), layout, blocksize, nm, packed.kept())


def refill(packed: Packed, values: Tensor) -> Packed:
    """The same structure with fresh canonical values (``layout.values``, any shape): one gather. ValueError unless it
    takes as many.
    """
    return with_values(packed, values, _OPS.gather_values)


define(
    "gather_values(Tensor values, Tensor perm, ScalarType dtype) -> Tensor",
    "gather_values",
    lambda values, perm, dtype: values.new_empty(perm.shape, dtype=dtype),
)
