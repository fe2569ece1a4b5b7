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
kept, so that none is lost, except for products with 8-bit activations, to which the smallest are zero). Entries that
are zero, of either sign, are not kept.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import layouts
from .packing import reach_in_quads

__all__ = [
    "DTYPES",
    "ENCODINGS",
    "LARGEST",
    "Encoded",
    "check",
    "check_spec",
    "decode",
    "encode",
    "pack_bits",
    "shown",
    "smallest",
    "unpack_bits",
]

ENCODINGS = ("bitmask", "delta4", "delta8", "csr", "bsr", "nm")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LARGEST = 2**31 - 1  # rows or columns: an index of 32 bits reaches every one


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
    if nnz <= LARGEST:  # what crow_indices count up to
        found.append((nnz * (2 if columns <= 1 << 16 else 4) + 4 * (rows + 1) + nnz * size, "csr", {}))
    for r, c in dict.fromkeys((*extra, *layouts.FILE_BLOCKS)):
        if r < 1 or c < 1 or rows % r or columns % c or not total:
            continue
        stored = int(kept.view(rows // r, r, columns // c, c).any(3).any(1).sum()) * r * c
        found.append(((total // (r * c) + 7) // 8 + stored * size, "bsr", {"block": [r, c]}))
    for n, m in sorted(layouts.NM_PATTERNS):
        if columns % m == 0 and total and int(kept.view(rows, columns // m, m).sum(2).max()) <= n:
            stored = total // m * n
            found.append(((stored * _index_bits(m) + 7) // 8 + stored * size, "nm", {"nm": [n, m]}))
    return min(found, key=lambda entry: entry[0])


def encode(
    weight: Tensor, value_dtype: str | None = None, extra: Iterable[tuple[int, int]] = (), quads: bool = False
) -> Encoded:
    """weight: `[N, K]`, floating; value_dtype: None (as they are), "bfloat16" or "int8", with ``quads`` in the steps
    that products with int8 activations round to; returns the smallest encoding.

    ValueError where an int8 weight is not finite, or a bfloat16 one would become infinite.
    """
    weight = weight.detach().cpu().contiguous()
    dtype = str(weight.dtype).removeprefix("torch.")
    stored, tensors = weight, {}
    if value_dtype == "int8":
        stored, tensors["scale"] = _quantised(weight, quads)
    elif value_dtype is not None:
        stored = _rounded(weight, DTYPES[value_dtype])
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
        packed = layouts.NM.from_dense(stored.float() if value_dtype == "int8" else stored, n, m)
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


def check_spec(spec: Any) -> None:
    """ValueError unless spec is what :meth:`Encoded.spec` gives: its keys, their types, and numbers in range. Whether
    tensors agree with it, :func:`decode` finds out.
    """
    if not isinstance(spec, dict):
        raise ValueError(f"encoding expected a dictionary, got {shown(spec)}")
    encoding = _one_of(spec, "encoding", ENCODINGS)
    option = {"bsr": {"block"}, "nm": {"nm"}}.get(encoding, set())
    expected = {"encoding", "shape", "dtype", "values", "nnz"} | option
    if set(spec) != expected:
        raise ValueError(f"{encoding} expected the keys {sorted(expected)}, got {shown(sorted(spec))}")
    rows, columns = _pair(spec, "shape", 0)
    _one_of(spec, "dtype", tuple(DTYPES))
    _one_of(spec, "values", (*DTYPES, "int8"))
    if type(spec["nnz"]) is not int or not 0 <= spec["nnz"] <= rows * columns:
        raise ValueError(f"nnz expected in [0, {rows * columns}], got {shown(spec['nnz'])}")
    if encoding == "bsr":
        r, c = _pair(spec, "block", 1)
        if not rows * columns or rows % r or columns % c:
            raise ValueError(f"block {[r, c]} does not divide {[rows, columns]}")
    if encoding == "nm":
        n, m = _pair(spec, "nm", 1)
        if not n <= m <= 256 or columns % m:
            raise ValueError(f"nm {[n, m]} expected n <= m <= 256 and m dividing K = {columns}")


def check(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """The entries kept, without making the matrix: takes memory for the tensors, whatever shape spec declares.
    ValueError as :func:`decode`.
    """
    _checked_positions(spec, tensors)
    return int(torch.count_nonzero(tensors["values"]))


def decode(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """The matrix `[N, K]` again. Trusts nothing: ValueError where spec or tensors do not fit each other, before the
    matrix is made. Its size is that of spec alone: compare it first with what is expected.
    """
    positions, values = _checked_positions(spec, tensors), tensors["values"]
    encoding, (rows, columns) = spec["encoding"], spec["shape"]
    try:
        dense = torch.zeros(rows * columns, dtype=values.dtype)
    except RuntimeError:
        raise ValueError(f"shape expected a matrix that fits memory, got {[rows, columns]}") from None
    if encoding == "bsr":
        r, c = spec["block"]
        blocks = dense.view(rows // r, columns // c, r, c)
        blocks[positions] = values.view(-1, r, c)
        dense = blocks.transpose(1, 2).reshape(-1)
    elif isinstance(positions, layouts.NM):
        dense = positions.to_dense().to(values.dtype)
    else:
        dense[positions] = values
    matrix, dtype = dense.view(rows, columns), DTYPES[spec["dtype"]]
    return (matrix.float() * tensors["scale"][:, None]).to(dtype) if "scale" in tensors else matrix.to(dtype)


def _checked_positions(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """Where the values go, after every check: bool `[N * K]` (bitmask), int64 positions (delta4, delta8, csr), bool
    `[N / r, K / c]` (bsr), or the layout (nm).
    """
    check_spec(spec)
    encoding, (rows, columns), nnz = spec["encoding"], spec["shape"], spec["nnz"]
    expected = {"index", "values"} | ({"crow"} if encoding == "csr" else set())
    expected |= {"scale"} if spec["values"] == "int8" else set()
    if set(tensors) != expected:
        raise ValueError(f"{encoding} expected the tensors {sorted(expected)}, got {shown(sorted(tensors))}")
    values, index, total = tensors["values"], tensors["index"], rows * columns
    _expect(values, "values", torch.int8 if spec["values"] == "int8" else DTYPES[spec["values"]])
    _expect(index, "index", torch.uint8)
    if "scale" in tensors:
        scale = tensors["scale"]
        _expect(scale, "scale", torch.float32, rows)
        if not bool(torch.isfinite(scale).all()) or bool((scale <= 0).any()):
            raise ValueError("scale expected finite and positive, got others")
    if encoding == "bsr":
        r, c = spec["block"]
        alive = unpack_bits(index, total // (r * c)).view(rows // r, columns // c)
        _expect(values, "values", values.dtype, int(alive.sum()) * r * c)
        positions: Any = alive
    elif encoding == "nm":
        n, m = spec["nm"]
        _expect(values, "values", values.dtype, total // m * n)
        indices = _unpack_indices(index, values.numel(), _index_bits(m)).view(rows, columns // m * n)
        kept = values.view(rows, columns // m * n)
        positions = layouts.NM((rows, columns), n, m, kept.float() if kept.dtype == torch.int8 else kept, indices)
        positions.validate()
    else:
        _expect(values, "values", values.dtype, nnz)
        if encoding == "bitmask":
            positions = unpack_bits(index, total)
            found = int(positions.sum())
        else:
            if encoding == "csr":
                positions = _csr_positions(tensors["crow"], index, rows, columns, nnz)
            else:
                positions = _unpack_gaps(index, int(encoding.removeprefix("delta")), nnz)
            found = positions.numel()
            if found and int(positions[-1]) >= total:
                raise ValueError(f"{encoding} index expected positions below {total}, got {int(positions[-1])}")
        if found != nnz:
            raise ValueError(f"{encoding} index expected {nnz} positions, got {found}")
        return positions
    if int(torch.count_nonzero(values)) != nnz:
        raise ValueError(f"nnz expected {int(torch.count_nonzero(values))}, as stored, got {nnz}")
    return positions


def _quantised(weight: Tensor, quads: bool) -> tuple[Tensor, Tensor]:
    """(int8 `[N, K]`, float32 scale `[N]`); kept entries stay at least one step away from zero, except in quads, whose
    products would take such an entry for zero.
    """
    wide = weight.float()
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("value_dtype='int8' expected finite weights, got inf or NaN; use value_dtype='float32'")
    far = reach_in_quads(wide) if quads else wide.abs()
    peak = far.amax(dim=1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scale = torch.where(peak > 0, peak / 127, torch.ones_like(peak)).clamp_min(torch.finfo(torch.float32).tiny)
    steps = (wide / scale[:, None]).round().clamp(-127, 127)
    if quads:
        return steps.to(torch.int8), scale
    return torch.where(steps == 0, weight.sign().float(), steps).to(torch.int8), scale


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype; kept entries do not become zero."""
    rounded = weight.to(dtype)
    if bool((rounded.isinf() & weight.isfinite()).any()):
        name = str(dtype).removeprefix("torch.")
        most = torch.finfo(dtype).max
        raise ValueError(f"value_dtype={name!r} expected up to {most:.3g}, got more; use value_dtype='float32'")
    least = weight.sign().to(dtype) * torch.finfo(dtype).smallest_normal
    return torch.where((rounded == 0) & (weight != 0), least, rounded)


def shown(value: Any) -> str:
    """What was read, for an error: on one line, and short whatever it is."""
    return _SHORT.repr(value)


def _short() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 4, 100, 100
    return short


_SHORT = _short()


def _one_of(spec: Mapping[str, Any], key: str, allowed: tuple[str, ...]) -> str:
    value = spec.get(key)
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{key} expected one of {', '.join(allowed)}, got {shown(value)}")
    return value


def _pair(spec: Mapping[str, Any], key: str, least: int) -> tuple[int, int]:
    value = spec.get(key)
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(v) is int and least <= v <= LARGEST for v in value)
    ):
        raise ValueError(f"{key} expected two whole numbers from {least} to {LARGEST}, got {shown(value)}")
    return value[0], value[1]


def _expect(tensor: Tensor, name: str, dtype: torch.dtype, entries: int | None = None) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise ValueError(f"{name} expected {dtype} with one dimension, got {tensor.dtype} {list(tensor.shape)}")
    if entries is not None and tensor.numel() != entries:
        raise ValueError(f"{name} expected {entries} entries, got {tensor.numel()}")


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
