"""Unstructured 16-bit weights in strips, a bitmap and the kept values: read sparse, computed dense on the tensor cores.

csrc/cuda/linear_bitmap.cu has the format. The structure is made once; values enter it by one pass, and stay while they
cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import ACTIVATION_CODES
from ..device_memory import may_remember, remembered
from ..packing import STRIP_COLUMNS, STRIP_ROWS
from ._environment import DTYPE_CODES, launching, multiprocessors, same_device
from ._tensors import address, aligned, as_dtype
from .structures import Csr

__all__ = ["HALVES", "STRIP_TOKENS", "Strips", "pack_strips", "strips_linear", "strips_of"]

STRIP_TOKENS = 16  # more take the kernel that shares x among warps, in tiles of 32 or 64 tokens
TILE_ROWS = 128
LEAST_STEPS = 4  # strips of K that a split must have, so that its pipeline fills
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Bitmap:
    """The structure of a weight `[N_out, K]` in strips of 16 rows x 64 columns.

    words: int32 `[strips * 32]`; starts: int32 `[strips + 1]`, where each strip's values begin; most: the most values
    in one strip.
    """

    shape: tuple[int, int]
    words: Tensor
    starts: Tensor
    most: int

    @property
    def across(self) -> int:
        return -(-self.shape[1] // STRIP_COLUMNS)

    @property
    def strips(self) -> int:
        return -(-self.shape[0] // STRIP_ROWS) * self.across


@dataclass(frozen=True)
class Strips:
    """A weight: its structure, and the values, float16 or bfloat16 `[nnz, rounded up to 8]`, in the strips' order."""

    bitmap: Bitmap
    values: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads, x and y aside."""
        return sum(t.numel() * t.element_size() for t in (self.bitmap.words, self.bitmap.starts, self.values))


def bitmap_of(shape: tuple[int, int], crow: Tensor, col: Tensor) -> Bitmap:
    """The structure of a valid csr weight. Asks the device for one number."""
    rows, columns = shape
    across = -(-columns // STRIP_COLUMNS)
    strips = -(-rows // STRIP_ROWS) * across
    words = torch.empty(strips * 32, dtype=torch.int32, device=col.device)
    starts = torch.zeros(strips + 1, dtype=torch.int32, device=col.device)
    if strips == 0:
        return Bitmap(shape, words, starts, 0)
    crow, col = crow.contiguous(), col.contiguous()
    with launching(col) as (cuda, stream):
        cuda.bitmap_words(
            crow.data_ptr(), col.data_ptr(), words.data_ptr(), starts.data_ptr() + 4, rows, across, strips, stream
        )
    most = int(starts.max())
    starts.copy_(starts.cumsum(0, dtype=torch.int32))
    return Bitmap(shape, words, starts, most)


def filled(bitmap: Bitmap, structure: Csr, canonical: Tensor, dtype: torch.dtype) -> Strips:
    """The strips with these values, canonical order, any shape. No wait, no temporary."""
    entries = structure.col.numel()
    packed = torch.empty(-(-entries // 8) * 8, dtype=dtype, device=canonical.device)
    packed[-8:] = 0  # behind the last value: copied, never used
    if entries:
        crow, col, values = structure.crow.contiguous(), structure.col.contiguous(), canonical.detach().contiguous()
        with launching(col) as (cuda, stream):
            cuda.bitmap_values(
                crow.data_ptr(), col.data_ptr(), address(structure.place), values.data_ptr(), DTYPE_CODES[values.dtype],
                bitmap.words.data_ptr(), bitmap.starts.data_ptr(), packed.data_ptr(), DTYPE_CODES[dtype],
                bitmap.shape[0], bitmap.across, bitmap.strips, stream,
            )  # fmt: skip
    return Strips(bitmap, packed)


def pack_strips(
    shape: tuple[int, int], crow: Tensor, col: Tensor, values: Tensor, dtype: torch.dtype | None = None
) -> Strips:
    """Packs a valid csr weight `[N_out, K]`; dtype: float16 or bfloat16, that of values where None."""
    dtype = dtype or values.dtype
    if dtype not in HALVES:
        raise ValueError(f"pack_strips: dtype expected float16 or bfloat16, got {dtype}; use values.half()")
    return filled(bitmap_of(shape, crow, col), Csr(crow, col), values, dtype)


def strips_of(structure: Csr, columns: int, canonical: Tensor, dtype: torch.dtype) -> Strips | None:
    """The strips of a structure with these values, in dtype. The structure is remembered, the values where they cannot
    change unseen; None where a CUDA graph is being recorded and the structure was not made before.
    """
    indices = structure.crow, structure.col
    shape = structure.crow.numel() - 1, columns
    bitmap = remembered(f"bitmap {columns}", indices, lambda: bitmap_of(shape, *indices))
    if bitmap is None:
        return None
    made = None
    if may_remember(canonical):
        kind = f"strips {columns} {dtype}"
        made = remembered(kind, (*indices, canonical), lambda: filled(bitmap, structure, canonical, dtype))
    return made or filled(bitmap, structure, canonical, dtype)


def splits_for(tokens: int, rows: int, across: int, units: int) -> int:
    """Into how many parts K is cut, so that about two blocks come on each multiprocessor."""
    tile = 32 if tokens <= 32 else 64
    blocks = -(-rows // TILE_ROWS) * -(-tokens // tile)
    return max(1, min(-(-2 * units // max(1, blocks)), across // LEAST_STEPS))


def strips_linear(
    x: Tensor, strips: Strips, bias: Tensor | None = None, activation: str = "none", splits: int | None = None
) -> Tensor:
    """x: `[..., K]` of the values' dtype; returns activation(x W^T + bias) `[..., N_out]`.

    splits: into how many parts K is cut for more than 16 tokens; None: what fills the card.
    """
    bitmap = strips.bitmap
    same_device("strips_linear", x, bitmap.words, strips.values)
    rows, columns = bitmap.shape
    flat = aligned(x.reshape(-1, columns))
    tokens = flat.shape[0]
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    bias = as_dtype(bias, x.dtype)
    weight = bitmap.words.data_ptr(), bitmap.starts.data_ptr(), strips.values.data_ptr(), address(bias), y.data_ptr()
    code, act, vector = DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], columns % 8 == 0
    with launching(x) as (cuda, stream):
        if tokens <= STRIP_TOKENS and splits is None:
            cuda.bitmap_linear(
                flat.data_ptr(), *weight, tokens, rows, columns, bitmap.most, code, act, vector, stream
            )
        else:
            splits = splits or splits_for(tokens, rows, bitmap.across, multiprocessors(x))
            sums = x.new_empty((splits, tokens, rows), dtype=torch.float32) if splits > 1 else None
            cuda.bitmap_tiles(
                flat.data_ptr(), *weight, address(sums), tokens, rows, columns, bitmap.most, splits, code, act, vector,
                stream,
            )  # fmt: skip
    return y
