"""Chooses among a kernel's few shipped configurations: each is timed once for a device, a bucket of shapes, a dtype.

``SPARSEPRUNE_TRITON_TUNE``  auto (default): time on a GPU, take the first under the interpreter | 0: always the
first, so that two runs add in the same order | 1: time everywhere. The first configuration of every list fits the
smallest supported card. What was chosen lasts as long as the process. Nothing is timed, and nothing waits for the
stream, while a CUDA graph is captured: the first configuration then serves, unless one call before the capture has
settled the choice.
"""

from __future__ import annotations

import functools
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._environment import interpreting

__all__ = ["Config", "bucket", "chosen", "do_bench", "launch"]


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of the kernel's argument, warps a program, and stages of the software pipeline."""

    blocks: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Keyword arguments of a launch. ROCm's pipeline keeps two stages at most in its smaller shared memory."""
        stages = self.stages if torch.version.hip is None else min(self.stages, 2)
        return {**dict(self.blocks), "num_warps": self.warps, "num_stages": stages}


_CHOSEN: dict[tuple[Any, ...], Config] = {}
_LOCK = threading.RLock()


def bucket(tokens: int) -> int:
    """Tokens rounded up to a power of two, at least 16: shapes in one bucket share a configuration."""
    return max(16, 1 << (tokens - 1).bit_length())


def chosen() -> dict[tuple[Any, ...], Config]:
    """(kernel, device, shape bucket, dtype ...) -> the configuration taken, so far in this process."""
    return dict(_CHOSEN)


def setting() -> str:
    """SPARSEPRUNE_TRITON_TUNE: auto, 0 or 1; ValueError otherwise."""
    value = os.environ.get("SPARSEPRUNE_TRITON_TUNE", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"SPARSEPRUNE_TRITON_TUNE: expected auto, 0 or 1, got {value!r}")
    return value


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _times(device: torch.device) -> bool:
    wanted = setting()
    return wanted == "1" or (wanted == "auto" and device.type == "cuda" and not interpreting())


def launch(
    kernel: str, device: torch.device, key: tuple[Any, ...], configs: Sequence[Config], run: Callable[[Config], None]
) -> None:
    """Runs ``run(config)`` with the fastest of configs for this key; it may run often, and writes all results."""
    full = (kernel, _name(device), *key)
    config = _CHOSEN.get(full)
    if config is None:
        if len(configs) > 1 and _times(device):
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                run(configs[0])
                return
            config = _fastest(kernel, device, full, configs, run)
        else:
            config = configs[0]
        _CHOSEN[full] = config
    run(config)


def _fastest(
    kernel: str, device: torch.device, key: tuple[Any, ...], configs: Sequence[Config], run: Callable[[Config], None]
) -> Config:
    from triton.runtime.errors import OutOfResources

    with _LOCK:
        if key in _CHOSEN:
            return _CHOSEN[key]
        timings: dict[Config, float] = {}
        for config in configs:
            try:
                timings[config] = do_bench(functools.partial(run, config), device)
            except OutOfResources as error:  # a larger tile than this card has room for: the next one is tried
                reason = error
        if not timings:
            raise RuntimeError(f"{kernel}: no shipped configuration fits {_name(device)}") from reason
        return min(timings, key=lambda config: timings[config])


def do_bench(run: Callable[[], None], device: torch.device, repeats: int = 9) -> float:
    """The median time of run() in ms, after one call to compile and warm up. A GPU's L2 cache is swept before each."""
    run()
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            samples.append((time.perf_counter() - begin) * 1e3)
        return statistics.median(samples)
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    sweep = torch.empty(max(size, 1 << 24), dtype=torch.uint8, device=device)
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeats)]
    for start, end in zip(starts, ends):
        sweep.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends))
