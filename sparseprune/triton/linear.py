"""Masked and block-sparse products as Triton kernels on the tensor cores, on the current stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._registry import kernel
from ..device_memory import remembered
from . import configs
from ._environment import guard, interpreting, kernels, why_not_triton
from ._tuning import Config, bucket, launch
from .masking import masked_copy

SIDES = (16, 32, 64, 128)  # what a side of a bsr block may measure
MOST_TOKENS = 65535 * 16  # a grid has 65535 programs in y, of 16 tokens at least
#: Up to which a mask is applied as the weight is loaded: a prediction (docs/gpu.md) until it has been measured.
FUSED_TOKENS = 1024


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as ``torch.backends.cuda.matmul.fp32_precision`` says, or where that is unset or not
    there ``torch.set_float32_matmul_precision`` ("highest": exactly); ROCm: exactly.
    """
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if asked != "none":
        return "tf32" if asked == "tf32" else "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # torch refuses where the newer settings were used elsewhere, and here nothing was asked for
        return "ieee"


_FARTHEST = 2**31 // 128  # elements between rows, of which a step takes up to 128


def flattened(x: Tensor) -> Tensor:
    """x: `[..., C]`; returns `[M, C]`, a view where the strides allow: kernels step over many rows in 32 bits."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if max(flat.stride()) < _FARTHEST else flat.contiguous()


def _dense(tensor: Tensor | None) -> Tensor | None:
    """The vector with stride 1, as kernels read it."""
    return None if tensor is None else tensor.contiguous()


def _rows(w: Tensor) -> Tensor:
    """A matrix whose rows are contiguous."""
    return w if w.stride(1) == 1 else w.contiguous()


def _masked(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None, activation: str, transposed: bool, bits: bool
) -> Tensor:
    """x: `[..., RED]`; returns `[..., OUT]`; (OUT, RED) is w's shape, or its reverse where transposed."""
    flat, w, mask, bias = flattened(x), _rows(w), _rows(mask.view(torch.uint8)), _dense(bias)
    outputs, inputs = (w.shape[1], w.shape[0]) if transposed else (w.shape[0], w.shape[1])
    tokens = flat.shape[0]
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    if out.numel():

        def run(config: Config) -> None:
            options = config.options()
            programs = cdiv(outputs, options["BLOCK_O"]) * cdiv(tokens, options["BLOCK_M"])
            kernels("linear").masked_linear_kernel[(programs,)](
                flat, w, mask, flat if bias is None else bias, out, tokens, outputs, inputs,
                flat.stride(0), flat.stride(1), w.stride(0), mask.stride(0),
                TRANSPOSED=transposed, BITS=bits, BIAS=bias is not None, ACTIVATION=activation,
                PRECISION=precision(x.dtype), UPCAST=interpreting(), **options,
            )  # fmt: skip

        size = bucket(tokens)
        key = (outputs, inputs, size, x.dtype, w.dtype, transposed, bits, precision(x.dtype))
        with guard(x):
            launch("masked_linear", x.device, key, configs.masked_linear_configs(x.dtype, size), run)
    return out.reshape(*x.shape[:-1], outputs)


def masked_forward(
    x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None = None, activation: str = "none", bits: bool = False
) -> Tensor:
    """x: `[..., K]`; w: `[N, K]`; mask: bool `[N, K]`, or with bits uint8 `[N, ceil(K / 8)]` (:func:`pack_mask`),
    bias: `[N]`.

    Returns activation(x (w where kept, else 0)^T + bias), `[..., N]`, x's dtype; sums in float32.
    """
    return _masked(x, w, mask, bias, activation, transposed=False, bits=bits)


def masked_input_gradient(dy: Tensor, w: Tensor, mask: Tensor, bits: bool = False) -> Tensor:
    """dy: `[..., N]`; w, mask as in :func:`masked_forward`; returns `[..., K]`, dy times the masked weights."""
    return _masked(dy, w, mask, None, "none", transposed=True, bits=bits)


def masked_weight_gradient(dy: Tensor, x: Tensor, mask: Tensor, dtype: torch.dtype, bits: bool = False) -> Tensor:
    """dy: `[..., N]`; x: `[..., K]`; returns `[N, K]` of dtype: dy x summed over tokens where kept, else 0."""
    dy, x, mask = flattened(dy), flattened(x), _rows(mask.view(torch.uint8))
    (tokens, n), k = dy.shape, x.shape[1]
    out = torch.empty(n, k, dtype=dtype, device=x.device)
    if out.numel():

        def run(config: Config) -> None:
            options = config.options()
            programs = cdiv(n, options["BLOCK_N"]) * cdiv(k, options["BLOCK_K"])
            kernels("linear").masked_weight_gradient_kernel[(programs,)](
                dy, x, mask, out, tokens, n, k, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), mask.stride(0),
                BITS=bits, PRECISION=precision(x.dtype), UPCAST=interpreting(), **options,
            )  # fmt: skip

        with guard(x):
            launch(
                "masked_weight_gradient", x.device, (n, k, bucket(max(tokens, 1)), x.dtype, bits, precision(x.dtype)),
                configs.masked_gradient_configs(x.dtype), run,
            )  # fmt: skip
    return out


def pack_mask(mask: Tensor) -> Tensor:
    """mask: bool `[N, K]`; returns uint8 `[N, ceil(K / 8)]`, entry k in bit k % 8 of byte k // 8."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask.view(torch.uint8), (0, -columns % 8)).reshape(rows, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(2, dtype=torch.uint8)


def bsr_forward(
    x: Tensor,
    crow: Tensor,
    index: Tensor,
    order: Tensor | None,
    values: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """x: `[..., K]`; values: `[nblocks, r, c]`; returns activation(x W^T + bias), `[..., N]`, with crow and index of
    the bsr W.

    With order, crow and index are those of the transpose and order the block of values that each entry stands for: x
    is then dy `[..., N]` and the result dx `[..., K]`.
    """
    flat, values, bias = flattened(x), values.contiguous(), _dense(bias)
    rows, columns = values.shape[1], values.shape[2]
    side = rows if order is None else columns
    bands, tokens = crow.numel() - 1, flat.shape[0]
    out = torch.empty(tokens, bands * side, dtype=x.dtype, device=x.device)
    if out.numel():

        def run(config: Config) -> None:
            options = config.options()
            kernels("linear").bsr_linear_kernel[(bands, cdiv(tokens, options["BLOCK_M"]))](
                flat, crow, index, index if order is None else order, values, flat if bias is None else bias, out,
                tokens, bands * side, flat.stride(0), flat.stride(1),
                ROWS=rows, COLS=columns, TRANSPOSED=order is not None, BIAS=bias is not None, ACTIVATION=activation,
                PRECISION=precision(x.dtype), UPCAST=interpreting(), **options,
            )  # fmt: skip

        size, held = bucket(tokens), torch.promote_types(x.dtype, values.dtype)  # in shared memory, as they come
        key = (bands, flat.shape[1], size, rows, columns, x.dtype, values.dtype, order is not None, precision(x.dtype))
        with guard(x):
            launch("bsr_linear", x.device, key, configs.bsr_configs(held, side, size), run)
    return out.reshape(*x.shape[:-1], bands * side)


def bsr_transpose(crow: Tensor, index: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The structure of the transpose: (crow `[columns + 1]`, index `[nblocks]`, order `[nblocks]`), int32, kept."""
    found = remembered(f"bsr transposed {columns}", (crow, index), lambda: _transpose(crow, index, columns))
    return found or _transpose(crow, index, columns)  # while a CUDA graph is recorded, which then makes it each time


def _transpose(crow: Tensor, index: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    order = torch.sort(index, stable=True).indices
    bands = torch.arange(crow.numel() - 1, device=crow.device, dtype=torch.int32)
    row = torch.repeat_interleave(bands, (crow[1:] - crow[:-1]).long(), output_size=index.numel())
    edges = torch.arange(columns + 1, device=index.device, dtype=torch.int32)
    crow_t = torch.searchsorted(index[order].contiguous(), edges, out_int32=True)
    return crow_t, row[order].contiguous(), order.to(torch.int32)


def _why_not_bsr(values: Tensor, *others: Tensor | None) -> list[str]:
    """Reasons against a product with these blocks; others: activations, gradients, indices and bias."""
    reasons = why_not_triton(*(t for t in others if t is not None and t.is_floating_point()))
    reasons += why_not_triton(values) if not reasons else []
    if values.dim() != 3:
        reasons.append(f"needs blocks [nblocks, r, c], got values of shape {list(values.shape)}")
    elif values.shape[1] not in SIDES or values.shape[2] not in SIDES:
        sides = ", ".join(map(str, SIDES))
        reasons.append(f"needs blocks with sides among {sides}, got {values.shape[1]}x{values.shape[2]}")
    tokens = others[0].shape[:-1].numel() if others and others[0] is not None else 0
    if tokens > MOST_TOKENS:
        reasons.append(f"needs at most {MOST_TOKENS} tokens in one call, got {tokens}")
    return reasons + why_not_indices(values.device, *others)


def why_not_indices(device: torch.device, *tensors: Tensor | None) -> list[str]:
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device != device:
            return [f"needs every tensor on {device}, got {tensor.device}"]
        if not tensor.is_floating_point() and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
            return [f"needs contiguous int32 indices, got {tensor.dtype}"]
    return []


def _why_not_bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> list[str]:
    return _why_not_bsr(values, x, crow_indices, col_indices, bias)


@kernel("bsr_linear", "triton", _why_not_bsr_linear)
def bsr_linear(
    x: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """x: `[..., K]`; values: `[nblocks, r, c]`; bias: `[N]`; returns activation(x W^T + bias), `[..., N]`, in x's
    dtype.

    The blocks are multiplied in x's dtype and summed in float32.
    """
    return bsr_forward(x, crow_indices, col_indices, None, values, bias, activation)


def _why_not_csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> list[str]:
    return _why_not_bsr(values, dy, crow_indices, col_indices)


@kernel("csr_linear_dx", "triton", _why_not_csr_linear_dx)
def csr_linear_dx(dy: Tensor, crow_indices: Tensor, col_indices: Tensor, values: Tensor, k: int) -> Tensor:
    """dy: `[..., N]`; blocks `[nblocks, r, c]`; returns dY W, `[..., k]`. The transpose's structure is made once."""
    return bsr_forward(dy, *bsr_transpose(crow_indices, col_indices, k // values.shape[2]), values)


def _why_not_masked(mask: Tensor, *tensors: Tensor | None) -> list[str]:
    reasons = why_not_triton(*tensors)
    device = next(tensor.device for tensor in tensors if tensor is not None)
    if mask.device != device:
        reasons.append(f"needs the mask on {device}, got {mask.device}")
    return reasons


def _why_not_masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> list[str]:
    return _why_not_masked(mask, x, w, bias)


@kernel("masked_linear", "triton", _why_not_masked_linear)
def masked_linear(x: Tensor, w: Tensor, mask: Tensor, bias: Tensor | None) -> Tensor:
    """x: `[..., K]`; w, mask (bool): `[N, K]`; bias: `[N]`; returns x (w where kept, else 0)^T + bias, `[..., N]`.

    The mask is applied as w is loaded, without a masked copy of w; for more than FUSED_TOKENS tokens the copy is made,
    and costs less than it gains in torch's dense product. Multiplied in x's dtype, summed in float32.
    """
    if x.shape[:-1].numel() > FUSED_TOKENS:
        return F.linear(x, _copy(x, w, mask), None if bias is None else bias.detach().to(x.dtype))
    return masked_forward(x, w, mask, bias)


def _copy(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    return masked_copy(w.detach().contiguous(), mask.contiguous()).to(x.dtype)


def _why_not_masked_linear_dx(dy: Tensor, w: Tensor, mask: Tensor) -> list[str]:
    return _why_not_masked(mask, dy, w)


@kernel("masked_linear_dx", "triton", _why_not_masked_linear_dx)
def masked_linear_dx(dy: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N]`; w, mask (bool): `[N, K]`; returns dy times the masked weights, `[..., K]`, in dy's dtype."""
    if dy.shape[:-1].numel() > FUSED_TOKENS:
        return dy @ _copy(dy, w, mask)
    return masked_input_gradient(dy, w, mask)


def _why_not_masked_linear_dw(dy: Tensor, x: Tensor, mask: Tensor) -> list[str]:
    reasons = _why_not_masked(mask, dy, x)
    if x.dtype != dy.dtype:
        reasons.append(f"needs x and dy of one dtype, got {x.dtype} and {dy.dtype}")
    return reasons


@kernel("masked_linear_dw", "triton", _why_not_masked_linear_dw)
def masked_linear_dw(dy: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """dy: `[..., N]`; x: `[..., K]`; returns float32 `[N, K]`: the sum over tokens of dy x where the mask keeps, else
    0.
    """
    return masked_weight_gradient(dy, x, mask, torch.float32)
