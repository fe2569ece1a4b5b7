"""What kernels of the compiled core take: which tensors, and activations as rows of float32."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/cpu/kernels.h, enum Dtype


def why_not_cpu(*tensors: Tensor | None, dtypes: tuple[torch.dtype, ...] = tuple(DTYPE_CODES)) -> list[str]:
    """Reasons against running on these tensors: no core, not on the CPU, not one of ``dtypes`` (None entries are
    skipped).
    """
    reasons = []
    if _native.C is None:
        reasons.append(_native.why_no_c() or "")
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            reasons.append(f"needs CPU tensors, got {tensor.device}")
            break
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in dtypes:
            names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            reasons.append(f"needs {names}, got {str(tensor.dtype).removeprefix('torch.')}")
            break
    return reasons


def rows_of(x: Tensor, columns: int) -> Tensor:
    """x `[..., columns]` as float32 `[N, columns]` whose rows are dense; a view where it can be."""
    x = x.reshape(x.shape[:-1].numel(), columns)
    if x.dtype != torch.float32:
        x = x.float()
    return x if x.stride(1) == 1 or columns == 1 else x.contiguous()
