"""Floor 1: the ops as CUDA C++ kernels (csrc/cuda).

Importing this needs neither the module nor a GPU; each kernel says why it cannot run.
"""

from . import matmul, selection  # noqa: F401  (importing them registers their kernels)
from .status import kernel_status

__all__ = ["kernel_status"]
