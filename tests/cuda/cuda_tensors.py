"""Tensors that the tests of the CUDA kernels share."""

from __future__ import annotations

import math

import torch

from sparseprune import layouts

HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]


def weight(rows, columns, density, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) / math.sqrt(max(1.0, columns * density))
    return (w * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


def amid_nan(tensor, device, lead=8):
    """The tensor on the device as a view with NaN before and behind it: what is read out of bounds shows."""
    room = torch.full((lead + tensor.numel() + 64,), math.nan, dtype=tensor.dtype, device=device)
    view = room[lead : lead + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def csr_on(device, w):
    layout = layouts.CSR.from_dense(w)
    return layout.crow_indices.to(device), layout.col_indices.to(device), amid_nan(layout.values, device)


def plain_strips(shape, crow_indices, col_indices, values):
    """(words as int64 `[strips * 32]`, starts `[strips + 1]`, values, rounded up to 8): the format by its formula."""
    rows, columns = shape
    counts = (crow_indices[1:] - crow_indices[:-1]).long()
    row, column = torch.repeat_interleave(torch.arange(rows), counts), col_indices.long()
    across = -(-columns // 64)
    strips = -(-rows // 16) * across
    strip = row // 16 * across + column // 64
    lane = row % 8 * 4 + column % 64 // 16
    nibble = column % 16 // 4 * 2 + row % 16 // 8
    bit = nibble * 4 + column % 4
    words = torch.zeros(strips * 32, dtype=torch.int64)
    words.scatter_add_(0, strip * 32 + lane, torch.ones_like(bit) << bit)
    order = torch.argsort(((strip * 8 + nibble) * 32 + lane) * 4 + column % 4)
    starts = torch.zeros(strips + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(strip, minlength=strips).cumsum(0)
    packed = values.new_zeros(-(-values.numel() // 8) * 8)
    packed[: values.numel()] = values[order]
    return words, starts, packed
