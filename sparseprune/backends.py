"""Floor 2: who can run this op on these tensors, and why not.

``SPARSEPRUNE_BACKEND=native|triton|cuda|reference`` forces one backend; where that one cannot run, the call raises
with the reasons. Without it the first that can run does, in the order cuda, triton, native, reference. Nothing falls
back unseen: :func:`explain_op` lists every backend with its reasons; the reference in place of a compiled core that is
not there warns once, and in place of a GPU kernel once an op.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from . import (  # noqa: F401  (importing them registers their kernels)
    _native,
    cuda,
    native,
    reference,
    triton,
)
from ._registry import BACKENDS, Kernel, kernels_of

__all__ = ["choose", "explain_op", "forced_backend"]

_warned = False
_warned_on_gpu: set[str] = set()


def forced_backend() -> str | None:
    """The backend that SPARSEPRUNE_BACKEND asks for, or None. ValueError where it names none."""
    name = os.environ.get("SPARSEPRUNE_BACKEND", "")
    if name and name not in BACKENDS:
        raise ValueError(f"SPARSEPRUNE_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name or None


def choose(op: str, *args: Any) -> Kernel:
    """The kernel that runs ``op`` on these arguments; RuntimeError with every candidate's reasons where none can."""
    forced = forced_backend()
    for kernel in kernels_of(op):
        if forced not in (None, kernel.backend):
            continue
        if not kernel.why_not(*args):
            if kernel.backend == "reference" and forced is None:
                if _on_gpu(args):
                    _warn_on_gpu(op, *args)
                else:
                    _warn_without_core()
            return kernel
    wanted = f" (SPARSEPRUNE_BACKEND={forced})" if forced else ""
    raise RuntimeError(f"{op}: no backend can run this call{wanted}\n{explain_op(op, *args)}")


def explain_op(op: str, *args: Any) -> str:
    """One line a backend: ``runs``, ``could run``, or its reasons against these arguments."""
    lines, taken = [], False
    forced = forced_backend()
    present = {kernel.backend: kernel for kernel in kernels_of(op)}
    for name in BACKENDS:
        if name not in present:
            lines.append(f"  {name}: no kernel for {op}")
            continue
        reasons = present[name].why_not(*args)
        if not reasons and forced not in (None, name):
            reasons = [f"SPARSEPRUNE_BACKEND={forced} asks for another"]
        if reasons:
            lines.append(f"  {name}: {'; '.join(reasons)}")
        else:
            slow = ", in plain torch" if name == "reference" else ""
            lines.append(f"  {name}: {'could run' if taken else 'runs' + slow}")
            taken = True
    return "\n".join([f"{op}:", *lines])


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (part for part in arg if isinstance(part, Tensor))


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(tensor.device.type == "cuda" for tensor in _tensors(args))


def _warn_on_gpu(op: str, *args: Any) -> None:
    if op not in _warned_on_gpu:
        _warned_on_gpu.add(op)
        message = f"sparseprune runs {op} in plain torch on the GPU, dense copies included: no kernel takes this call"
        warnings.warn(f"{message}\n{explain_op(op, *args)}", RuntimeWarning, stacklevel=4)


def _warn_without_core() -> None:
    global _warned
    reason = _native.why_no_c()
    if reason is not None and not _warned:
        _warned = True
        warnings.warn(f"sparseprune runs its plain-torch reference: {reason}", RuntimeWarning, stacklevel=4)
