"""Floor 0: what may follow a product; the one table of activations."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "ACTIVATION_CODES", "activate"]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")

# A new one is computed in activate below, csrc/cpu/activations.inl, activate_rows of csrc/cpu/encoder.inl,
# csrc/cuda/numeric.cuh and triton/kernels/linear.py, and recognised in nn/fusion/patterns.py.
#: The numbers that compiled kernels know them by: the enum Activation of csrc/cpu/kernels.h, in the same order.
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}


def activate(y: Tensor, activation: str) -> Tensor:
    """y: `[...]`; activation one of ACTIVATIONS ("gelu" is exact, "gelu_tanh" its tanh form)."""
    if activation == "none":
        return y
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "silu":
        return F.silu(y)
    raise ValueError(f"activation expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
