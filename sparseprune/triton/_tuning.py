"""Chooses among a kernel's few shipped configurations: each is timed once for a device, a bucket of shapes, a dtype.

``SPARSEPRUNE_TRITON_TUNE``  auto (default): time on a GPU, take the first under the interpreter | 0: always the
first, so that two runs add in the same order | 1: time everywhere. The first configuration of every list fits the
smallest supported card, and serves without timing under ``torch.use_deterministic_algorithms`` and where memory is
short. What was chosen lasts as long as the process. Nothing is timed, and nothing waits for the stream, while a CUDA
graph is captured: call once with the same shapes before, since a kernel is compiled and loaded for its first call, and
anew for sizes that are 1 or multiples of 16. Timing waits for the device: no other thread may record meanwhile.
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

from ..device_memory import capturing
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
    free = device.type == "cuda" and not interpreting() and not torch.are_deterministic_algorithms_enabled()
    return wanted == "1" or (wanted == "auto" and free)


def launch(
    kernel: str, device: torch.device, key: tuple[Any, ...], configs: Sequence[Config], run: Callable[[Config], None]
) -> None:
    """Runs ``run(config)`` with the fastest of configs for this key; it may run often, and writes all results."""
    full = (kernel, _name(device), *key)
    config = _CHOSEN.get(full)
    if config is None:
        if len(configs) > 1 and _times(device):
            if capturing(device):
                _run(kernel, device, configs[0], run)
                return
            config = _fastest(kernel, device, full, configs, run)
            if config is None:
                _run(kernel, device, configs[0], run)
                return
        else:
            config = configs[0]
        _CHOSEN[full] = config
    _run(kernel, device, config, run)


def _run(kernel: str, device: torch.device, config: Config, run: Callable[[Config], None]) -> None:
    try:
        run(config)
    except Exception as error:
        if not capturing(device):
            raise
        raise RuntimeError(
            f"{kernel}: expected to be loaded before a CUDA graph is recorded; run the call once before, with the same "
            "shapes"
        ) from error


def _fastest(
    kernel: str, device: torch.device, key: tuple[Any, ...], configs: Sequence[Config], run: Callable[[Config], None]
) -> Config | None:
    """None where memory was short for timing, which the next call may not find."""
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
            except torch.OutOfMemoryError:  # for what timing takes: it is not worth failing in the middle of training
                return None
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
    torch.cuda._sleep(2_000_000)  # about 1 ms: the host queues ahead, or the events would hold its time to launch
    for start, end in zip(starts, ends):
        sweep.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(start.elapsed_time(end) for start, end in zip(starts, ends))
