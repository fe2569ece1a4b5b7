"""ONNX of a densified model, checked against the model in ONNX Runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._files import replacing
from ..nn import densify_
from ..nn.copies import copy_of

__all__ = ["NO_GAIN", "export_onnx"]

NO_GAIN = (
    "ONNX Runtime multiplies zeros like any other number: the file is as large and runs as fast as that of the dense "
    "model"
)


class _Logits(nn.Module):
    """A model of transformers as a function of tensors."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, list(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Any = self.model(**dict(zip(self.names, inputs)))
        return found if isinstance(found, Tensor) else found[0]


def _difference(got: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """The largest difference, and the largest expected number. The same infinity, and NaN beside NaN, agree; another
    shape, and an infinity or a NaN that is only in one, is off by infinity.
    """
    if got.shape != expected.shape:
        return math.inf, 0.0
    finite = np.isfinite(expected)
    if not np.array_equal(got[~finite], expected[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return math.inf, 0.0
    if not finite.any():
        return 0.0, 0.0
    return float(np.abs(got[finite] - expected[finite]).max()), float(np.abs(expected[finite]).max())


@torch.no_grad()
def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], inputs: dict[str, Tensor], tolerance: float = 1e-3
) -> float:
    """Writes a dense copy of ``model`` as ONNX and runs it; returns the largest difference of the outputs.

    inputs: name -> int64 `[B, T]`, as the model is called, such as ``input_ids`` and ``attention_mask``; batch and
    length stay free in the file. The output is the first one of the model, ``logits`` where it has them. ImportError
    with the remedy where a package is missing, ValueError on a model in bfloat16, which ONNX Runtime does not multiply
    in, RuntimeError, and no file, where the outputs differ by more than ``tolerance`` of the largest, or one has a NaN
    or an infinity where the other has not.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # what torch exports with
    except ImportError as error:
        raise ImportError(f"ONNX needs a package ({error}); pip install 'sparseprune[export]'") from None
    dense = copy_of(model, "export_onnx").eval()
    densify_(dense)
    if any(parameter.dtype == torch.bfloat16 for parameter in dense.parameters()):
        raise ValueError(
            f"{Path(path)}: ONNX Runtime expected float32 or float16, got a model in bfloat16; call model.float() first"
        )
    config: Any = getattr(dense, "config", None)
    if config is not None:
        config.use_cache = False
    wrapped = _Logits(dense, list(inputs)).eval()
    given = tuple(tensor.cpu() for tensor in inputs.values())
    wrapped.cpu()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with replacing(path) as unfinished:
        torch.onnx.export(
            wrapped, given, str(unfinished), input_names=list(inputs), output_names=["output"], dynamo=True,
            dynamic_shapes=(tuple(free for _ in given),), external_data=False, verbose=False,
        )  # fmt: skip
        session = onnxruntime.InferenceSession(str(unfinished), providers=["CPUExecutionProvider"])
        worst = 0.0
        for rows in (given, tuple(t[:1, : max(1, t.shape[1] - 1)] for t in given)):  # another batch, another length
            expected = wrapped(*rows).float().numpy()
            (got,) = session.run(None, {name: t.numpy() for name, t in zip(inputs, rows)})
            off, largest = _difference(got, expected)
            worst = max(worst, off)
            if off > tolerance * max(1.0, largest):
                raise RuntimeError(
                    f"{Path(path)}: ONNX Runtime expected to answer as torch within {tolerance:g}, got {got.shape} "
                    f"instead of {expected.shape}, off by up to {off:g}; nothing was written"
                )
    return worst
