"""Sampled products as Triton kernels: the gradient of a block-sparse weight at its kept blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .._registry import kernel
from . import configs
from ._environment import guard, interpreting, kernels, why_not_triton
from .linear import SIDES, flattened, precision, why_not_indices

__all__ = ["bsr_sddmm", "sddmm"]


def bsr_sddmm(
    dy: Tensor, x: Tensor, crow: Tensor, index: Tensor, blocksize: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """dy: `[..., N]`; x: `[..., K]`; returns `[nblocks, r, c]` of dtype: dy x summed over tokens at kept blocks."""
    dy, x = flattened(dy), flattened(x)
    rows, columns = blocksize
    out = torch.empty(index.numel(), rows, columns, dtype=dtype, device=x.device)
    if out.numel():
        options = configs.sddmm_config(x.dtype, rows, columns).options()
        with guard(x):
            kernels("sddmm").bsr_sddmm_kernel[(index.numel(),)](
                dy, x, crow, index, out, dy.shape[0], crow.numel() - 1,
                dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), ROWS=rows, COLS=columns,
                PRECISION=precision(x.dtype), UPCAST=interpreting(), **options,
            )  # fmt: skip
    return out


def _why_not_sddmm(
    x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int
) -> list[str]:
    reasons = why_not_triton(x, dy)
    if x.dtype != dy.dtype:
        reasons.append(f"needs x and dy of one dtype, got {x.dtype} and {dy.dtype}")
    if r not in SIDES or c not in SIDES:
        reasons.append(f"needs blocks with sides among {', '.join(map(str, SIDES))}, got {r}x{c}")
    return reasons + why_not_indices(x.device, crow_indices, col_indices)


@kernel("sddmm", "triton", _why_not_sddmm)
def sddmm(x: Tensor, dy: Tensor, crow_indices: Tensor, col_indices: Tensor, r: int, c: int) -> Tensor:
    """x: `[..., K]`; dy: `[..., N]`; returns float32 `[nblocks, r, c]`: dy x summed over tokens at kept blocks."""
    return bsr_sddmm(dy, x, crow_indices, col_indices, (r, c), torch.float32)
