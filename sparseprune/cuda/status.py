"""What of the GPU kernels is built and what can run on this machine, for ``sparseprune doctor``."""

from __future__ import annotations

import importlib.util

import torch

from .. import _native, triton  # noqa: F401  (importing triton registers its kernels)
from .._registry import kernels_of_backend

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


def kernel_status() -> list[tuple[str, str, bool]]:
    """(name, state, good), one for CUDA and one for Triton: the kernels, whether built, whether able to run.

    ``good`` is False only where a device is there and the kernels cannot use it: without one nothing is amiss.
    """
    no_device = _no_device()
    ran = f"unrun on this machine: {no_device}" if no_device else f"can run on {torch.cuda.get_device_name()}"
    return [
        _cuda_line(no_device, ran),
        _triton_line(no_device, ran),
    ]


def _cuda_line(no_device: str | None, ran: str) -> tuple[str, str, bool]:
    names = ", ".join(kernels_of_backend("cuda")) + " (nm_linear: torch's own)"
    if _native.CUDA is None:
        state = f"not built: {_native.why_no_cuda()}; kernels: {names}"
        return "CUDA kernels", state, no_device is not None
    runtime = _native.CUDA.runtime_version
    built = f"built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    return "CUDA kernels", f"{built}, {ran}; kernels: {names}", True


def _triton_line(no_device: str | None, ran: str) -> tuple[str, str, bool]:
    names = ", ".join(kernels_of_backend("triton"))
    if importlib.util.find_spec("triton") is None:
        return "Triton kernels", f"not built: Triton is not installed; kernels: {names}", no_device is not None
    return "Triton kernels", f"built on first use, {ran}; kernels: {names}", True
