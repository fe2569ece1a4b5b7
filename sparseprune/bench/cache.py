"""Timings kept between runs, so that ``sparsify_(layout="auto")`` measures a shape once a machine.

One JSON file: ``$SPARSEPRUNE_CACHE`` (a file), else ``$XDG_CACHE_HOME/sparseprune/timings.json``, else
``~/.cache/sparseprune/timings.json``. ``SPARSEPRUNE_CACHE=0`` or ``off`` keeps nothing. An entry holds the ratio to
dense that was measured beside it, never a lone time: times of two days do not compare.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .._files import write_text
from ..triton.linear import precision
from . import machine

__all__ = ["TimingCache", "cache_path", "default_cache", "layer_key"]

_VERSION = 1
_MOST = 20_000


def cache_path() -> Path | None:
    """The cache file, or None where SPARSEPRUNE_CACHE turns it off."""
    asked = os.environ.get("SPARSEPRUNE_CACHE", "")
    if asked.lower() in ("0", "off"):
        return None
    if asked:
        return Path(asked).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparseprune" / "timings.json"


def default_cache() -> TimingCache:
    """The cache at :func:`cache_path`; read afresh, so a changed environment variable counts."""
    return TimingCache(cache_path())


def layer_key(
    shape: tuple[int, int],
    density: float,
    layout: str,
    tokens: int,
    dtype: torch.dtype,
    note: str = "",
    device: torch.device | str = "cpu",
) -> str:
    """One line that names all a layer's timing depends on.

    shape: (out_features, in_features); density to three digits; layout: e.g. ``csr`` or ``bsr16x1``; tokens: rows of
    x; ``note``: whatever else changes the time (value dtype, epilogue). What the device is made of and what runs there
    is added here: threads, CPU, tier and versions; of a GPU its name, compute capability and kernels.
    """
    kind = str(dtype).removeprefix("torch.")
    return "|".join(
        [
            f"{shape[0]}x{shape[1]}",
            f"density={density:.3f}",
            layout,
            f"tokens={tokens}",
            kind,
            note,
            *_of_device(torch.device(device)),
            f"torch={torch.__version__}",
            machine.fingerprint(),
        ]
    )


def _of_device(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return [f"threads={torch.get_num_threads()}", machine.cpu_model(), machine.tier()]
    return [machine.device_name(device), machine.gpu_kernels(), f"float32={precision(torch.float32)}"]


class TimingCache:
    """A small dictionary in a file. ``path`` None: forgets everything at once.

    Reading and writing never raise: a cache that cannot be used is warned about and costs a measurement, nothing more.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: dict[str, dict[str, Any]] = self._read()

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry of this key, or None."""
        return self._entries.get(key)

    def put(self, entries: Mapping[str, dict[str, Any]]) -> None:
        """Adds entries and writes the file whole.

        Entries that another process wrote in between are kept; the oldest go when there are more than 20 000.
        """
        if self.path is None or not entries:
            return
        merged = {**self._read(), **self._entries, **entries}
        for key in entries:  # the newest last
            merged[key] = merged.pop(key)
        self._entries = dict(list(merged.items())[-_MOST:])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps({"version": _VERSION, "timings": self._entries}))
        except OSError as error:
            warnings.warn(
                f"timings are not kept: {self.path}: {error}; set SPARSEPRUNE_CACHE to a writable file, or to 0",
                RuntimeWarning,
                stacklevel=2,
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        if self.path is None:
            return {}
        try:
            data = json.loads(self.path.read_text())
            if data["version"] != _VERSION:
                return {}
            return {str(key): dict(value) for key, value in data["timings"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"cached timings are not used: {self.path}: {error!r}; the file is replaced at the next measurement",
                RuntimeWarning,
                stacklevel=3,
            )
            return {}
