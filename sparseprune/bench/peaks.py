"""The machine's limits, measured by our own loops (csrc/cpu/peaks.inl) with the tier and the threads in use.

A kernel's share of the limit is ``limit time / measured time``, where the limit time is the larger of its arithmetic
at the machine's rate and of its bytes at the bandwidth of the memory that holds them (the roofline model, Williams et
al. 2009).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._native import require_c
from ..packing import in_huge_pages

__all__ = ["Peaks", "Work", "measure_peaks"]

_ROUNDS = 5


@dataclass(frozen=True)
class Work:
    """What a call cannot avoid.

    ``flops``: 2 a kept weight and token; ``bytes``: read or written once; ``unit``: what bounds the arithmetic, ``fma``
    (operands in registers) or ``l1_fma`` (one L1 load a multiply-add: unstructured weights); ``update``: the bytes are
    rewritten in place, not read; ``in_turn``: so many operands of this size are read before one is read again.
    """

    flops: float
    bytes: float
    unit: str = "fma"
    update: bool = False
    in_turn: int = 1


@dataclass
class Peaks:
    """``fma``, ``l1_fma``: GFLOP/s; ``update``: GB/s read and written in place in memory; ``read_at(bytes)``: GB/s."""

    fma: float
    l1_fma: float
    update: float
    _buffer: torch.Tensor = field(repr=False)
    _read: dict[int, float] = field(default_factory=dict)

    def read_at(self, size: float) -> float:
        """Read bandwidth in GB/s of a working set of this many bytes, split between the threads and read again and
        again.

        Measured once for each power of two from 16 KiB to 256 MiB.
        """
        power = min(28, max(14, math.ceil(math.log2(max(size, 1)))))
        if power not in self._read:
            count = (1 << power) // 4
            repeats = max(1, (1 << 28) >> power)
            c = require_c()
            pointer = self._buffer.data_ptr()
            self._read[power] = _best(lambda: c.peak_read(pointer, count, repeats))
        return self._read[power]

    def limit_seconds(self, work: Work) -> tuple[float, str]:
        """The least time that this work takes here, and what bounds it: ``fma``, ``l1_fma`` or ``memory``."""
        rate = {"fma": self.fma, "l1_fma": self.l1_fma}[work.unit]
        arithmetic = work.flops / (rate * 1e9)
        bandwidth = self.update if work.update else self.read_at(work.bytes * work.in_turn)
        memory = work.bytes / (bandwidth * 1e9)
        return (arithmetic, work.unit) if arithmetic >= memory else (memory, "memory")

    def raise_to(self, before: dict[str, Any] | None) -> None:
        """Takes over what an earlier measurement (:meth:`to_dict`) on the same machine, threads and tier did better:
        a limit is the best that the machine did, and another process may have disturbed this one.
        """
        if before is None:
            return
        self.fma = max(self.fma, before["fma_gflops"])
        self.l1_fma = max(self.l1_fma, before["l1_fma_gflops"])
        self.update = max(self.update, before["update_gbs"])
        for size, rate in before["read_gbs"].items():
            power = (int(size.split()[0]) << 10).bit_length() - 1
            self._read[power] = max(self._read.get(power, 0.0), rate)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: GFLOP/s and GB/s."""
        read = {f"{(1 << power) >> 10} KiB": round(rate, 1) for power, rate in sorted(self._read.items())}
        return {
            "fma_gflops": round(self.fma, 1),
            "l1_fma_gflops": round(self.l1_fma, 1),
            "update_gbs": round(self.update, 1),
            "read_gbs": read,
        }


def measure_peaks() -> Peaks:
    """Measures in about a second. RuntimeError with the reason where the compiled core is absent."""
    c = require_c()
    buffer = in_huge_pages(torch.ones((1 << 28) // 4))  # as packed weights lie
    pointer, count = buffer.data_ptr(), buffer.numel()
    fma = _best(lambda: c.peak_fma(2_000_000))
    l1_fma = _best(lambda: c.peak_l1_fma(3_000_000))
    update = _best(lambda: c.peak_update(pointer, count))
    peaks = Peaks(fma, l1_fma, update, buffer)
    for size in (1 << 14, 1 << 19, 1 << 22, 1 << 28):  # per core L1 and L2, the shared cache, memory
        peaks.read_at(size)
    return peaks


def _best(run: Callable[[], float]) -> float:
    """The best rate of a few runs, in 1e9 units of work a second: a limit is what the machine can do undisturbed."""
    best = 0.0
    run()
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        work = run()
        best = max(best, work / (time.perf_counter() - start))
    return best / 1e9
