"""Whether the compiled CUDA kernels can run here, and what every launch needs: the module, the device, the stream."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .. import _native

__all__ = ["DTYPE_CODES", "OLDEST", "Memory", "capturing", "launching", "why_not_cuda", "why_not_tensors"]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cuda/kernels.h, enum Dtype
OLDEST = (8, 0)  # compute capability: mma.m16n8k16 with bfloat16, and cp.async


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def why_not_tensors(
    *tensors: Tensor | Sequence[Tensor] | None, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)
) -> list[str]:
    """Reasons against these tensors: device, compute capability, dtype. None is skipped, lists are opened."""
    flat: list[Tensor] = []
    for entry in tensors:
        flat += [] if entry is None else [entry] if isinstance(entry, Tensor) else list(entry)
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
    """As :func:`why_not_tensors`, and the module must be there."""
    reasons = why_not_tensors(*tensors, dtypes=dtypes)
    if _native.CUDA is None:
        reasons.append(_native.why_no_cuda() or "")
    return reasons


@contextlib.contextmanager
def launching(tensor: Tensor) -> Iterator[tuple[ModuleType, int]]:
    """(module, stream): the tensor's device is the current one inside, the stream is torch's current one on it."""
    if _native.CUDA is None:
        raise RuntimeError(_native.why_no_cuda())
    if tensor.device.type != "cuda":  # host memory: only the emulator can read it
        yield _native.CUDA, 0
        return
    with torch.cuda.device(tensor.device):
        yield _native.CUDA, torch.cuda.current_stream(tensor.device).cuda_stream


def capturing(tensor: Tensor) -> bool:
    """True while the current stream records a CUDA graph: the host may then ask the device nothing."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Memory:
    """Recognises a tensor's memory in its present state: the same storage, place, shape and version.

    A freed storage is never taken for the next one at its address. Inference tensors, whose version cannot be read,
    count as frozen.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._state = self._state_of(tensor)

    @staticmethod
    def _state_of(tensor: Tensor) -> tuple:
        version = -1 if tensor.is_inference() else tensor._version
        return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), version

    def holds(self, tensor: Tensor) -> bool:
        return not self._storage.expired() and self._state == self._state_of(tensor)

    @property
    def gone(self) -> bool:
        return bool(self._storage.expired())
