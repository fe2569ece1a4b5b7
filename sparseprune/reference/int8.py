"""Activations in 8 bits and products with int8 weights, in plain torch. Sums are of whole numbers and exact:
csrc/cpu/rounding.inl, int8.inl and int8_bitmask.inl give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..packing import Plan, reach_in_quads, scale_of, to_dense

__all__ = ["round_tokens", "round_values", "rounded_product"]

_LEAST = 1e-30  # a smaller range counts as none: its inverse could leave float32


def round_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: `[..., K]`; returns whole numbers `[..., K]` in [-255, 255], int32, and a float32 scale `[..., 1]`: x is about
    their product. A token's range, 0 in it, is cut into 255 steps. A token with a value that is not finite has the
    scale NaN.
    """
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    reach = high - low
    usable = reach >= _LEAST
    steps = torch.full_like(reach, 255)  # a tensor: a number over a tensor is a product with the reciprocal, less exact
    inverse = torch.where(usable, steps / reach, 0.0)
    scale = torch.where(usable, reach / steps, 0.0)
    zero = torch.round(-low * inverse)
    byte = (torch.round(x * inverse) + zero).clamp(max=255)
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.where(finite, byte - zero, 0.0).int(), torch.where(finite, scale, torch.nan)


def round_values(values: Tensor, row: Tensor, rows: int, quads: bool) -> Tensor:
    """values: `[..., c]`, neighbours of one output each; row: int64 `[...]`, the output; returns them on the steps of
    their output, as packing rounds them to int8. quads: for products with 8-bit activations, c even. Values that lie on
    other steps already, as those of a file, are rounded again.
    """
    far = (reach_in_quads(values) if quads else values.abs()).amax(-1)
    largest = torch.zeros(rows, dtype=values.dtype, device=values.device)
    scale = scale_of(largest.scatter_reduce(0, row.flatten(), far.flatten(), "amax"))[row].unsqueeze(-1)
    return (values / scale).round().clamp(-127, 127) * scale


def rounded_product(
    x: Tensor, index: Tensor, offsets: Tensor, values: Tensor, scale: Tensor, plan: Plan
) -> Tensor:
    """x: `[..., K]`; a weight `[N_out, K]` of kind "quads" or "bitmask8"; returns x W^T, float32 `[..., N_out]`: the
    exact sum of whole numbers, rounded to float32, times the product of the two scales.
    """
    rounded, of_token = round_tokens(x)
    whole = to_dense(index, offsets, values, None, plan)
    sums = rounded.double() @ whole.double().t()  # below 2^31: exact
    return sums.float() * (of_token * scale[0])
