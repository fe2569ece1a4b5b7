"""Floor 1: the ops as CUDA C++ kernels (csrc/cuda).

Importing this needs neither the module nor a GPU; each kernel says why it cannot run.
"""

from ..device_memory import forget
from . import linear, masking, packed, sddmm, selection  # noqa: F401  (importing them registers their kernels)
from ._environment import why_not_cuda
from .status import kernel_status

__all__ = ["forget", "kernel_status", "why_not_cuda"]
