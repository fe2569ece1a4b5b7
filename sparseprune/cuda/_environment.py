"""Whether the compiled CUDA kernels can run here, and what every launch needs: the module, the device, the stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _native
from ..device_memory import capturing

__all__ = [
    "DTYPE_CODES",
    "MOST_TOKENS",
    "OLDEST",
    "capturing",
    "launching",
    "multiprocessors",
    "same_device",
    "why_not_cuda",
    "why_not_here",
    "why_not_tensors",
]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/kernels.h, enum Dtype
MOST_TOKENS = 65535 * 32  # a grid has 65535 blocks in y, of 32 tokens at least
OLDEST = (8, 0)  # compute capability: mma.m16n8k16 with bfloat16, and cp.async


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _flat(tensors: Sequence[Tensor | Sequence[Tensor] | None]) -> list[Tensor]:
    """The tensors, None skipped and lists opened."""
    flat: list[Tensor] = []
    for entry in tensors:
        flat += [] if entry is None else [entry] if isinstance(entry, Tensor) else list(entry)
    return flat


def why_not_tensors(
    *tensors: Tensor | Sequence[Tensor] | None, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)
) -> list[str]:
    """Reasons against these tensors: device, compute capability, dtype. None is skipped, lists are opened."""
    flat = _flat(tensors)
    if not flat:
        return ["needs at least one tensor"]
    reasons = []
    device = flat[0].device
    if len({tensor.device for tensor in flat}) > 1:
        reasons.append(f"needs tensors on one device, got {', '.join(sorted({str(t.device) for t in flat}))}")
    if device.type != "cuda":
        reasons.append(f"needs CUDA tensors, got {device}")
    elif torch.version.hip is not None:
        reasons.append("needs an NVIDIA device, got one of ROCm")
    elif _capability(device.index or 0) < OLDEST:
        major, minor = _capability(device.index or 0)
        reasons.append(f"needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer, got {major}.{minor}")
    odd = next((tensor.dtype for tensor in flat if tensor.dtype not in dtypes), None)
    if odd is not None:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        reasons.append(f"needs {wanted}, got {str(odd).removeprefix('torch.')}")
    return reasons


def why_not_cuda(
    *tensors: Tensor | Sequence[Tensor] | None, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)
) -> list[str]:
    """As :func:`why_not_tensors`, and the module must be there and be able to run on their device."""
    reasons = why_not_tensors(*tensors, dtypes=dtypes)
    if _native.CUDA is None:
        reasons.append(_native.why_no_cuda() or "")
    elif not reasons:
        reason = why_not_here(_flat(tensors)[0].device.index or 0)
        reasons += [reason] if reason else []
    return reasons


@functools.cache
def why_not_here(index: int) -> str:
    """Why the built module cannot run on this device: it has no code for it, or the driver is too old for it. Empty
    where it can.
    """
    if _native.CUDA is None:
        return _native.why_no_cuda() or ""
    with torch.cuda.device(index):
        reason = _native.CUDA.why_not_here()
    remedy = "reinstall on this machine with SPARSEPRUNE_CUDA=1"
    return f"sparseprune._cuda cannot run on cuda:{index}: {reason}; {remedy}" if reason else ""


@contextlib.contextmanager
def launching(tensor: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """(module, stream): the tensor's device is the current one inside, the stream is torch's current one on it."""
    if _native.CUDA is None:
        raise RuntimeError(_native.why_no_cuda())
    if tensor.device.type != "cuda":
        if hasattr(_native.CUDA, "runtime_version"):  # the real module; host memory is for the emulator alone
            raise ValueError(f"sparseprune._cuda: expected CUDA tensors, got one on {tensor.device}; use .cuda()")
        yield _native.CUDA, 0
        return
    with torch.cuda.device(tensor.device):
        yield _native.CUDA, torch.cuda.current_stream(tensor.device).cuda_stream


def same_device(op: str, *tensors: Tensor) -> None:
    """ValueError where they lie on several devices: a kernel of one cannot read the memory of another."""
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"{op}: expected tensors on one device, got {', '.join(str(t.device) for t in tensors)}")


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has; 2 for host memory, under the emulator."""
    return _multiprocessors(tensor.get_device()) if tensor.device.type == "cuda" else 2
