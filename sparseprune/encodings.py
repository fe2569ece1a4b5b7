"""Floor 3: a pruned matrix in the fewest bytes, and back. What a checkpoint holds; kernels never see these forms.

Every encoding stores the kept values once and says where they belong:

========  ===========================================================================================
bitmask   one bit an entry
delta4    gaps between kept entries in 4 bits; 15 means "15 further", and the gap goes on
delta8    the same in 8 bits; 255 means "255 further"
csr       crow_indices, and column indices of 16 bits (32 where K > 65536)
bsr       one bit a block of r x c; kept blocks are stored whole
nm        n of every m along K, with ``ceil(log2 m)`` bits an index
========  ===========================================================================================

Values are stored as they are, as bfloat16, or as int8 with one float32 scale a row (``|q| >= 1`` where an entry is
kept, so that none is lost). Entries that are zero, of either sign, are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import layouts

__all__ = ["DTYPES", "ENCODINGS", "Encoded", "decode", "encode", "pack_bits", "smallest", "unpack_bits"]

ENCODINGS = ("bitmask", "delta4", "delta8", "csr", "bsr", "nm")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCKSIZES = ((64, 64), (32, 32), (16, 16), (16, 1), (8, 1), (4, 4), (4, 1))
_PATTERNS = ((1, 4), (2, 4), (4, 8))


@dataclass(frozen=True)
class Encoded:
    """A matrix `[N, K]` in one encoding.

    ``tensors``: "values" (1-D), "index" (uint8 `[bytes]`), "crow" (csr, int32 `[N + 1]`), "scale" (int8, float32
    `[N]`). ``dtype`` is the matrix's own, ``values`` the stored one; ``options`` holds ``block`` or ``nm``.
    """

    encoding: str
    shape: tuple[int, int]
    dtype: str
    values: str
    nnz: int
    tensors: dict[str, Tensor] = field(repr=False)
    options: dict[str, list[int]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def spec(self) -> dict[str, Any]:
        """What :func:`decode` needs besides the tensors; plain JSON."""
        return {
            "encoding": self.encoding,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "values": self.values,
            "nnz": self.nnz,
            **self.options,
        }


def smallest(
    weight: Tensor, value_bytes: int | None = None, extra: Iterable[tuple[int, int]] = ()
) -> tuple[int, str, dict[str, list[int]]]:
    """weight: `[N, K]`; returns (bytes, encoding, options) of the encoding that takes the fewest bytes.

    value_bytes: bytes a stored value, by default the weight's own. extra: block sizes tried besides the usual ones.
    """
    rows, columns = weight.shape
    size = value_bytes or weight.element_size()
    kept = (weight.detach() != 0).cpu()
    nnz = int(kept.sum())
    total = rows * columns
    gaps = _gaps(kept)
    found: list[tuple[int, str, dict[str, list[int]]]] = [((total + 7) // 8 + nnz * size, "bitmask", {})]
    for bits in (4, 8):
        codes = nnz + int((gaps // ((1 << bits) - 1)).sum())
        found.append(((codes * bits + 7) // 8 + nnz * size, f"delta{bits}", {}))
    found.append((nnz * (2 if columns <= 1 << 16 else 4) + 4 * (rows + 1) + nnz * size, "csr", {}))
    for r, c in dict.fromkeys((*extra, *_BLOCKSIZES)):
        if r < 1 or c < 1 or rows % r or columns % c or not total:
            continue
        stored = int(kept.view(rows // r, r, columns // c, c).any(3).any(1).sum()) * r * c
        found.append(((total // (r * c) + 7) // 8 + stored * size, "bsr", {"block": [r, c]}))
    for n, m in _PATTERNS:
        if columns % m == 0 and total and int(kept.view(rows, columns // m, m).sum(2).max()) <= n:
            stored = total // m * n
            found.append(((stored * _index_bits(m) + 7) // 8 + stored * size, "nm", {"nm": [n, m]}))
    return min(found, key=lambda entry: entry[0])


def encode(weight: Tensor, values: str | None = None, extra: Iterable[tuple[int, int]] = ()) -> Encoded:
    """weight: `[N, K]`, floating; values: None (as they are), "bfloat16" or "int8"; returns the smallest encoding.

    ValueError where an int8 weight is not finite.
    """
    weight = weight.detach().cpu().contiguous()
    dtype = str(weight.dtype).removeprefix("torch.")
    stored, tensors = weight, {}
    if values == "int8":
        stored, tensors["scale"] = _quantised(weight)
    elif values is not None:
        stored = weight.to(DTYPES[values])
    _, encoding, options = smallest(stored, extra=extra)
    kept = stored != 0
    rows, columns = weight.shape
    if encoding == "bsr":
        r, c = options["block"]
        blocks = stored.view(rows // r, r, columns // c, c).transpose(1, 2)
        alive = blocks.ne(0).flatten(2).any(2)
        tensors["index"] = pack_bits(alive)
        tensors["values"] = blocks[alive].reshape(-1).contiguous()
    elif encoding == "nm":
        n, m = options["nm"]
        packed = layouts.NM.from_dense(stored.float() if values == "int8" else stored, n, m)
        tensors["index"] = _pack_indices(packed.indices, _index_bits(m))
        tensors["values"] = packed.values.reshape(-1).to(stored.dtype)
    else:
        tensors["values"] = stored[kept]
        if encoding == "bitmask":
            tensors["index"] = pack_bits(kept)
        elif encoding == "csr":
            crow = torch.zeros(rows + 1, dtype=torch.int32)
            crow[1:] = kept.sum(1).cumsum(0)
            columns_of = kept.nonzero()[:, 1].numpy().astype(np.uint16 if columns <= 1 << 16 else np.uint32)
            tensors["crow"], tensors["index"] = crow, _from_numpy(columns_of.view(np.uint8))
        else:
            tensors["index"] = _pack_gaps(_gaps(kept), int(encoding.removeprefix("delta")))
    stored_as = str(stored.dtype).removeprefix("torch.")
    return Encoded(encoding, (rows, columns), dtype, stored_as, int(kept.sum()), tensors, options)


def decode(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix `[N, K]` again. Trusts nothing: ValueError where spec or tensors do not fit each other."""
    encoding, (rows, columns) = _one_of(spec, "encoding", ENCODINGS), _shape(spec)
    dtype = DTYPES[_one_of(spec, "dtype", tuple(DTYPES))]
    stored_as = _one_of(spec, "values", (*DTYPES, "int8"))
    total, nnz = rows * columns, spec.get("nnz")
    if not isinstance(nnz, int) or isinstance(nnz, bool) or not 0 <= nnz <= total:
        raise ValueError(f"nnz expected in [0, {total}], got {nnz!r}")
    expected = {"index", "values"} | ({"crow"} if encoding == "csr" else set())
    expected |= {"scale"} if stored_as == "int8" else set()
    if set(tensors) != expected:
        raise ValueError(f"{encoding} expected the tensors {sorted(expected)}, got {sorted(tensors)}")
    values, index = tensors["values"], tensors["index"]
    wanted = torch.int8 if stored_as == "int8" else DTYPES[stored_as]
    if values.dtype != wanted or values.dim() != 1:
        raise ValueError(f"values expected {wanted} with one dimension, got {values.dtype} {list(values.shape)}")
    if index.dtype != torch.uint8 or index.dim() != 1:
        raise ValueError(f"index expected torch.uint8 with one dimension, got {index.dtype} {list(index.shape)}")
    try:
        dense = torch.zeros(total, dtype=values.dtype)
    except (RuntimeError, TypeError):  # a size that no memory holds, or no 64-bit number
        raise ValueError(f"shape expected a matrix that fits memory, got {[rows, columns]}") from None
    if encoding == "bsr":
        r, c = _pair(spec, "block")
        if rows % r or columns % c:
            raise ValueError(f"block {[r, c]} does not divide {[rows, columns]}")
        alive = unpack_bits(index, total // (r * c)).view(rows // r, columns // c)
        _expect_count(values, int(alive.sum()) * r * c)
        blocks = torch.zeros(rows // r, columns // c, r, c, dtype=values.dtype)
        blocks[alive] = values.view(-1, r, c)
        dense = blocks.transpose(1, 2).reshape(-1)
    elif encoding == "nm":
        n, m = _pair(spec, "nm")
        if not 1 <= n <= m <= 256 or columns % m:
            raise ValueError(f"nm {[n, m]} expected n <= m <= 256 and m dividing K = {columns}")
        _expect_count(values, total // m * n)
        indices = _unpack_indices(index, values.numel(), _index_bits(m)).view(rows, columns // m * n)
        floats = values.view(rows, -1).float() if stored_as == "int8" else values.view(rows, -1)
        layout = layouts.NM((rows, columns), n, m, floats, indices)
        layout.validate()
        dense = layout.to_dense().reshape(-1).to(values.dtype)
    else:
        _expect_count(values, nnz)
        if encoding == "bitmask":
            at = unpack_bits(index, total).nonzero().flatten()
        elif encoding == "csr":
            at = _csr_positions(tensors["crow"], index, rows, columns, nnz)
        else:
            at = _unpack_gaps(index, int(encoding.removeprefix("delta")), nnz)
        if at.numel() != nnz or (nnz and int(at[-1]) >= total):
            raise ValueError(f"{encoding} index expected {nnz} positions below {total}, got {at.numel()} positions")
        dense[at] = values
    if encoding in ("bsr", "nm") and int(dense.ne(0).sum()) != nnz:
        raise ValueError(f"nnz expected {int(dense.ne(0).sum())}, as stored, got {nnz}")
    matrix = dense.view(rows, columns)
    if stored_as != "int8":
        return matrix.to(dtype)
    scale = tensors["scale"]
    if scale.dtype != torch.float32 or tuple(scale.shape) != (rows,):
        raise ValueError(f"scale expected torch.float32 [{rows}], got {scale.dtype} {list(scale.shape)}")
    if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
        raise ValueError("scale expected finite and positive, got others")
    return (matrix.float() * scale[:, None]).to(dtype)


def _quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8 `[N, K]`, float32 scale `[N]`); kept entries stay at least one step away from zero."""
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("values='int8' expected finite weights, got inf or NaN; use values='float32'")
    peak = wide.abs().amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak)).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (wide / scale[:, None]).round().clamp(-127, 127)
    return torch.where(steps == 0, wide.sign(), steps).to(torch.int8), scale


def _one_of(spec: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = spec.get(key)
    if value not in allowed:
        raise ValueError(f"{key} expected one of {', '.join(allowed)}, got {value!r}")
    return str(value)


def _pair(spec: Mapping[str, Any], key: str) -> tuple[int, int]:
    value = spec.get(key)
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v >= 1 for v in value):
        raise ValueError(f"{key} expected two whole numbers of at least 1, got {value!r}")
    return value[0], value[1]


def _shape(spec: Mapping[str, Any]) -> tuple[int, int]:
    value = spec.get("shape")
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int and v >= 0 for v in value):
        raise ValueError(f"shape expected two whole numbers, got {value!r}")
    return value[0], value[1]


def _expect_count(values: Tensor, count: int) -> None:
    if values.numel() != count:
        raise ValueError(f"values expected {count} entries, got {values.numel()}")


def _from_numpy(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def pack_bits(mask: Tensor) -> Tensor:
    """mask: bool, any shape; returns uint8 `[ceil(numel / 8)]`, the first entry in the lowest bit."""
    mask = mask.cpu()
    return _from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse: bool `[count]`. ValueError on another length and on bits set beyond the end."""
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"bits expected torch.uint8 with one dimension, got {packed.dtype} {list(packed.shape)}")
    if packed.numel() != (count + 7) // 8:
        raise ValueError(f"bits expected {(count + 7) // 8} bytes for {count}, got {packed.numel()}")
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise ValueError("bits beyond the last entry expected 0, got 1")
    return torch.from_numpy(bits[:count].astype(bool))


def _gaps(kept: Tensor) -> np.ndarray:
    """int64 `[nnz]`: how many zeros lie before each kept entry, in flat order."""
    at = np.flatnonzero(kept.reshape(-1).numpy())
    return np.diff(at, prepend=-1) - 1


def _pack_gaps(gaps: np.ndarray, bits: int) -> Tensor:
    escape = (1 << bits) - 1
    jumps, rest = gaps // escape, gaps % escape
    last = np.cumsum(jumps + 1) - 1
    codes = np.full(int(last[-1]) + 1 if len(last) else 0, escape, np.uint8)
    codes[last] = rest
    if bits == 8:
        return _from_numpy(codes)
    if len(codes) % 2:
        codes = np.append(codes, np.uint8(escape))
    return _from_numpy(codes[0::2] | codes[1::2] << 4)


def _unpack_gaps(packed: Tensor, bits: int, nnz: int) -> Tensor:
    """int64 positions, rising by construction."""
    escape = (1 << bits) - 1
    codes = packed.numpy()
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
        if len(codes) and codes[-1] == escape:
            codes = codes[:-1]
    if len(codes) and codes[-1] == escape:
        raise ValueError(f"delta{bits} index expected to end with an entry, got an escape")
    entry = codes != escape
    if int(entry.sum()) != nnz:
        raise ValueError(f"delta{bits} index expected {nnz} entries, got {int(entry.sum())}")
    return torch.from_numpy((np.cumsum(codes.astype(np.int64) + entry) - 1)[entry])


def _csr_positions(crow: Tensor, index: Tensor, rows: int, columns: int, nnz: int) -> Tensor:
    width = 2 if columns <= 1 << 16 else 4
    if index.numel() != nnz * width:
        raise ValueError(f"csr index expected {nnz * width} bytes, got {index.numel()}")
    col = index.numpy().view(np.uint16 if width == 2 else np.uint32).astype(np.int64)
    if len(col) and int(col.max()) >= columns:
        raise ValueError(f"csr index expected columns below {columns}, got {int(col.max())}")
    layout = layouts.CSR((rows, columns), crow, torch.from_numpy(col).to(torch.int32), torch.zeros(nnz))
    layout.validate()
    return layout.rows() * columns + layout.col_indices.long()


def _index_bits(m: int) -> int:
    return max(1, math.ceil(math.log2(m)))


def _pack_indices(indices: Tensor, bits: int) -> Tensor:
    spread = np.unpackbits(indices.reshape(-1, 1).numpy(), axis=1, count=bits, bitorder="little")
    return _from_numpy(np.packbits(spread.reshape(-1), bitorder="little"))


def _unpack_indices(packed: Tensor, count: int, bits: int) -> Tensor:
    spread = unpack_bits(packed, count * bits).numpy().reshape(count, bits)
    return torch.from_numpy(np.packbits(spread, axis=1, bitorder="little").reshape(-1))
