"""The dense model in ONNX Runtime and OpenVINO, through torch's ONNX export.

Both are optional: what is absent is named with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["onnxruntime_of", "openvino_of", "peer_runners"]

Runs = dict[str, Callable[[], Any]]
_NAMES = ("input_ids", "attention_mask")
_NEAR, _NEAR_INT8 = 1e-3, 0.5  # of hidden states near 1: int8 is rounded, not wrong


class _Positional(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]


def export(model: nn.Module, batch: dict[str, Tensor], path: Path) -> None:
    """The model at this shape as ONNX, weights inside."""
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        example = tuple(batch[name] for name in _NAMES)
        unfinished = path.with_suffix(".partial")
        torch.onnx.export(_Positional(model), example, unfinished, input_names=_NAMES, dynamo=True, external_data=False)
    unfinished.replace(path)


def quantise(path: Path, target: Path) -> None:
    """ONNX Runtime's dynamic int8: weights in int8, activations rounded a tensor at each product."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    unfinished = target.with_suffix(".partial")
    quantize_dynamic(str(path), str(unfinished), weight_type=QuantType.QInt8)
    unfinished.replace(target)


def peer_runners(
    model: nn.Module, batch: dict[str, Tensor], name: str = "model", folder: Path | None = None
) -> tuple[Runs, dict[str, str]]:
    """(name -> run, name -> why it is absent), for the threads torch is set to. folder: exported models are kept there
    under ``name``, to be read again.
    """
    lacking = [n for n in ("onnx", "onnxscript", "onnxruntime", "openvino") if importlib.util.find_spec(n) is None]
    if set(lacking) & {"onnx", "onnxscript"}:
        return {}, dict.fromkeys(("onnxruntime", "openvino"), f"{', '.join(lacking)} not installed")
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return peer_runners(model, batch, name, Path(made))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name.replace(' ', '-')}.onnx"
    if not path.exists():
        export(model, batch, path)
    runs: Runs = {}
    absent: dict[str, str] = {}
    arrays = {n: batch[n].numpy() for n in _NAMES}
    if "onnxruntime" in lacking:
        absent["onnxruntime"] = "onnxruntime not installed"
    else:
        runs["onnxruntime"] = partial(onnxruntime_of(path), arrays)
        int8 = path.with_name(path.stem + "-int8.onnx")
        try:
            if not int8.exists():
                quantise(path, int8)
            runs["onnxruntime int8"] = partial(onnxruntime_of(int8), arrays)
        except Exception as error:  # a peer's own refusal: it is reported, and nothing is measured of it
            absent["onnxruntime int8"] = f"{type(error).__name__}: {str(error)[:200]}"
    if "openvino" in lacking:
        absent["openvino"] = "openvino not installed"
    else:
        runs["openvino"] = partial(openvino_of(path), arrays)
        int8 = path.with_name(path.stem + "-int8.onnx")
        if int8.exists():
            try:
                runs["openvino int8"] = partial(openvino_of(int8), arrays)
            except Exception as error:
                absent["openvino int8"] = f"{type(error).__name__}: {str(error)[:200]}"
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()
    for peer, run in list(runs.items()):
        error = float((torch.as_tensor(run()) - expected)[real].abs().max())
        if not error < (_NEAR_INT8 if "int8" in peer else _NEAR) * max(1.0, float(expected.abs().max())):
            absent[peer] = f"its output differs by {error:.3g}"
            del runs[peer]
    return runs, absent


def onnxruntime_of(path: Path) -> Callable[[Any], Any]:
    """What runs the ONNX file on inputs by name and returns its first output, on as many threads as torch is set to."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would disturb the others
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]


def openvino_of(model: Any) -> Callable[[Any], Any]:
    """The same in OpenVINO, in float32 where the model is not int8. model: a file, or one of its models."""
    import openvino

    threads = torch.get_num_threads()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    read = core.read_model(model) if isinstance(model, Path) else model
    request = core.compile_model(read, "CPU", settings).create_infer_request()
    return lambda arrays: request.infer(arrays)[0]
