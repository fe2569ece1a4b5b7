"""Floor 1: the ops as Triton kernels. Importing this never needs Triton or a GPU; each kernel says why it cannot run."""

from . import masking, selection  # noqa: F401  (importing them registers their kernels)
