"""Sparse matmul on NVIDIA cards: csr through the compiled kernels, 2:4 through torch's own semi-structured product.

csr_linear takes one of three ways. Up to 16 tokens in 16 bits: *strips*, a bitmap and the kept values in the order of
the tensor core's fragments, made once per structure and state of the values and remembered. Up to 8 tokens otherwise:
csr as it is. More tokens: csr against the transposed x.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..reference import ACTIVATIONS, activate
from ._environment import DTYPE_CODES, Memory, capturing, launching, why_not_cuda, why_not_tensors

__all__ = ["STRIPS_FROM", "STRIP_TOKENS", "Strips", "csr_linear", "nm_linear", "pack_strips", "strips_linear"]

STRIP_ROWS, STRIP_COLUMNS = 16, 64
STRIP_TOKENS = 16  # the most that a strips product takes
#: Density from which strips are used for one token (csr gathers from x once a token, strips do not care), and the
#: density from which they are smaller than csr. Predictions (docs/gpu.md) until benchmarks/gpu.py has measured them.
STRIPS_FROM, STRIPS_SMALLER = 0.15, 0.03
FEW_TOKENS = 8  # the most that csr takes without transposing x
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Strips:
    """A weight `[N_out, K]` cut into strips of 16 rows x 64 columns; csrc/cuda/bitmap_linear.cu has the format.

    words: int32 `[strips * 32]`; starts: int32 `[strips + 1]`, where each strip's values begin; values: float16 or
    bfloat16 `[nnz, rounded up to 8]`; most: the most values in one strip.
    """

    shape: tuple[int, int]
    words: Tensor
    starts: Tensor
    values: Tensor
    most: int

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads, x and y aside."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.starts, self.values))


def pack_strips(shape: tuple[int, int], crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> Strips:
    """Packs a valid csr weight `[N_out, K]` with float16 or bfloat16 values. Asks the device for one number."""
    rows, columns = shape
    device = values.device
    if values.dtype not in HALVES:
        raise ValueError(f"pack_strips: values expected float16 or bfloat16, got {values.dtype}; use values.half()")
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row = torch.repeat_interleave(torch.arange(rows, device=device), counts, output_size=values.numel())
    column = col_indices.long()
    across = -(-columns // STRIP_COLUMNS)
    strips = -(-rows // STRIP_ROWS) * across
    strip = row // STRIP_ROWS * across + column // STRIP_COLUMNS
    lane = row % 8 * 4 + column % STRIP_COLUMNS // 16
    nibble = column % 16 // 4 * 2 + row % STRIP_ROWS // 8
    bit = nibble * 4 + column % 4
    # Bits of one word are distinct, so a sum sets them; int64 holds bit 31 without its becoming a sign.
    words = torch.zeros(strips * 32, dtype=torch.int64, device=device)
    words.scatter_add_(0, strip * 32 + lane, torch.ones_like(bit) << bit)
    order = torch.argsort(((strip * 8 + nibble) * 32 + lane) * 4 + column % 4)
    per_strip = torch.zeros(strips, dtype=torch.int64, device=device).scatter_add_(0, strip, torch.ones_like(strip))
    starts = torch.zeros(strips + 1, dtype=torch.int32, device=device)
    starts[1:] = per_strip.cumsum(0)
    packed = values.new_zeros(-(-values.numel() // 8) * 8)
    packed[: values.numel()] = values.detach()[order]
    signed = torch.where(words >> 31 > 0, words - (1 << 32), words).to(torch.int32)
    return Strips(shape, signed, starts, packed, int(per_strip.max()) if strips else 0)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, dense and 16-byte aligned; a view that begins elsewhere is copied."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype).contiguous()


def strips_linear(x: Tensor, strips: Strips, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """x: `[..., K]` of the values' dtype, at most 16 tokens; returns activation(x W^T + bias) `[..., N_out]`."""
    rows, columns = strips.shape
    flat = _aligned(x.reshape(-1, columns))
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    bias = _as(bias, x.dtype)
    with launching(x) as (cuda, stream):
        cuda.bitmap_linear(
            flat.data_ptr(), strips.words.data_ptr(), strips.starts.data_ptr(), strips.values.data_ptr(),
            _address(bias), y.data_ptr(), flat.shape[0], rows, columns, strips.most, DTYPE_CODES[x.dtype],
            ACTIVATIONS.index(activation), columns % 8 == 0, stream,
        )  # fmt: skip
    return y


# Packed forms are remembered for the very tensors they were made from, as long as those live and are not written to.

_LOCK = threading.Lock()
_SEEN: OrderedDict[tuple[Any, ...], tuple[tuple[Memory, ...], Any]] = OrderedDict()
_MOST_SEEN = 1024


def _remembered(kind: str, tensors: tuple[Tensor, ...], make: Callable[[], Any]) -> Any:
    """What ``make`` gave for these tensors; None where a CUDA graph is being recorded and it was not made before."""
    key = (kind, *(tensor.data_ptr() for tensor in tensors))
    with _LOCK:
        found = _SEEN.get(key)
        if found is not None and all(memory.holds(tensor) for memory, tensor in zip(found[0], tensors)):
            _SEEN.move_to_end(key)
            return found[1]
    if capturing(tensors[0]):
        return None
    made = make()
    with _LOCK:
        for old in [k for k, (memories, _) in _SEEN.items() if any(memory.gone for memory in memories)]:
            del _SEEN[old]
        _SEEN[key] = tuple(Memory(tensor) for tensor in tensors), made
        while len(_SEEN) > _MOST_SEEN:
            _SEEN.popitem(last=False)
    return made


def _why_not_csr(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> list[str]:
    reasons = why_not_cuda(x, values)
    if values.dtype != x.dtype:
        reasons.append(f"needs values of x's dtype, got {values.dtype} and {x.dtype}")
    if crow_indices.device != x.device or col_indices.device != x.device:
        reasons.append(f"needs indices on {x.device}, got {crow_indices.device} and {col_indices.device}")
    if crow_indices.dtype != torch.int32 or col_indices.dtype != torch.int32:
        reasons.append(f"needs int32 indices, got {crow_indices.dtype} and {col_indices.dtype}")
    return reasons


@kernel("csr_linear", "cuda", _why_not_csr)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`, values in x's dtype; bias `[N_out]`; returns `[..., N_out]`."""
    rows, columns = crow_indices.numel() - 1, x.shape[-1]
    tokens = x.numel() // columns if columns else 0
    least = max(STRIPS_FROM / max(tokens, 1), STRIPS_SMALLER) * rows * columns
    if x.dtype in HALVES and 0 < tokens <= STRIP_TOKENS and values.numel() >= least:
        shape = rows, columns
        strips = _remembered(
            "strips",
            (crow_indices, col_indices, values),
            lambda: pack_strips(shape, crow_indices, col_indices, values),
        )
        if strips is not None:
            return strips_linear(x, strips, bias, activation)
    return csr_as_it_is(x, crow_indices, col_indices, values, bias, activation)


def csr_as_it_is(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """As :func:`csr_linear`, from the canonical tensors: up to 8 tokens straight, more against x transposed."""
    rows, columns = crow_indices.numel() - 1, x.shape[-1]
    flat = x.reshape(-1, columns)
    tokens = flat.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    crow, col, kept, bias = crow_indices.contiguous(), _aligned(col_indices), _aligned(values), _as(bias, x.dtype)
    weight = crow.data_ptr(), col.data_ptr(), kept.data_ptr(), _address(bias), y.data_ptr()
    code, act = DTYPE_CODES[x.dtype], ACTIVATIONS.index(activation)
    with launching(x) as (cuda, stream):
        if tokens <= FEW_TOKENS:
            flat = flat.contiguous()
            cuda.csr_linear_few(flat.data_ptr(), *weight, tokens, rows, columns, kept.numel(), code, act, stream)
        else:
            stride = -(-tokens // 4) * 4
            turned = x.new_empty(columns, stride)
            turned[:, :tokens] = flat.t()
            cuda.csr_linear_many(turned.data_ptr(), stride, *weight, tokens, rows, kept.numel(), code, act, stream)
    return y


# 2:4: torch has the tensor-core product (CUTLASS or cuSPARSELt); ours is the dispatch and the memory of what was made.


def _why_not_nm(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> list[str]:
    reasons = why_not_tensors(x, values, bias, dtypes=HALVES)
    if (n, m) != (2, 4):
        reasons.append(f"needs 2:4, which the sparse tensor core knows, got {n}:{m}")
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        reasons.append(f"needs values and bias of x's dtype {x.dtype}")
    if values.shape[0] % 64 or x.shape[-1] % 64:
        reasons.append(f"needs N_out and K in multiples of 64, got {values.shape[0]} and {x.shape[-1]}")
    if x.numel() == 0:
        reasons.append("needs at least one token")
    if x.device.type == "cuda" and capturing(x) and _compressed(x, values, indices) is None:
        reasons.append("needs one call outside a CUDA graph first, to compress the weight")
    return reasons


def _compressed(x: Tensor, values: Tensor, indices: Tensor) -> Tensor | None:
    def make() -> Tensor:
        place = torch.arange(indices.shape[1], device=x.device) // 2 * 4 + indices.long()
        dense = values.new_zeros(values.shape[0], x.shape[-1]).scatter(1, place, values.detach())
        return torch.sparse.to_sparse_semi_structured(dense)

    return _remembered("2:4", (values, indices), make)


@kernel("nm_linear", "cuda", _why_not_nm)
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values, indices (uint8) `[N_out, K / m * n]`; bias `[N_out]`; returns `[..., N_out]`."""
    with torch.no_grad():
        weight = _compressed(x, values, indices)
        assert weight is not None  # _why_not_nm refuses a call that cannot make it
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias)
        return activate(y, activation).view(*x.shape[:-1], values.shape[0])
