"""Floor 1: the ops as Triton kernels. Importing this never needs Triton or a GPU; each kernel says why it cannot run."""
