"""Sparse matmul through the compiled core: packing, and y = activation(x W^T + bias) + residual on a packed weight.

A packed weight is plain tensors in the order its kernel reads them; csrc/cpu/spmm.inl says why. It is made once from
the structure of a canonical layout; fresh values enter it by one gather, ``packed.values = values.flatten()[perm]``.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _native
from .._native import require_c
from .._registry import kernel
from ..reference import packed_places
from ._checks import why_not_cpu

__all__ = ["ACTIVATIONS", "VALUE_DTYPES", "Packed", "linear", "pack_structure", "quantise", "with_values"]

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # csrc/cpu/activations.inl
VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # csrc/cpu/kernels.h, Packed.values_dtype
_GROUPS, _BITMASK = 0, 1
_SLACK = 64  # entries that a kernel may read, never use, behind the last one


@dataclass(frozen=True)
class Packed:
    """A weight `[N_out, K]` in the order of its kernel.

    plan = (kind, N_out, K, height, k_block, row_block). kind 0, "groups": rows in groups of ``height`` that share their
    columns; order of the entries: row block, K-block, group, entry. index int16 `[entries + slack]`: column within its
    K-block; offsets int32 `[groups * k_blocks + 1]`: where each (row block, K-block, group) starts; values
    `[(entries + slack) * height]`; perm int32 of the same length: the flat place in the canonical values, -1 in the
    slack.

    kind 1, "bitmask": index uint8 `[N_out * row bytes]`, one bit a column; offsets int32 `[N_out + 1]`; values and
    perm in row order. scale: float32 `[N_out]` with int8 values, else None.
    """

    plan: tuple[int, ...]
    index: Tensor
    offsets: Tensor
    perm: Tensor
    values: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan[1], self.plan[2]

    @property
    def nbytes(self) -> int:
        """Bytes that the forward kernel reads: everything but ``perm``."""
        parts = [self.index, self.offsets, self.values, *([] if self.scale is None else [self.scale])]
        return sum(t.numel() * t.element_size() for t in parts)

    def tensors(self) -> dict[str, Tensor]:
        found = {"index": self.index, "offsets": self.offsets, "perm": self.perm, "values": self.values}
        return found if self.scale is None else {**found, "scale": self.scale}


def _blocks(rows: int, columns: int, height: int, tokens: int, density: float) -> tuple[int, int]:
    """(k_block, row_block): the panel of a K-block should stay in L1 while the entries of a row block pass."""
    del tokens
    k_block = 96 if density > 0.15 else 192
    k_block = min(k_block, max(8, -(-columns // 8) * 8))
    row_block = min(192, -(-rows // height) * height)
    return k_block, max(height, row_block // height * height)


def _height(r: int) -> int:
    """The tallest group of rows that a kernel knows and that divides a block of r rows."""
    return next(h for h in (16, 8, 4, 2, 1) if r % h == 0)


def pack_structure(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    crow_indices: Tensor,
    col_indices: Tensor,
    tokens: int = 128,
    transpose: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    """Packs the structure of a valid csr (blocksize (1, 1)) or bsr weight `[N_out, K]`; the values are left zero.

    tokens: the N it is tuned for (every N works); transpose: pack W^T `[K, N_out]`, for the gradient of x.
    """
    (rows, columns), (r, c) = shape, blocksize
    device = crow_indices.device
    if crow_indices.numel() != rows // r + 1 or rows % r or columns % c:
        raise ValueError(
            f"pack: crow_indices expected {rows // r + 1} entries for shape {list(shape)} and blocksize {blocksize}, "
            f"got {crow_indices.numel()}; the values decide the blocksize"
        )
    n_blocks = col_indices.numel()
    if n_blocks and not 0 <= int(col_indices.min()) <= int(col_indices.max()) < columns // c:
        raise ValueError(f"pack: col_indices expected in [0, {columns // c}), got up to {int(col_indices.max())}")
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    block_row = torch.repeat_interleave(torch.arange(rows // r, device=device), counts, output_size=n_blocks)
    block_column = col_indices.long()
    if transpose:
        rows, columns, r, c = columns, rows, c, r
        block_row, block_column = block_column, block_row
    height = _height(r)
    # one entry a (block, sub-group of rows, column): its group, its column and the places of its values
    sub = torch.arange(r // height, device=device).view(1, -1, 1)
    column = torch.arange(c, device=device).view(1, 1, -1)
    group_of = (block_row.view(-1, 1, 1) * (r // height) + sub).expand(-1, -1, c).reshape(-1)
    column_of = (block_column.view(-1, 1, 1) * c + column).expand(-1, r // height, -1).reshape(-1)
    row_step, column_step = (1, r) if transpose else (c, 1)
    place = torch.arange(n_blocks, device=device).view(-1, 1, 1) * (r * c)
    place = (place + sub * (height * row_step) + column * column_step).expand(n_blocks, r // height, c).reshape(-1)

    density = n_blocks * r * c / max(1, rows * columns)
    k_block, row_block = _blocks(rows, columns, height, tokens, density)
    k_blocks, per_block, groups = -(-columns // k_block), row_block // height, rows // height
    block = group_of // per_block
    in_block = torch.clamp(groups - block * per_block, max=per_block)  # groups in this row block: the last may be short
    slot = block * (per_block * k_blocks) + column_of // k_block * in_block + (group_of - block * per_block)
    order = torch.argsort(slot * columns + column_of) if slot.numel() else slot
    offsets = torch.zeros(groups * k_blocks + 1, dtype=torch.int64, device=device)
    offsets[1:] = torch.bincount(slot, minlength=groups * k_blocks).cumsum(0)
    index = (column_of % k_block)[order]
    index = torch.where(index > 32767, index - 65536, index).to(torch.int16)
    perm = (place[order].unsqueeze(1) + torch.arange(height, device=device) * row_step).reshape(-1).to(torch.int32)
    index = torch.cat([index, index.new_zeros(_SLACK)])
    perm = torch.cat([perm, perm.new_full((_SLACK * height,), -1)])
    plan = (_GROUPS, rows, columns, height, k_block, row_block)
    return Packed(plan, index, offsets.to(torch.int32), perm, torch.zeros(perm.numel(), dtype=dtype, device=device))


def with_values(packed: Packed, values: Tensor) -> Packed:
    """The same structure with these canonical values (any shape): one gather."""
    if packed.values.dtype == torch.int8:
        return quantise(packed, values)
    return replace(packed, values=gather_values(values.detach(), packed.perm, packed.values.dtype))


def quantise(packed: Packed, values: Tensor) -> Packed:
    """The same structure with these canonical values as int8 and one float32 scale an output: largest magnitude /
    127.
    """
    exact = gather_values(values.detach(), packed.perm, torch.float32)
    places = packed_places(packed.index, packed.offsets, packed.plan)
    row = places // packed.plan[2]
    largest = torch.zeros(packed.plan[1], device=exact.device)
    largest = largest.scatter_reduce(0, row, exact[: row.numel()].abs(), "amax")
    scale = torch.where(largest > 0, largest / 127, 1.0)
    quantised = torch.zeros(packed.perm.numel(), dtype=torch.int8, device=exact.device)
    quantised[: row.numel()] = (exact[: row.numel()] / scale[row]).round().clamp(-127, 127).to(torch.int8)
    return replace(packed, values=quantised, scale=scale)


def _why_not_gather(values: Tensor, perm: Tensor, dtype: torch.dtype) -> list[str]:
    return why_not_cpu(values)


@kernel("gather_values", "native", _why_not_gather)
def gather_values(values: Tensor, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """values: any shape, canonical order; perm int32 `[packed]`, -1 where no value is; returns `[packed]`."""
    flat = values.flatten()
    if flat.numel() == 0:
        return torch.zeros(perm.numel(), dtype=dtype)
    return torch.where(perm < 0, 0, flat[perm.clamp(min=0).long()]).to(dtype)


def rows_of(x: Tensor, columns: int) -> Tensor:
    """x `[..., columns]` as float32 `[N, columns]` whose rows are dense; a view where it can be."""
    x = x.reshape(-1, columns)
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(1) == 1 or columns == 1 else x.contiguous()


def _f32(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.to(torch.float32).contiguous()


def _why_not_packed(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    activation: str,
) -> list[str]:
    reasons = why_not_cpu(x, bias, residual)
    if values.dtype not in _VALUE_CODES:
        reasons.append(f"needs packed values in float32, bfloat16 or int8, got {values.dtype}")
    return reasons


@kernel("packed_linear", "native", _why_not_packed)
def packed_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    offsets: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    plan: Sequence[int],
    activation: str,
) -> Tensor:
    """x: `[..., K]`; a packed weight `[N_out, K]`; residual `[..., N_out]`; returns `[..., N_out]` in x's dtype."""
    _, rows, columns, height, k_block, row_block = plan
    flat = rows_of(x, columns)
    y = torch.empty(flat.shape[0], rows)
    b, add = _f32(bias), None if residual is None else rows_of(residual, rows)
    require_c().spmm(
        rows,
        columns,
        height,
        k_block,
        row_block,
        values.data_ptr(),
        _VALUE_CODES[values.dtype],
        index.data_ptr(),
        offsets.data_ptr(),
        0 if scale is None else scale.data_ptr(),
        0 if b is None else b.data_ptr(),
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        ACTIVATIONS[activation],
        flat.data_ptr(),
        flat.stride(0),
        flat.shape[0],
        y.data_ptr(),
        rows,
    )
    return y.to(x.dtype).view(*x.shape[:-1], rows)


def _why_not_trained(x: Tensor, values: Tensor, bias: Tensor | None, *rest: object) -> list[str]:
    return why_not_cpu(x, values, bias)


@kernel("trained_linear", "native", _why_not_trained)
def trained_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    perm: Tensor,
    plan: Sequence[int],
    t_index: Tensor,
    t_offsets: Tensor,
    t_perm: Tensor,
    t_plan: Sequence[int],
) -> Tensor:
    """x: `[..., K]`; canonical values of the packed structure of `[N_out, K]`; returns x W^T + bias, `[..., N_out]`."""
    packed = gather_values(values, perm, torch.float32)
    return packed_linear(x, packed, index, offsets, None, bias, None, plan, "none")


def linear(
    x: Tensor, packed: Packed, bias: Tensor | None = None, residual: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """The direct call: no dispatcher, no autograd. x: `[..., K]` on the CPU; returns `[..., N_out]` in x's dtype."""
    return packed_linear(
        x, packed.values, packed.index, packed.offsets, packed.scale, bias, residual, packed.plan, activation
    )


def why_not_linear(x: Tensor, packed: Packed) -> list[str]:
    """Reasons why :func:`linear` cannot run; empty where it can."""
    return why_not_cpu(x)


# Canonical ops: the structure is packed on first sight and remembered as long as its index tensors live.

_LOCK = threading.RLock()  # a weak reference may die, and call forget, while this thread holds it
_SEEN: OrderedDict[tuple, tuple[weakref.ref, weakref.ref, int, int, Packed]] = OrderedDict()
_MOST_SEEN = 256


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def structure_of(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    crow_indices: Tensor,
    col_indices: Tensor,
    tokens: int,
    transpose: bool = False,
) -> Packed:
    """:func:`pack_structure`, remembered for these very index tensors until they die or are written to."""
    few = tokens <= 16
    key = (id(crow_indices), id(col_indices), shape, blocksize, few, transpose)
    versions = _version(crow_indices), _version(col_indices)
    with _LOCK:
        found = _SEEN.get(key)
        if found and found[0]() is crow_indices and found[1]() is col_indices and found[2:4] == versions:
            _SEEN.move_to_end(key)
            return found[4]
    packed = pack_structure(shape, blocksize, crow_indices, col_indices, 8 if few else 128, transpose)

    def forget(_: object) -> None:
        with _LOCK:
            _SEEN.pop(key, None)

    with _LOCK:
        _SEEN[key] = (weakref.ref(crow_indices, forget), weakref.ref(col_indices), *versions, packed)
        while len(_SEEN) > _MOST_SEEN:
            _SEEN.popitem(last=False)
    return packed


def _why_not_canonical(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, *rest: object) -> list[str]:
    bias = rest[0] if rest and isinstance(rest[0], Tensor) else None
    reasons = why_not_cpu(x, values, bias)
    if _native.C is not None and col.numel() >= 2**31 - 2**12:
        reasons.append(f"needs fewer than 2^31 kept entries, got {col.numel()}")
    return reasons


def _canonical(
    x: Tensor,
    rows: int,
    blocksize: tuple[int, int],
    crow: Tensor,
    col: Tensor,
    values: Tensor,
    bias: Tensor | None,
    activation: str,
    transpose: bool = False,
    k: int = 0,
) -> Tensor:
    shape = (rows, k if transpose else x.shape[-1])
    tokens = x.numel() // max(1, x.shape[-1])
    packed = with_values(structure_of(shape, blocksize, crow, col, tokens, transpose), values)
    return linear(x, packed, bias, None, activation)


@kernel("csr_linear", "native", _why_not_canonical)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`; returns `[..., N_out]`."""
    rows = crow_indices.numel() - 1
    return _canonical(x, rows, (1, 1), crow_indices, col_indices, values, bias, activation)


@kernel("bsr_linear", "native", _why_not_canonical)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; bsr of `[N_out, K]`, values `[nblocks, r, c]`; returns `[..., N_out]`."""
    _, r, c = values.shape
    rows = (crow_indices.numel() - 1) * r
    return _canonical(x, rows, (r, c), crow_indices, col_indices, values, bias, activation)


@kernel("csr_linear_dx", "native", _why_not_canonical)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; values `[nnz]` or `[nblocks, r, c]`; returns dY W, `[..., k]`."""
    blocksize = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
    rows = (crow_indices.numel() - 1) * blocksize[0]
    return _canonical(dy, rows, blocksize, crow_indices, col_indices, values, None, "none", True, k)
