"""Huge pages for packed weights: one token reads a whole model once, in pages of 4 KiB with a TLB miss each."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

__all__ = ["in_huge_pages"]

_PAGE = 2 << 20  # bytes; also right, if wasteful, where the pages are smaller
_CHUNK = 16 << 20
_LEAST = 64 << 10  # what is smaller stays where it is

_lock = threading.Lock()
_open: tuple[Tensor | None, int] = None, 0  # the chunk that still has room, and how many bytes of it are taken


def in_huge_pages(tensor: Tensor) -> Tensor:
    """A copy of a contiguous CPU tensor, same shape and dtype, in memory that asks for huge pages; the tensor itself
    where it is smaller than 64 KiB.

    Copies lie one behind the other in chunks of 16 MiB; a chunk is freed with the last copy in it, the newest one with
    the next chunk.
    """
    size = tensor.numel() * tensor.element_size()
    if size < _LEAST:
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        place = _place(size).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor)


def _place(size: int) -> Tensor:
    """uint8 `[size]`, aligned to 64 bytes, from the open chunk or a new one."""
    global _open
    with _lock:
        chunk, taken = _open
        if chunk is None or taken + size > chunk.numel():
            chunk, taken = _chunk(-(-max(size, _CHUNK) // _PAGE) * _PAGE), 0
        _open = chunk, taken + -(-size // 64) * 64
        return chunk[taken : taken + size]


def _chunk(size: int) -> Tensor:
    """uint8 `[size]` that begins with a page. It is mapped by itself, since a heap with small things between such
    chunks grows with every one of them.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # not Linux
        return torch.empty(size, dtype=torch.uint8, device="cpu")
    mapped = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages gives small ones
        mapped.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(mapped, dtype=torch.uint8)
    begin = -room.data_ptr() % _PAGE
    return room[begin : begin + size]
