"""A safetensors file as tensors over its mapped bytes, whose pages can be given back one tensor at a time."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "MappedFile"]

#: The dtypes that safetensors and torch both know, by their names in the file.
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


class MappedFile:
    """``tensors``: name -> tensor over the file's bytes, mapped privately; to be read, not written to. The mapping ends
    with the last of them. ValueError on a header that does not fit the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        size = int.from_bytes(self._bytes[:8], "little")
        header = json.loads(self._bytes[8 : 8 + size])
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            if name != "__metadata__":
                self._add(name, entry, 8 + size)

    def _add(self, name: str, entry: dict[str, Any], start: int) -> None:
        dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
        begin, end = (start + place for place in entry["data_offsets"])
        count = math.prod(shape)
        if not start <= begin <= end <= len(self._bytes) or end - begin != count * dtype.itemsize:
            raise ValueError(f"{name!r} expected {count} entries of {dtype}, got bytes {begin} to {end}")
        if not count:
            self.tensors[name] = torch.empty(shape, dtype=dtype)
            return
        found = torch.frombuffer(self._bytes, dtype=torch.uint8, count=end - begin, offset=begin)
        if begin % dtype.itemsize:  # the map begins with a page
            found = found.clone()
        else:
            self._places[name] = begin, end
        self.tensors[name] = found.view(dtype).view(shape)

    def forget(self, names: Iterable[str]) -> None:
        """Gives back the memory into which these were read; they are read again where they are wanted."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for name in names:
            begin, end = self._places.get(name, (0, 0))
            begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            if end > begin:
                with contextlib.suppress(OSError):  # it stays, then
                    self._bytes.madvise(mmap.MADV_DONTNEED, begin, end - begin)
