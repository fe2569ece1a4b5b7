"""A program that the compiled core has read, bound to the tensors that its plan names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._native import require_c
from ..encoder_program import result_features
from ..packing import VALUE_CODES

__all__ = ["DTYPE_CODES", "BoundProgram"]

DTYPE_CODES = {**VALUE_CODES, torch.int16: 4, torch.int32: 5, torch.uint8: 6}  # csrc/bindings/plan.h


class BoundProgram:
    """A plan and the tensors it names, read by the core once; keeps the tensors alive. ValueError on a plan that does
    not fit them.

    op: the op whose plans these are; core: its class in the compiled core.
    """

    op: ClassVar[str]
    core: ClassVar[str]

    def __init__(self, tensors: Sequence[Tensor], plan: list[int], scalars: list[float]) -> None:
        for place, tensor in enumerate(tensors):
            if tensor.device.type != "cpu" or not tensor.is_contiguous():
                got = f"strides {tensor.stride()} on {tensor.device}"
                raise ValueError(f"{self.op}: tensor {place} expected contiguous on the CPU, got {got}")
        self.tensors = tuple(tensors)
        self.program: Any = getattr(require_c(), self.core)(
            plan,
            scalars,
            [tensor.data_ptr() for tensor in tensors],
            [DTYPE_CODES.get(tensor.dtype, -1) for tensor in tensors],
            [tensor.numel() for tensor in tensors],
        )
        self.features = result_features(plan)
