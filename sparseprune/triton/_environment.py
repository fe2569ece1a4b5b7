"""Whether Triton kernels can run here, and why not. Never imports Triton before a kernel is about to run."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..device_memory import capturing

__all__ = ["DTYPES", "guard", "interpreting", "kernels", "multiprocessors", "why_no_launch", "why_not_triton"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = (3, 4)  # the first release whose tl.histogram takes a mask


def interpreting() -> bool:
    """True where TRITON_INTERPRET=1: kernels then run in Python, slowly, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; pip install "triton>=3.4"'
    try:
        version = importlib.metadata.version("triton")
        found = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None  # a vendor's build under another distribution name: the kernel's own compilation decides
    if found < OLDEST:
        return f'Triton {version} is too old; pip install "triton>=3.4"'
    return None


_LAUNCHED: dict[int, str] = {}  # device -> why its first launch failed


def why_no_launch(index: int) -> str:
    """Why Triton cannot compile and launch a kernel on this device, found by one small launch; empty where it can, or
    where a CUDA graph is being recorded, while nothing may be loaded.

    Triton compiles a helper in C when it first launches, which takes a C compiler and Python's headers.
    """
    if index not in _LAUNCHED:
        if capturing(torch.device("cuda", index)):
            return ""
        with ThreadPoolExecutor(1) as thread:  # whose tensors are real, whatever mode the caller is in
            _LAUNCHED[index] = thread.submit(_first_launch, index).result()
    return _LAUNCHED[index]


def _first_launch(index: int) -> str:
    try:
        with torch.cuda.device(index):
            w = torch.zeros(16, device=f"cuda:{index}")
            mask = torch.zeros(16, dtype=torch.uint8, device=w.device)
            kernels("masking").apply_mask_kernel[(1,)](w, mask, 16, BLOCK=16, num_warps=1)
    except Exception as error:  # whatever Triton, or a compiler that it starts, raises: it is the reason
        lines = str(error).strip().splitlines()
        return f"Triton cannot launch a kernel here ({type(error).__name__}: {lines[0] if lines else ''})"
    return ""


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def kernels(name: str) -> Any:
    """The module ``sparseprune.triton.kernels.NAME``: device code, which imports Triton. Called to launch a kernel."""
    return importlib.import_module(f".kernels.{name}", __package__)


def why_not_triton(
    *tensors: Tensor | Sequence[Tensor] | None, dtypes: tuple[torch.dtype, ...] = DTYPES, check_dtype: bool = True
) -> list[str]:
    """Reasons against these tensors (None is skipped, lists are opened): device, dtype, Triton missing or too old.

    CPU tensors are taken only where TRITON_INTERPRET=1 and SPARSEPRUNE_BACKEND=triton both ask for it.
    """
    flat: list[Tensor] = []
    for entry in tensors:
        flat += [] if entry is None else [entry] if isinstance(entry, Tensor) else list(entry)
    if not flat:
        return ["needs at least one tensor"]
    reasons = []
    devices = {tensor.device for tensor in flat}
    if len(devices) > 1:
        reasons.append(f"needs tensors on one device, got {', '.join(sorted(map(str, devices)))}")
    device = flat[0].device
    asked = interpreting() and os.environ.get("SPARSEPRUNE_BACKEND") == "triton"
    if device.type != "cuda" and not (device.type == "cpu" and asked):
        remedy = "TRITON_INTERPRET=1 with SPARSEPRUNE_BACKEND=triton interprets"
        reasons.append(f"needs CUDA or ROCm tensors, got {device}; {remedy}")
    elif device.type == "cuda" and torch.version.hip is None and _capability(device.index or 0) < (8, 0):
        major, minor = _capability(device.index or 0)
        reasons.append(f"needs compute capability 8.0 or newer, got {major}.{minor}")
    missing = _why_no_triton()
    if missing is not None:
        reasons.append(missing)
    elif not reasons and device.type == "cuda" and not interpreting():
        reason = why_no_launch(device.index or 0)
        reasons += [reason] if reason else []
    if check_dtype:
        odd = next((tensor.dtype for tensor in flat if tensor.dtype not in dtypes), None)
        if odd is not None:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            reasons.append(f"needs {wanted}, got {str(odd).removeprefix('torch.')}")
    return reasons


def guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's device the current one while kernels are launched on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors (compute units) the tensor's device has; 2 under the interpreter on the CPU."""
    if tensor.device.type != "cuda":
        return 2
    return _multiprocessors(tensor.device.index if tensor.device.index is not None else torch.cuda.current_device())
