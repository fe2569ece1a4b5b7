"""What of the GPU kernels is built and what can run on this machine, for ``sparseprune doctor``."""

from __future__ import annotations

import importlib.util

import torch

from .. import _native, triton  # noqa: F401  (importing triton registers its kernels)
from .._registry import kernels_of_backend
from ..triton._environment import why_no_launch
from ._environment import why_not_here

__all__ = ["kernel_status"]


def _no_device() -> str | None:
    """Why torch can reach no device here, or None where it can."""
    if torch.cuda.is_available():
        return None
    if _native.CUDA is not None and (reason := _native.CUDA.why_no_device()):
        return reason
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    return "no driver"


def kernel_status() -> list[tuple[str, str, bool | None]]:
    """(name, state, good), one for CUDA and one for Triton: the kernels, whether built, whether able to run.

    ``good`` is False only where a device is there and the kernels cannot use it; None where there is neither.
    """
    return [_cuda_line(_no_device()), _triton_line(_no_device())]


def _told(built: str, names: str, no_device: str | None, reason: str) -> tuple[str, bool]:
    if no_device:
        return f"{built}, unrun on this machine: {no_device}; kernels: {names}", True
    state = reason or f"can run on {torch.cuda.get_device_name()}"
    return f"{built}, {state}; kernels: {names}", not reason


def _cuda_line(no_device: str | None) -> tuple[str, str, bool | None]:
    names = ", ".join(kernels_of_backend("cuda")) + " (nm_linear: torch's own)"
    if _native.CUDA is None:
        state = f"not built: {_native.why_no_cuda()}; kernels: {names}"
        return "CUDA kernels", state, None if no_device else False
    runtime = _native.CUDA.runtime_version
    built = f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    reason = "" if no_device else why_not_here(torch.cuda.current_device())
    return "CUDA kernels", *_told(built, names, no_device, reason)


def _triton_line(no_device: str | None) -> tuple[str, str, bool | None]:
    names = ", ".join(kernels_of_backend("triton"))
    if importlib.util.find_spec("triton") is None:
        return "Triton kernels", f"not built: Triton is not installed; kernels: {names}", None if no_device else False
    reason = "" if no_device else why_no_launch(torch.cuda.current_device())
    return "Triton kernels", *_told("built on first use", names, no_device, reason)
