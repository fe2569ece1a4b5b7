"""The shipped configurations: a few a kernel, the first of each list the one that fits everywhere.

Shared memory a program must stay within 99 KiB for the first (the smallest supported NVIDIA card), 163 KiB for every
one on A100; 64 KiB on gfx942, where two pipeline stages are the most. tests/triton/test_aot.py holds them to that,
and to no spills.
"""

from __future__ import annotations

import torch

from ._tuning import Config

__all__ = ["bsr_configs", "masked_gradient_configs", "masked_linear_configs", "sddmm_config"]


def _linear(outputs: int, tokens: int, inputs: int, warps: int, stages: int) -> Config:
    return Config((("BLOCK_O", outputs), ("BLOCK_M", tokens), ("BLOCK_R", inputs), ("GROUP", 8)), warps, stages)


def masked_linear_configs(dtype: torch.dtype, tokens: int) -> tuple[Config, ...]:
    """For masked_linear_kernel, forward and gradient of the input. tokens: their bucket."""
    if dtype == torch.float32:
        if tokens <= 32:
            return (_linear(64, 16, 32, 4, 3), _linear(32, 32, 32, 4, 3))
        return (_linear(64, 64, 32, 4, 3), _linear(128, 64, 32, 8, 3))
    if tokens <= 32:
        return (_linear(64, 16, 64, 4, 4), _linear(32, 16, 128, 4, 4))
    return (_linear(64, 64, 64, 4, 3), _linear(128, 64, 64, 8, 3), _linear(128, 128, 32, 8, 4))


def masked_gradient_configs(dtype: torch.dtype) -> tuple[Config, ...]:
    """For masked_weight_gradient_kernel."""

    def gradient(n: int, k: int, tokens: int, warps: int, stages: int) -> Config:
        return Config((("BLOCK_N", n), ("BLOCK_K", k), ("BLOCK_R", tokens), ("GROUP", 8)), warps, stages)

    if dtype == torch.float32:
        return (gradient(64, 64, 32, 4, 3), gradient(128, 64, 32, 8, 3))
    return (gradient(64, 64, 64, 4, 3), gradient(128, 64, 64, 4, 3), gradient(128, 128, 32, 8, 3))


def bsr_configs(dtype: torch.dtype, outputs: int, tokens: int) -> tuple[Config, ...]:
    """For bsr_linear_kernel. outputs: outputs of a block, 16 to 128; tokens: their bucket."""

    def block(m: int, inputs: int, warps: int, stages: int) -> Config:
        return Config((("BLOCK_M", m), ("BLOCK_R", inputs)), warps, stages)

    # A block's index is loaded in front of its x, which halves the depth of the pipeline: n stages are n / 2 buffers,
    # and one less where a step takes several blocks.
    inputs = 32 if dtype == torch.float32 else 64
    warps = 8 if outputs == 128 and dtype == torch.float32 else 4
    stages = 8 if outputs < 64 else 6
    if tokens <= 32:
        return (block(16, inputs, 4, 8), block(32, inputs, 4, 8))
    if dtype == torch.float32 and outputs in (32, 64):
        return (block(32 if outputs == 32 else 64, inputs, 4, stages), block(64, inputs, 8, stages))
    wide = block(128 if outputs <= 64 else 64, inputs, 8 if outputs == 128 else warps, stages)
    return (block(64, inputs, warps, stages), wide)


def sddmm_config(dtype: torch.dtype, rows: int, cols: int) -> Config:
    """For bsr_sddmm_kernel: one configuration a block size."""
    warps = 1 if rows * cols <= 256 else 4 if rows * cols < 128 * 128 else 8
    return Config((("BLOCK_R", 32 if dtype == torch.float32 else 64),), warps, 3)
