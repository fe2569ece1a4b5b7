"""Sparse matmul through the compiled core: packing, and y = activation(x W^T + bias) + residual on a packed weight.

A packed weight is plain tensors in the order its kernel reads them; csrc/cpu/spmm.inl says why. It is made once from
the structure of a canonical layout; fresh values enter it by one gather, ``packed.values = values.flatten()[perm]``.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import _native
from .._native import require_c
from .._registry import kernel
from ..reference import packed_places
from ._checks import DTYPE_CODES, why_not_cpu
from .pages import in_huge_pages

__all__ = ["ACTIVATIONS", "VALUE_DTYPES", "Packed", "linear", "pack_structure", "quantise", "with_values"]

ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # csrc/cpu/activations.inl
VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
_VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}  # csrc/cpu/kernels.h, Packed.values_dtype
DTYPES = frozenset(DTYPE_CODES)  # of x
_GROUPS, _BITMASK = 0, 1
_SLACK = 64  # entries that a kernel may read, never use, behind the last one


T = TypeVar("T")


@dataclass(frozen=True)
class Packed:
    """A weight `[N_out, K]` in the order of its kernel. plan = (kind, N_out, K, height, k_block, row_block).

    kind 0, "groups": rows in groups of ``height`` that share their columns; a slot is the part of a group in one
    K-block. Order of the entries: row block, K-block, slot, entry; the slots of a K-block are sorted by their count.
    index int16 `[entries + slack]`: column within its K-block, read as unsigned;
    offsets int32 `[slots + 1, 2]`: first entry of the slot, and its group within the row block;
    values `[(entries + slack) * height]`; perm int32 of that length: the flat place in the canonical values, -1 in the
    slack.

    kind 1, "bitmask": index uint8 `[N_out, ceil(K / 64) * 8]`, one bit a column; offsets int32 `[N_out + 1]`: first
    value of each row; values and perm `[nnz + slack]` in row order.

    scale: float32 `[N_out]`, what the values of a row are to be multiplied with, where they are int8; else None.
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

    @cached_property
    def weight(self) -> Any:
        """What the compiled core reads: the addresses of these tensors, which this object keeps alive."""
        return require_c().Weight(
            self.plan,
            self.values.data_ptr(),
            _VALUE_CODES[self.values.dtype],
            self.index.data_ptr(),
            self.offsets.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(),
        )

    def __reduce__(self) -> tuple:
        parts = self.index, self.offsets, self.perm, self.values  # cloned: a part may lie in memory with many others
        return Packed, (self.plan, *(part.clone() for part in parts), self.scale)

    def settled(self, *names: str) -> Packed:
        """The same weight, these of its tensors in huge pages."""
        moved: dict[str, Any] = {name: in_huge_pages(getattr(self, name)) for name in names}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        found = {"index": self.index, "offsets": self.offsets, "perm": self.perm, "values": self.values}
        return found if self.scale is None else {**found, "scale": self.scale}


def _blocks(rows: int, columns: int, height: int, tokens: int, density: float) -> tuple[int, int]:
    """(k_block, row_block) for a kernel that is to run on ``tokens`` tokens.

    Vectorised over tokens, the K-block of a tile's panel should fit into L1 (32 KiB) beside the entries that stream
    past, and still hold enough entries of a row to pay for loading and storing its sums.
    """
    whole = min(-(-columns // 8) * 8, 65536)
    if height >= 8:
        return max(8, whole), 128  # as many rows as are written to y at a time (csrc/cpu/spmm.inl, kWriteRows)
    if tokens == 1:
        k_block = whole
    elif height > 1:
        k_block = 256 * height
    elif tokens <= 8:
        k_block = 1024
    elif tokens <= 16:
        k_block = 512
    elif tokens <= 32:
        k_block = 256
    else:
        k_block = 96 if density > 0.35 else 160 if density > 0.15 else 192 if density > 0.07 else 256
    row_block = min(256, max(16, -(-rows // 64) * 16))  # at least four row blocks, for threads to share
    return max(8, min(k_block, whole)), row_block


def _wants_bitmask(height: int, tokens: int, density: float) -> bool:
    """Bits beat indices where reading the weight is what takes the time, unless few are set. AVX-512 spreads the values
    by one instruction, and so pays for bits sooner.
    """
    least = 0.15 if _native.C is not None and _native.C.lanes() == 16 else 0.3
    return height == 1 and (density > least if tokens == 1 else tokens <= 8 and density > 0.6)


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
    if _wants_bitmask(height, tokens, density):
        return _bitmask(rows, columns, group_of, column_of, place, dtype)
    k_block, row_block = _blocks(rows, columns, height, tokens, density)
    k_blocks, per_block, groups = -(-columns // k_block), row_block // height, rows // height

    def slots_of(group: Tensor, k: Tensor) -> Tensor:
        block = group // per_block
        in_block = torch.clamp(groups - block * per_block, max=per_block)  # the last row block may be short
        return block * (per_block * k_blocks) + k * in_block + (group - block * per_block)

    slot = slots_of(group_of, column_of // k_block)
    counts = torch.bincount(slot, minlength=groups * k_blocks)
    every_group = torch.arange(groups, device=device).repeat(k_blocks)
    every_k = torch.arange(k_blocks, device=device).repeat_interleave(groups)
    every_slot = slots_of(every_group, every_k)
    within, segment = torch.empty_like(every_slot), torch.empty_like(every_slot)
    within[every_slot] = every_group % per_block
    segment[every_slot] = every_group // per_block * k_blocks + every_k
    if height < 8:  # equal counts follow one another, so that the end of a kernel's loop is predicted
        most = int(counts.max()) + 1 if counts.numel() else 1
        by_count = torch.argsort(segment * most + counts, stable=True)
        moved = torch.empty_like(by_count)
        moved[by_count] = torch.arange(by_count.numel(), device=device)
        slot, counts, within = moved[slot], counts[by_count], within[by_count]
    order = torch.sort(slot.to(torch.int32), stable=True).indices
    offsets = torch.zeros(groups * k_blocks + 1, 2, dtype=torch.int32, device=device)
    offsets[1:, 0] = counts.cumsum(0)
    offsets[:-1, 1] = within
    index = (column_of % k_block)[order]
    index = torch.where(index > 32767, index - 65536, index).to(torch.int16)
    perm = (place[order].unsqueeze(1) + torch.arange(height, device=device) * row_step).reshape(-1).to(torch.int32)
    index = torch.cat([index, index.new_zeros(_SLACK)])
    perm = torch.cat([perm, perm.new_full((_SLACK * height,), -1)])
    plan = (_GROUPS, rows, columns, height, k_block, row_block)
    return Packed(plan, index, offsets, perm, torch.zeros(perm.numel(), dtype=dtype, device=device))


def _bitmask(rows: int, columns: int, row: Tensor, column: Tensor, place: Tensor, dtype: torch.dtype) -> Packed:
    """Kind "bitmask" of the entries at (row, column) whose canonical places are ``place``."""
    order = torch.argsort(row * columns + column)
    kept = torch.zeros(rows, -(-columns // 64) * 64, dtype=torch.uint8, device=row.device)
    kept[row, column] = 1
    bit = 1 << torch.arange(8, dtype=torch.uint8, device=row.device)
    index = (kept.view(rows, -1, 8) * bit).sum(2, dtype=torch.uint8)
    offsets = torch.zeros(rows + 1, dtype=torch.int32, device=row.device)
    offsets[1:] = torch.bincount(row, minlength=rows).cumsum(0)
    perm = place[order].to(torch.int32)
    perm = torch.cat([perm, perm.new_full((_SLACK,), -1)])
    plan = (_BITMASK, rows, columns, 1, columns, rows)
    return Packed(plan, index, offsets, perm, torch.zeros(perm.numel(), dtype=dtype, device=row.device))


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
    reasons = why_not_cpu(values)
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"writes float32 or bfloat16, not {dtype}")
    return reasons


@kernel("gather_values", "native", _why_not_gather)
def gather_values(values: Tensor, perm: Tensor, dtype: torch.dtype) -> Tensor:
    """values: any shape, canonical order; perm int32 `[packed]`, -1 where no value is; returns `[packed]`."""
    flat = values.to(torch.float32).contiguous()
    packed = torch.empty(perm.numel(), dtype=dtype)
    require_c().gather_values(flat.data_ptr(), perm.data_ptr(), perm.numel(), packed.data_ptr(), _VALUE_CODES[dtype])
    return packed


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
    return linear(x, Packed(tuple(plan), index, offsets, offsets, values, scale), bias, residual, activation)


def _why_not_packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> list[str]:
    reasons = why_not_cpu(x, dy)
    if plan[0] != _GROUPS:
        reasons.append("a bitmask serves inference only; pack with tokens > 8 to train")
    return reasons


@kernel("packed_sddmm", "native", _why_not_packed_sddmm)
def packed_sddmm(
    x: Tensor, dy: Tensor, index: Tensor, offsets: Tensor, perm: Tensor, plan: Sequence[int], n_values: int
) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[n_values]` in canonical order, the gradient of the kept values."""
    flat, grad_y = rows_of(x, plan[2]), rows_of(dy, plan[1])
    grad, canonical = torch.empty(perm.numel()), torch.empty(n_values)
    core = require_c()
    core.sddmm(
        tuple(plan),
        index.data_ptr(),
        offsets.data_ptr(),
        flat.data_ptr(),
        flat.stride(0),
        grad_y.data_ptr(),
        grad_y.stride(0),
        flat.shape[0],
        grad.data_ptr(),
    )
    core.scatter_values(grad.data_ptr(), perm.data_ptr(), perm.numel(), canonical.data_ptr())
    return canonical


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
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """The direct call: no dispatcher, no autograd. x: `[..., K]` on the CPU; norm: weight `[N_out]`, bias `[N_out]` and
    eps of a LayerNorm over the result; returns `[..., N_out]` in x's dtype.
    """
    rows, stride = packed.plan[1], packed.plan[2]
    dtype, lead = x.dtype, x.shape[:-1]
    if dtype is not torch.float32 or not x.is_contiguous():
        x = rows_of(x, stride)
        stride = x.stride(0)
    y = torch.empty((*lead, rows), dtype=torch.float32)
    if bias is not None and not (bias.dtype is torch.float32 and bias.is_contiguous()):
        bias = _f32(bias)
    add = None if residual is None else rows_of(residual, rows)
    spmm = packed.weight.spmm
    if norm is not None:
        gain, shift = (t.to(torch.float32).contiguous() for t in norm[:2])
        spmm = partial(packed.weight.spmm_norm, gain.data_ptr(), shift.data_ptr(), norm[2])
    spmm(
        0 if bias is None else bias.data_ptr(),
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        ACTIVATIONS[activation],
        x.data_ptr(),
        stride,
        lead.numel(),
        y.data_ptr(),
    )
    return y if dtype is torch.float32 else y.to(dtype)


def why_not_linear(x: Tensor, packed: Packed) -> list[str]:
    """Reasons why :func:`linear` cannot run; empty where it can."""
    return why_not_cpu(x)


def nm_as_csr(indices: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """(crow_indices, col_indices) int32 of an nm weight; its values, flattened, are the csr's."""
    rows, kept = indices.shape
    crow = torch.arange(rows + 1, dtype=torch.int32, device=indices.device) * kept
    group = torch.arange(kept, dtype=torch.int32, device=indices.device) // n
    return crow, (group * m + indices.to(torch.int32)).flatten()


# Canonical ops: the structure is packed on first sight and remembered as long as its index tensors live.

_LOCK = threading.RLock()  # a weak reference may die, and call forget, while this thread holds it
_SEEN: OrderedDict[tuple, tuple[tuple[weakref.ref, ...], tuple[int, ...], Any]] = OrderedDict()
_MOST_SEEN = 256


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _remembered(key: tuple, tensors: tuple[Tensor, ...], make: Callable[[], T]) -> T:
    """What ``make`` gives, kept for these very tensors until one dies or is written to."""
    key = (*key, *(id(t) for t in tensors))
    versions = tuple(_version(t) for t in tensors)
    with _LOCK:
        found = _SEEN.get(key)
        if found and found[1] == versions and all(ref() is t for ref, t in zip(found[0], tensors)):
            _SEEN.move_to_end(key)
            return found[2]
    made = make()

    def forget(_: object) -> None:
        with _LOCK:
            _SEEN.pop(key, None)

    with _LOCK:
        _SEEN[key] = (tuple(weakref.ref(t, forget) for t in tensors), versions, made)
        while len(_SEEN) > _MOST_SEEN:
            _SEEN.popitem(last=False)
    return made


def structure_of(
    shape: tuple[int, int],
    blocksize: tuple[int, int],
    crow_indices: Tensor,
    col_indices: Tensor,
    tokens: int,
    transpose: bool = False,
) -> Packed:
    """:func:`pack_structure`, remembered for these index tensors."""
    tuned = 1 if tokens == 1 else 8 if tokens <= 8 else 32 if tokens <= 32 else 128
    key = ("structure", shape, blocksize, tuned, transpose)
    return _remembered(
        key,
        (crow_indices, col_indices),
        lambda: pack_structure(shape, blocksize, crow_indices, col_indices, tuned, transpose),
    )


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


@kernel("nm_linear", "native", lambda x, values, indices, n, m, bias, activation: why_not_cpu(x, values, bias))
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; nm weight `[N_out, K / m * n]`; returns `[..., N_out]`."""
    crow, col = _remembered(("nm", n, m), (indices,), lambda: nm_as_csr(indices, n, m))
    return _canonical(x, indices.shape[0], (1, 1), crow, col, values, bias, activation)


@kernel("sddmm", "native", lambda x, dy, crow, col, r, c: why_not_cpu(x, dy))
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`, dy: `[..., N_out]`; returns `[nblocks, r, c]`: sum over tokens of dy[n, o] x[n, k], kept blocks
    only.
    """
    shape = (dy.shape[-1], x.shape[-1])
    packed = structure_of(shape, (r, c), crow_indices, col_indices, 128)
    n_values = col_indices.numel() * r * c
    flat = packed_sddmm(x, dy, packed.index, packed.offsets, packed.perm, packed.plan, n_values)
    return flat.view(-1, r, c)


def _why_not_add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> list[str]:
    return why_not_cpu(x, residual, weight, bias)


@kernel("add_layer_norm", "native", _why_not_add_layer_norm)
def add_layer_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x, residual: `[..., D]`; weight, bias `[D]`; returns LayerNorm(x + residual), x's dtype."""
    width = x.shape[-1]
    flat, add = rows_of(x, width), None if residual is None else rows_of(residual, width)
    gain, shift = weight.to(torch.float32).contiguous(), bias.to(torch.float32).contiguous()
    y = torch.empty(flat.shape[0], width)
    require_c().add_layer_norm(
        flat.data_ptr(),
        flat.stride(0),
        0 if add is None else add.data_ptr(),
        0 if add is None else add.stride(0),
        gain.data_ptr(),
        shift.data_ptr(),
        eps,
        flat.shape[0],
        width,
        y.data_ptr(),
    )
    return y.to(x.dtype).view(x.shape)
