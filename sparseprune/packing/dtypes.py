"""The dtypes in which values are held: the one table of their names."""

from __future__ import annotations

import torch

__all__ = ["ACTIVATION_DTYPES", "VALUE_CODES", "VALUE_DTYPES"]

#: Public name -> dtype: ``value_dtype`` of layers, packed forms and files. int8 comes with one scale an output.
VALUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}

#: How a product takes its activations: "int8" rounds them to 8 bits with a scale a token.
ACTIVATION_DTYPES = ("float32", "int8")

#: The numbers that the compiled core knows them by (csrc/cpu/kernels.h, Packed.values_dtype).
VALUE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}
