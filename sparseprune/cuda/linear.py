"""Sparse matmul on NVIDIA cards: every layout through the csr kernels, 2:4 through torch's own product where that can.

A csr product takes one of four ways. In 16 bits, unless the weight is almost empty: *strips*, a bitmap and the kept
values, on the tensor cores. Up to 8 tokens otherwise: *deltas*, a byte an entry in place of its index, or csr as it is
where the weight is too empty for that. More tokens: csr against the transposed x. Blocks that Triton does not take and
N:M weights that torch does not take are read as csr, whose indices are made once. Gradients of x are the same products
with the transpose, whose structure is made once, too: no dense weight is ever made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel, kernels_of
from ..activations import ACTIVATION_CODES, activate
from ..device_memory import may_remember, remembered
from ._environment import DTYPE_CODES, MOST_TOKENS, capturing, launching, same_device, why_not_cuda, why_not_tensors
from ._tensors import address, aligned, as_dtype
from .deltas import DELTA_TOKENS, deltas_linear, deltas_of
from .strips import HALVES, STRIP_TOKENS, Strips, pack_strips, strips_linear, strips_of
from .structures import Csr, csr_of, nm_entries, transposed

__all__ = [
    "STRIPS_FROM",
    "STRIP_TOKENS",
    "Strips",
    "csr_as_it_is",
    "csr_linear",
    "csr_linear_dx",
    "nm_linear",
    "nm_linear_dx",
    "pack_strips",
    "product",
    "strips_linear",
    "wants_strips",
    "why_not_csr",
]

#: Density from which strips are used for one token (csr gathers from x once a token, strips do not care), the density
#: from which they are smaller than csr, and that from which they win with more than 16 tokens, where csr reads x from
#: L2 once an entry. Predictions (docs/lab/gpu.md) until benchmarks/gpu.py has measured them.
STRIPS_FROM, STRIPS_SMALLER, TILES_FROM = 0.15, 0.03, 0.04
FEW_TOKENS = 8  # the most that csr takes without transposing x
MOST_ENTRIES = 2**31 - 1


def why_not_csr(x: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Tensor | None = None) -> list[str]:
    """Reasons against a product of x (or dy) with these values and indices."""
    reasons = why_not_cuda(x, values, bias) + why_not_size(x, values.numel())
    for index in (crow, col):
        if index.device != x.device:
            reasons.append(f"needs indices on {x.device}, got {index.device}")
        if index.dtype != torch.int32:
            reasons.append(f"needs int32 indices, got {index.dtype}")
    return reasons


def why_not_size(x: Tensor, entries: int) -> list[str]:
    """Reasons against so many tokens or kept entries."""
    reasons, tokens = [], x.shape[:-1].numel()
    if entries > MOST_ENTRIES:
        reasons.append(f"needs fewer than 2^31 kept entries, got {entries}")
    if tokens > MOST_TOKENS:
        reasons.append(f"needs at most {MOST_TOKENS} tokens in one call, got {tokens}")
    return reasons


def _why_not_csr(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> list[str]:
    return why_not_csr(x, crow_indices, col_indices, values, bias)


@kernel("csr_linear", "cuda", _why_not_csr)
def csr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; csr of `[N_out, K]`; bias `[N_out]`; returns `[..., N_out]`. The values are multiplied in x's
    dtype. Strips multiply x at pruned columns by zero, so that an infinity there gives NaN, as in ``F.linear``.
    """
    return product(x, Csr(crow_indices, col_indices), values, bias, activation)


def product(
    x: Tensor, structure: Csr, canonical: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x: `[..., K]`; canonical: the values, any shape, that the structure of `[N_out, K]` takes; returns
    `[..., N_out]`, by the way that suits the tokens, the density and the dtype.
    """
    rows, columns = structure.crow.numel() - 1, x.shape[-1]
    tokens = x.numel() // columns if columns else 0
    entries = structure.col.numel()
    if tokens and wants_strips(tokens, entries, rows, columns, x.dtype):
        strips = strips_of(structure, columns, canonical, x.dtype)
        if strips is not None:
            return strips_linear(x, strips, bias, activation)
    if 0 < tokens <= DELTA_TOKENS and entries:
        packed = deltas_of(structure, columns, canonical, x.dtype)
        if packed is not None:
            return deltas_linear(x, *packed, bias, activation)
    values = structure.values(canonical, x.dtype)
    return csr_as_it_is(x, structure.crow, structure.col, values, bias, activation)


def wants_strips(tokens: int, entries: int, rows: int, columns: int, dtype: torch.dtype) -> bool:
    """Whether a product of so many tokens with so many kept entries goes by strips."""
    least = max(STRIPS_FROM / max(tokens, 1), STRIPS_SMALLER) if tokens <= STRIP_TOKENS else TILES_FROM
    return dtype in HALVES and entries >= least * rows * columns


def csr_as_it_is(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """As :func:`csr_linear`, values in x's dtype, from the canonical tensors: up to 8 tokens straight, more against x
    transposed.
    """
    same_device("csr_as_it_is", x, crow_indices, col_indices, values)
    rows, columns = crow_indices.numel() - 1, x.shape[-1]
    flat = x.reshape(x.shape[:-1].numel(), columns)
    tokens = flat.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    crow, col, kept, bias = crow_indices.contiguous(), aligned(col_indices), aligned(values), as_dtype(bias, x.dtype)
    weight = crow.data_ptr(), col.data_ptr(), kept.data_ptr(), address(bias), y.data_ptr()
    code, act = DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation]
    with launching(x) as (cuda, stream):
        if tokens <= FEW_TOKENS:
            flat = flat.contiguous()
            cuda.csr_linear_few(flat.data_ptr(), *weight, tokens, rows, columns, kept.numel(), code, act, stream)
        else:
            stride = -(-tokens // 4) * 4
            turned = x.new_empty(columns, stride)
            turned[:, :tokens], turned[:, tokens:] = flat.t(), 0
            cuda.csr_linear_many(turned.data_ptr(), stride, *weight, tokens, rows, kept.numel(), code, act, stream)
    return y


def better_by_triton(op: str, *args: object) -> list[str]:
    """A reason to leave a call to Triton's kernel of this op, where it can run: its blocks fill a tensor core."""
    found = next((k for k in kernels_of(op) if k.backend == "triton"), None)
    if found is None or found.why_not(*args):
        return []
    return ["these blocks fill the tensor cores in Triton's kernel; here they would be read entry by entry"]


def _why_not_bsr(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> list[str]:
    reasons = why_not_csr(x, crow_indices, col_indices, values, bias)
    return reasons or better_by_triton("bsr_linear", x, crow_indices, col_indices, values, bias, activation)


@kernel("bsr_linear", "cuda", _why_not_bsr)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values: `[nblocks, r, c]`; bias `[N_out]`; returns `[..., N_out]`: the blocks entry by entry."""
    structure = csr_of(crow_indices, col_indices, (values.shape[1], values.shape[2]))
    return product(x, structure, values, bias, activation)


# 2:4: torch has the tensor-core product (CUTLASS or cuSPARSELt); ours is the dispatch and the memory of what was made.


def _cutlass(dense: Tensor) -> Tensor:
    return torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(dense)


@functools.cache
def semi_structured(index: int) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """(what compresses a 2:4 weight on this device, why nothing does), found by a small product each: a torch built
    without cuSPARSELt, or with one older than the card, says so only there, and CUTLASS's serves capability 8 alone.
    """
    reasons = []
    with ThreadPoolExecutor(1) as thread:  # whose memory is no graph's, and whose tensors are real
        for compress in (torch.sparse.to_sparse_semi_structured, _cutlass):
            try:
                thread.submit(_try_semi_structured, compress, index).result()
                return compress, ""
            except Exception as error:  # whatever the library says: it is the reason
                reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0])
    return None, "; ".join(dict.fromkeys(reasons))


@torch.no_grad()
def _try_semi_structured(compress: Callable[[Tensor], Tensor], index: int) -> None:
    pattern = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float16, device=f"cuda:{index}")
    weight = pattern.repeat(64, 16)
    got = F.linear(torch.ones_like(weight), compress(weight))
    if not bool((got == 32).all()):
        raise RuntimeError("its result is wrong")


def why_not_semi_structured(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None
) -> list[str]:
    """Reasons against torch's 2:4 product."""
    reasons = why_not_tensors(x, values, bias, dtypes=HALVES)
    if (n, m) != (2, 4):
        reasons.append(f"needs 2:4, which the sparse tensor core knows, got {n}:{m}")
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        reasons.append(f"needs values and bias of x's dtype {x.dtype}")
    if values.shape[0] % 64 or x.shape[-1] % 64:
        reasons.append(f"needs N_out and K in multiples of 64, got {values.shape[0]} and {x.shape[-1]}")
    if x.numel() == 0:
        reasons.append("needs at least one token")
    if not reasons and not capturing(x.device):
        reason = semi_structured(x.device.index or 0)[1]
        reasons += [f"torch's 2:4 product does not run on this card: {reason}"] if reason else []
    if not may_remember(values):
        reasons.append("needs frozen values, whose compressed form can be kept; requires_grad_(False)")
    if not reasons and capturing(x.device) and _compressed(x, values, indices) is None:
        reasons.append("needs one call outside a CUDA graph first, to compress the weight")
    return reasons


def _compressed(x: Tensor, values: Tensor, indices: Tensor) -> Tensor | None:
    def make() -> Tensor:
        place = torch.arange(indices.shape[1], device=x.device) // 2 * 4 + indices.long()
        dense = values.new_zeros(values.shape[0], x.shape[-1]).scatter(1, place, values.detach())
        compress = semi_structured(x.device.index or 0)[0]
        assert compress is not None  # why_not_semi_structured refuses a card without one
        return compress(dense)

    return remembered("2:4", (values, indices), make)


def _either(*ways: Callable[[], list[str]]) -> list[str]:
    """Nothing where one of the ways is open, else every way's reasons."""
    found: list[str] = []
    for way in ways:
        reasons = way()
        if not reasons:
            return []
        found += [reason for reason in reasons if reason not in found]
    return found


def _why_not_nm(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> list[str]:
    return _either(
        lambda: why_not_semi_structured(x, values, indices, n, m, bias),
        lambda: why_not_nm_entries(x, values, indices, bias),
    )


def why_not_nm_entries(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None = None) -> list[str]:
    """Reasons against reading an N:M weight as csr."""
    reasons = why_not_cuda(x, values, bias) + why_not_size(x, values.numel())
    if indices.device != x.device:
        reasons.append(f"needs indices on {x.device}, got {indices.device}")
    return reasons


@kernel("nm_linear", "cuda", _why_not_nm)
def nm_linear(
    x: Tensor, values: Tensor, indices: Tensor, n: int, m: int, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values, indices (uint8) `[N_out, K / m * n]`; bias `[N_out]`; returns `[..., N_out]`."""
    if why_not_semi_structured(x, values, indices, n, m, bias):
        return product(x, nm_entries(indices, n, m), values, bias, activation)
    with torch.no_grad():
        weight = _compressed(x, values, indices)
        assert weight is not None  # why_not_semi_structured refuses a call that cannot make it
        y = F.linear(x.reshape(-1, x.shape[-1]), weight, bias).contiguous()  # transposed in older torch
        return activate(y, activation).view(*x.shape[:-1], values.shape[0])


def input_gradient(dy: Tensor, structure: Csr, canonical: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; returns dY W, `[..., k]`."""
    turned = transposed(structure.crow, structure.col, k, structure.place)
    return product(dy, turned, canonical)


def _why_not_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> list[str]:
    reasons = why_not_csr(dy, crow_indices, col_indices, values)
    if reasons or values.dim() == 1:
        return reasons
    return better_by_triton("csr_linear_dx", dy, crow_indices, col_indices, values, k)


@kernel("csr_linear_dx", "cuda", _why_not_dx)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N_out]`; values `[nnz]` or blocks `[nblocks, r, c]`; returns dX = dY W, `[..., k]`."""
    blocksize = (values.shape[1], values.shape[2]) if values.dim() == 3 else (1, 1)
    return input_gradient(dy, csr_of(crow_indices, col_indices, blocksize), values, k)


def _why_not_nm_dx(dy: Tensor, values: Tensor, indices: Tensor, n: int, m: int, k: int) -> list[str]:
    return why_not_nm_entries(dy, values, indices)


@kernel("nm_linear_dx", "cuda", _why_not_nm_dx)
def nm_linear_dx(dy: Tensor, values: Tensor, indices: Tensor, n: int, m: int, k: int) -> Tensor:
    """dy: `[..., N_out]`; an N:M weight of `[N_out, k]`; returns dY W, `[..., k]`. Its transpose is not N:M: read as
    csr.
    """
    return input_gradient(dy, nm_entries(indices, n, m), values, k)
