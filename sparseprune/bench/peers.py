"""Other ways to run ``y = x W^T + b`` with a pruned W: the baselines that a table prints beside ours.

A peer takes the pruned weight ``w: [N, K]``, ``bias: [N]`` and ``x: [tokens, K]`` (float32, contiguous) and returns a
callable that gives y as a tensor ``[tokens, N]`` or a NumPy array of that shape; :class:`Unavailable` with the reason
where it cannot run here. Each returns y row-major, as ``nn.Linear`` does, so what a peer needs to transpose for that
is part of its time.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PEERS", "Unavailable"]

Run = Callable[[], Any]


class Unavailable(Exception):
    """A peer that cannot run here; the text is the reason."""


def _need(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name} is not installed ({error})") from None


def _quicker(runs: list[Run]) -> Run:
    """The quickest of several ways to use one library: a peer is measured at its best use."""

    def cost(run: Run) -> float:
        run()
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return min(runs, key=cost)


def torch_dense(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """``F.linear`` on the pruned weight as it lies."""
    return lambda: F.linear(x, w, bias)


def torch_csr(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """The quicker of ``x @ W_csr^T`` and ``(W_csr @ x^T)^T``; torch hands both to MKL."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its csr support beta
        csr = w.to_sparse_csr()
    column = bias.unsqueeze(1)
    return _quicker(
        [
            lambda: F.linear(x, csr).add_(bias),
            lambda: (csr @ x.t()).add_(column).t().contiguous(),
            lambda: (csr @ x.t().contiguous()).add_(column).t().contiguous(),
        ]
    )


def torch_bsr(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """4x4 blocks of torch.sparse_bsr; every block with a kept weight is stored whole."""
    if w.shape[0] % 4 or w.shape[1] % 4:
        raise Unavailable(f"4x4 blocks do not divide {list(w.shape)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        bsr = w.to_sparse_bsr((4, 4))
    column = bias.unsqueeze(1)
    return _quicker(
        [
            lambda: F.linear(x, bsr).add_(bias),
            lambda: (bsr @ x.t()).add_(column).t().contiguous(),
            lambda: (bsr @ x.t().contiguous()).add_(column).t().contiguous(),
        ]
    )


def torch_int8(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """torch's dynamic quantisation of the dense layer: int8 weights, activations quantised on every call."""
    linear = nn.Linear(w.shape[1], w.shape[0])
    linear.load_state_dict({"weight": w, "bias": bias})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)
        except (AttributeError, RuntimeError) as error:
            raise Unavailable(f"torch {torch.__version__} cannot quantise dynamically: {error}") from None
    layer = model[0]

    def run() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return run


def scipy_csr(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """``scipy.sparse.csr_matrix @ x^T``: one thread."""
    sparse = _need("scipy.sparse")
    csr = sparse.csr_matrix(w.numpy())
    column, transposed = bias.numpy()[:, None], x.numpy().T
    return lambda: np.ascontiguousarray((csr @ transposed + column).T)


class _MatrixDescription(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("mode", ctypes.c_int), ("diag", ctypes.c_int))


_GENERAL, _ROW_MAJOR, _COLUMN_MAJOR, _NO_TRANSPOSE = 20, 101, 102, 10


class _MklMatrix:
    """One csr weight in MKL, analysed for ``tokens`` columns in one order. Holds what MKL points into."""

    def __init__(self, w: Tensor, tokens: int, order: int) -> None:
        dense = w.numpy()
        rows, columns = np.nonzero(dense)
        self.values = np.ascontiguousarray(dense[rows, columns], dtype=np.float32)
        self.indices = np.ascontiguousarray(columns, dtype=np.int32)
        self.pointer = np.zeros(w.shape[0] + 1, dtype=np.int32)
        np.cumsum(np.bincount(rows, minlength=w.shape[0]), out=self.pointer[1:])
        self.tokens, self.order = tokens, order
        self.description = _MatrixDescription(_GENERAL, 0, 0)
        self.handle = ctypes.c_void_p()
        self.mkl = _mkl()
        pointer, values, indices = (array.ctypes.data for array in (self.pointer, self.values, self.indices))
        create = self.mkl.mkl_sparse_s_create_csr
        _check_mkl(create(ctypes.byref(self.handle), 0, *w.shape, pointer, pointer + 4, indices, values))
        hint = self.mkl.mkl_sparse_set_mm_hint
        _check_mkl(hint(self.handle, _NO_TRANSPOSE, self.description, order, tokens, 1000))
        _check_mkl(self.mkl.mkl_sparse_optimize(self.handle))

    def multiply(self, b: Tensor, ldb: int, c: Tensor, ldc: int) -> Tensor:
        """Writes this matrix times b into c and returns c."""
        _check_mkl(
            self.mkl.mkl_sparse_s_mm(
                _NO_TRANSPOSE, 1.0, self.handle, self.description, self.order,
                b.data_ptr(), self.tokens, ldb, 0.0, c.data_ptr(), ldc,
            )
        )  # fmt: skip
        return c

    def __del__(self) -> None:
        self.mkl.mkl_sparse_destroy(self.handle)


def _check_mkl(status: int) -> None:
    if status:
        raise Unavailable(f"an mkl_sparse routine returned status {status}")


def mkl_inspector(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """MKL's inspector-executor: ``mkl_sparse_s_mm`` after ``mkl_sparse_optimize`` with a hint for this many tokens.

    The quicker of its row-major form (x^T copied, y^T copied back) and its column-major form (x and y as they lie).
    """
    _mkl().MKL_Set_Num_Threads(torch.get_num_threads())
    n, k, tokens = w.shape[0], w.shape[1], x.shape[0]
    by_rows, by_columns = _MklMatrix(w, tokens, _ROW_MAJOR), _MklMatrix(w, tokens, _COLUMN_MAJOR)
    column = bias.unsqueeze(1)

    def row_major() -> Tensor:
        y = by_rows.multiply(x.t().contiguous(), tokens, torch.empty(n, tokens), tokens)
        return y.add_(column).t().contiguous()

    def column_major() -> Tensor:
        return by_columns.multiply(x, k, torch.empty(tokens, n), n).add_(bias)

    return _quicker([row_major, column_major])


@functools.cache
def _mkl() -> ctypes.CDLL:
    """libmkl_rt of the ``mkl`` wheel, on GNU threads. torch's own copy has no inspector, only the plain routines."""
    paths = sorted(Path(sys.prefix, "lib").glob("libmkl_rt.so*"))
    if not paths:
        raise Unavailable("the mkl wheel is not installed (torch's own MKL lacks the inspector)")
    library = ctypes.CDLL(str(paths[-1]))
    gnu_threads = 3
    library.MKL_Set_Threading_Layer(gnu_threads)
    by_value, pointer, number = _MatrixDescription, ctypes.c_void_p, ctypes.c_int
    library.mkl_sparse_s_create_csr.argtypes = [pointer, number, number, number, pointer, pointer, pointer, pointer]
    library.mkl_sparse_set_mm_hint.argtypes = [pointer, number, by_value, number, number, number]
    library.mkl_sparse_optimize.argtypes = [pointer]
    library.mkl_sparse_destroy.argtypes = [pointer]
    library.mkl_sparse_s_mm.argtypes = [
        number, ctypes.c_float, pointer, by_value, number, pointer, number, number, ctypes.c_float, pointer, number
    ]  # fmt: skip
    return library


def onnxruntime_dense(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """The dense layer as one Gemm in ONNX Runtime; it gains nothing from zeros."""
    onnx, runtime = _need("onnx"), _need("onnxruntime")
    helper, numpy_helper = importlib.import_module("onnx.helper"), importlib.import_module("onnx.numpy_helper")
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        "linear",
        [helper.make_tensor_value_info("x", kind, list(x.shape))],
        [helper.make_tensor_value_info("y", kind, [x.shape[0], w.shape[0]])],
        [numpy_helper.from_array(w.numpy(), "w"), numpy_helper.from_array(bias.numpy(), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would disturb the others
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino_dense(w: Tensor, bias: Tensor, x: Tensor) -> Run:
    """The dense layer in OpenVINO, its sparse weight decompression left at its default."""
    ov = _need("openvino")
    ops = importlib.import_module("openvino.opset13")
    source = ops.parameter(list(x.shape), np.float32)
    product = ops.matmul(source, ops.constant(w.numpy()), False, True)
    model = ov.Model([ops.add(product, ops.constant(bias.numpy()))], [source])
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.numpy(), shared_memory=True))
    output = request.get_output_tensor()

    def run() -> Any:
        request.infer()
        return output.data

    return run


#: name in the tables -> peer. The first is the baseline of every ratio.
PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Run]] = {
    "torch dense": torch_dense,
    "torch csr": torch_csr,
    "torch bsr 4x4": torch_bsr,
    "torch int8": torch_int8,
    "scipy csr": scipy_csr,
    "mkl inspector": mkl_inspector,
    "onnxruntime": onnxruntime_dense,
    "openvino": openvino_dense,
}
