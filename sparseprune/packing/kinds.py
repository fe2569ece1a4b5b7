"""The kinds of packed weight: how the entries lie. Each has a module of its name."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["GpuKind", "Kind"]


class Kind(IntEnum):
    """The numbers are those of csrc/cpu/kernels.h, Packed.kind."""

    GROUPS = 0  # groups.py
    BITMASK = 1  # bitmask.py
    QUADS = 2  # quads.py
    BITMASK8 = 3  # bitmask8.py


class GpuKind(IntEnum):
    """Those of the GPU kernels: gpu.py. Numbers apart from those of :class:`Kind`."""

    STRIPS = 16  # a bitmap in strips of 16 x 64, and the values; 16 bits
    DELTAS = 17  # a byte an entry, the distance to the column before
    ENTRIES = 18  # csr as it is
    BLOCKS = 19  # bsr as it is
