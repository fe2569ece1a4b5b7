"""The table of kernels: which backend implements which op. Floor 0: imports nothing of the package.

A kernel registers itself where it is defined (``native/``, ``triton/``, ``cuda/``, ``reference/``); ``backends``
chooses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

__all__ = ["BACKENDS", "Kernel", "kernel", "kernels_of", "kernels_of_backend"]

#: Every backend, the one tried first leading. ``reference`` is plain torch and can run everything.
BACKENDS = ("cuda", "triton", "native", "reference")

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Kernel:
    """One backend's implementation of one op.

    ``why_not`` takes the op's own arguments and returns the reasons why this kernel cannot run on them; an empty list:
    it can.
    """

    op: str
    backend: str
    run: Callable[..., Any]
    why_not: Callable[..., list[str]]


_KERNELS: dict[str, dict[str, Kernel]] = {}


def kernel(op: str, backend: str, why_not: Callable[..., list[str]]) -> Callable[[F], F]:
    """Registers the decorated function as ``backend``'s implementation of ``op``."""
    if backend not in BACKENDS:
        raise ValueError(f"kernel: backend expected one of {BACKENDS}, got {backend!r}")

    def register(run: F) -> F:
        _KERNELS.setdefault(op, {})[backend] = Kernel(op, backend, run, why_not)
        return run

    return register


def kernels_of(op: str) -> list[Kernel]:
    """The kernels of one op, in the order in which they are tried."""
    found = _KERNELS.get(op, {})
    return [found[name] for name in BACKENDS if name in found]


def kernels_of_backend(backend: str) -> list[str]:
    """The names of the ops that one backend implements, sorted."""
    return sorted(op for op, found in _KERNELS.items() if backend in found)
