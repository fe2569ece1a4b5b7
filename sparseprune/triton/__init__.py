"""Floor 1: the ops as Triton kernels. Importing this needs neither Triton nor a GPU: each kernel has its reasons."""

from . import linear, masking, sddmm, selection  # noqa: F401  (importing them registers their kernels)
