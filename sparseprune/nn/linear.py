"""SparseLinear: a drop-in for ``nn.Linear`` that stores and multiplies only what pruning kept."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import _native, backends, layouts, native, ops, reference

__all__ = ["ACTIVATIONS", "VALUES", "SparseLinear"]

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
VALUES = ("float32", "bfloat16", "int8")

# Looked up once: a language model calls its layers hundreds of times a token, each time with cold caches.
_is_tracing, _functorch_level = torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_PLAIN = (Tensor, nn.Parameter)
_pack_lock = threading.Lock()  # many threads may call one layer; packing happens once


def _activate(x: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return x
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    functions: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
    return functions[activation](x)


def why_not_direct(*tensors: Tensor | None) -> str | None:
    """None where a kernel may be called directly, past torch's dispatcher; else what is in the way.

    The dispatcher is passed by only where nothing could tell the difference: plain CPU tensors, no gradient, no mode,
    no functorch level, no autocast, no tracing, no compilation.
    """
    if torch.compiler.is_compiling() or _is_tracing():
        return "the call is being compiled or traced"
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"{type(tensor).__name__} is a tensor subclass"
        if tensor.layout is not torch.strided or not tensor.is_cpu:
            return f"needs strided CPU tensors, got {tensor.layout} on {tensor.device}"
        if grad and tensor.requires_grad:
            return "a gradient is needed"
    if _dispatch_modes() or _function_modes():
        return "a torch dispatch or function mode is active"
    if _functorch_level() is not None:
        return "a functorch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is active"
    return None


def runs_direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel of the compiled core is called directly on these: nothing is in the way, and it is there and not
    passed over by SPARSEPRUNE_BACKEND.
    """
    return _native.C is not None and why_not_direct(*tensors) is None and backends.forced_backend() in (None, "native")


class SparseLinear(nn.Module):
    """y = activation(x W^T + bias + (x A^T) B^T) with W `[N, K]` in one of the sparse layouts.

    x: `[..., K]`; returns `[..., N]` in x's dtype (under autocast in that of ``F.linear``). ``values`` is a Parameter
    in the layout's own shape and trains; the structure is fixed: ``crow_indices, col_indices`` (csr, bsr) or
    ``indices`` (nm), buffers in the state dict. ``bias``, ``low_rank_a`` `[r, K]` and ``low_rank_b`` `[N, r]` are
    optional Parameters. ``weight`` is the dense `[N, K]` matrix, made on demand, read-only.

    What the kernels read is packed from ``values``, in huge pages where the system has them, and kept until they
    change. An in-place write to ``values`` is noticed by its version counter; after a write through ``.data``, which
    is not, call :meth:`repack`. A load_state_dict may bring another structure of the same shape, or a dense
    ``weight``, which is converted to this layer's layout.

    ``value_dtype`` is how the inference kernels hold the values: "float32" (exact), "bfloat16", or "int8" (one scale
    an output). ``tokens``: the numbers of rows of x that packed forms are tuned for, one form each; any number of rows
    works, and takes the form whose number is nearest by ratio. ``dense_from``: inference with that many rows or more
    multiplies with the unpacked weight instead, which is kept too, dense in the dtype of ``values``; None: never.
    """

    values: nn.Parameter
    crow_indices: Tensor
    col_indices: Tensor
    indices: Tensor
    bias: nn.Parameter | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None

    def __init__(
        self,
        layout: layouts.Layout,
        bias: Tensor | None = None,
        *,
        low_rank_a: Tensor | None = None,
        low_rank_b: Tensor | None = None,
        activation: str = "none",
        value_dtype: str = "float32",
        tokens: int | Sequence[int] = 128,
        dense_from: int | None = None,
    ) -> None:
        super().__init__()
        counts = (tokens,) if isinstance(tokens, int) else tuple(sorted(set(tokens)))
        if not counts or counts[0] < 1:
            raise ValueError(f"SparseLinear: tokens expected one or more numbers >= 1, got {tokens!r}")
        if dense_from is not None and dense_from < 1:
            raise ValueError(f"SparseLinear: dense_from expected at least 1 or None, got {dense_from}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"SparseLinear: activation expected one of {ACTIVATIONS}, got {activation!r}")
        if value_dtype not in VALUES:
            raise ValueError(f"SparseLinear: value_dtype expected one of {VALUES}, got {value_dtype!r}")
        layout.validate()
        self.out_features, self.in_features = layout.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"SparseLinear: bias expected shape [{self.out_features}], got {list(bias.shape)}")
        self.layout = layout.layout
        self.blocksize = layout.blocksize if isinstance(layout, layouts.BSR) else None
        self.nm = (layout.n, layout.m) if isinstance(layout, layouts.NM) else None
        self.activation, self.value_dtype = activation, value_dtype
        self.tokens, self.dense_from = counts, dense_from
        self.values = nn.Parameter(layout.values.detach())
        for name, tensor in layout.tensors().items():
            if name != "values":
                self.register_buffer(name, tensor)
        self.register_parameter("bias", _parameter(bias))
        self.register_parameter("low_rank_a", None)
        self.register_parameter("low_rank_b", None)
        self._packs: dict[str, tuple[Any, Any]] = {}
        self._limits = [  # (most rows, form); more rows take the largest
            (math.isqrt(small * large), f"inference {small}") for small, large in itertools.pairwise(counts)
        ]
        if (low_rank_a is None) != (low_rank_b is None):
            raise ValueError("SparseLinear: low_rank_a and low_rank_b expected together, got one of them")
        if low_rank_a is not None and low_rank_b is not None:
            self.set_low_rank_(low_rank_a, low_rank_b)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        layout: str = "csr",
        blocksize: tuple[int, int] | None = None,
        nm: tuple[int, int] | None = None,
        **options: Any,
    ) -> SparseLinear:
        """The same function as ``linear``, holding its non-zero entries only. Shares ``bias``; ``options`` as for the
        class.

        layout: "csr" | "bsr" with ``blocksize=(r, c)`` dividing `[N, K]`, 16x1 by default | "nm" with ``nm=(n, m)``,
        2:4 by default. ValueError where the layout does not fit the weight.
        """
        weight = linear.weight.detach()
        mask = getattr(linear, "mask", None)
        if isinstance(mask, Tensor):
            weight = weight * mask
        if layout == "bsr" and blocksize is None:
            blocksize = (16, 1)
        if layout == "nm" and nm is None:
            nm = (2, 4)
        layer = cls(layouts.from_dense(weight, layout, blocksize, nm), linear.bias, **options)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """An ``nn.Linear`` with the same weight, low-rank term added in. Shares ``bias``. The activation stays
        behind.
        """
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.values.dtype
        )
        linear.weight = nn.Parameter(self.weight, requires_grad=self.values.requires_grad)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def set_low_rank_(self, low_rank_a: Tensor | None, low_rank_b: Tensor | None) -> None:
        """Takes the factors of the compensation term: A `[r, K]`, B `[N, r]`; None and None removes it."""
        if low_rank_a is not None and low_rank_b is not None:
            rank = low_rank_a.shape[0]
            if tuple(low_rank_a.shape) != (rank, self.in_features) or tuple(low_rank_b.shape) != (
                self.out_features,
                rank,
            ):
                raise ValueError(
                    f"SparseLinear: low_rank_a, low_rank_b expected "
                    f"[r, {self.in_features}] and [{self.out_features}, r], "
                    f"got {list(low_rank_a.shape)} and {list(low_rank_b.shape)}"
                )
        self.low_rank_a, self.low_rank_b = _parameter(low_rank_a), _parameter(low_rank_b)

    def to_layout(self) -> layouts.Layout:
        """The canonical layout, over this layer's own tensors."""
        shape = (self.out_features, self.in_features)
        if self.layout == "csr":
            return layouts.CSR(shape, self.crow_indices, self.col_indices, self.values)
        if self.layout == "bsr":
            assert self.blocksize is not None
            return layouts.BSR(shape, self.blocksize, self.crow_indices, self.col_indices, self.values)
        assert self.nm is not None
        return layouts.NM(shape, *self.nm, self.values, self.indices)

    @property
    def weight(self) -> Tensor:
        """The dense `[N, K]` weight, the low-rank term included. Made on every access; writing to it changes
        nothing.
        """
        dense = self.to_layout().to_dense().detach()
        if self.low_rank_a is not None and self.low_rank_b is not None:
            dense = dense + self.low_rank_b.detach() @ self.low_rank_a.detach()
        return dense

    @property
    def nnz(self) -> int:
        """Stored weight entries, the low-rank factors included."""
        factors = (self.low_rank_a, self.low_rank_b)
        return self.values.numel() + sum(f.numel() for f in factors if f is not None)

    @property
    def density(self) -> float:
        """nnz / (N * K)."""
        return self.nnz / max(1, self.out_features * self.in_features)

    def forward(self, input: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None) -> Tensor:
        """input: `[..., K]`; residual: `[..., N]`, added after the activation; norm: over `[N]`, with weight and bias,
        what comes last; returns `[..., N]`.

        ValueError where input, residual or norm has another width, TypeError where norm is no LayerNorm.
        """
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: input expected [..., {self.in_features}], got {list(shape)}")
        if residual is not None and residual.shape != (*shape[:-1], self.out_features):
            expected = [*shape[:-1], self.out_features]
            raise ValueError(f"SparseLinear: residual expected {expected}, got {list(residual.shape)}")
        if norm is not None:
            return self._normalised(input, residual, norm)
        return self._whole(input, residual)

    def _normalised(self, input: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> Tensor:
        """LayerNorm over what the layer gives, by the threads that finish its rows where the compiled core runs."""
        if not isinstance(norm, nn.LayerNorm):
            raise TypeError(
                f"SparseLinear: norm expected an nn.LayerNorm, got {type(norm).__name__}; apply others to the result"
            )
        gain, shift = norm.weight, norm.bias
        if gain is None or shift is None or gain.shape != (self.out_features,):
            got = f"{list(norm.normalized_shape)}{'' if gain is not None and shift is not None else ' without them'}"
            raise ValueError(
                f"SparseLinear: norm expected over [{self.out_features}] with weight and bias, got {got}; apply it to "
                "the result instead"
            )
        bias = self._parameters["bias"]
        if (
            self._parameters["low_rank_a"] is None
            and runs_direct(input, residual, bias, self._parameters["values"], gain, shift)
            and {input.dtype, gain.dtype, shift.dtype} <= native.matmul.DTYPES
            and (form := self._form(input)) != "unpacked"
        ):
            packed, after = self._packed(form), (gain, shift, norm.eps)
            return native.matmul.linear(input, packed, bias, residual, self.activation, after)
        return ops.add_layer_norm(self._whole(input, None), residual, gain, shift, norm.eps)

    def _whole(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if self._parameters["low_rank_a"] is not None:
            return self._forward_with_low_rank(input, residual)
        return self._sparse(input, residual, self.activation)

    def _forward_with_low_rank(self, input: Tensor, residual: Tensor | None) -> Tensor:
        assert self.low_rank_a is not None and self.low_rank_b is not None
        correction = F.linear(F.linear(input, self.low_rank_a), self.low_rank_b)
        if self.activation == "none" and residual is not None:
            return self._sparse(input, correction + residual, "none")
        result = _activate(self._sparse(input, correction, "none"), self.activation)
        return result if residual is None else result + residual

    def _sparse(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        parameters = self._parameters  # past nn.Module.__getattr__, which takes longer than the checks
        bias = parameters["bias"]
        if runs_direct(input, residual, bias, parameters["values"]) and input.dtype in native.matmul.DTYPES:
            form = self._form(input)
            if form == "unpacked":
                return self._unpacked(input, bias, residual, activation)
            return native.matmul.linear(input, self._packed(form), bias, residual, activation)
        return self._dispatched(input, bias, residual, activation)

    def _dispatched(self, input: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
        if not self._packs_serve(input):
            result = ops.layout_linear(input, self.to_layout(), bias, activation)
            return result if residual is None else result + residual
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (input, residual, bias, self.values)
        )
        if needs_grad or self.training:
            forward, backward = self._packed("forward"), self._packed("backward")
            return ops.trained_linear(input, self.values, forward, backward, bias, activation, residual)
        form = self._form(input)
        if form == "unpacked":
            return self._unpacked(input, bias, residual, activation)
        return ops.packed_linear(input, self._packed(form), bias, residual, activation)

    def _form(self, input: Tensor) -> str:
        """What inference multiplies `[..., K]` with: "unpacked" from ``dense_from`` rows on, below it the packed form
        whose number of tokens is nearest by ratio, "inference N".
        """
        rows = input.shape[:-1].numel()
        if self.dense_from is not None and rows >= self.dense_from:
            return "unpacked"
        for most, form in self._limits:
            if rows <= most:
                return form
        return f"inference {self.tokens[-1]}"

    def _unpacked(self, input: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
        weight = self._packed("unpacked")
        if not torch.is_autocast_enabled(input.device.type):
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        result = _activate(F.linear(input, weight, bias), activation)
        return result if residual is None else result + residual

    def _packs_serve(self, input: Tensor) -> bool:
        """True where the compiled core runs this call and its packed forms are there or may be made now."""
        if not self._core_serves() or input.device.type != "cpu" or input.dtype == torch.float64:
            return False
        if backends.forced_backend() not in (None, "native"):
            return False
        if not torch.compiler.is_compiling():
            return True
        if self.training or torch.is_grad_enabled():
            needed = ["forward", "backward"]
        else:
            needed = [f"inference {count}" for count in self.tokens] + ["unpacked"] * (self.dense_from is not None)
        return all(name in self._packs for name in needed)

    def _packed(self, purpose: str) -> Any:
        """For inference, with fresh values: the packed form "inference N" for N of ``tokens``, or "unpacked", the dense
        weight `[N, K]` with values rounded as the packed ones are. For training, structure only: "forward" and
        "backward".
        """
        stamp = None if purpose in ("forward", "backward") else self._stamp(purpose)
        found = self._packs.get(purpose)
        if found is not None and found[0] == stamp:
            return found[1]
        with _pack_lock:
            found = self._packs.get(purpose)
            if found is None or found[0] != stamp:
                found = stamp, self._pack(purpose, found[1] if found else None)
                self._packs[purpose] = found
        return found[1]

    def _pack(self, purpose: str, previous: Any) -> Any:
        with torch.no_grad():
            if purpose != "unpacked" and previous is not None:
                return ops.repack(previous, self.values.detach()).settled("values")
            layout = self.to_layout()
            if purpose == "unpacked":
                p = ops.pack(layout, tokens=self.tokens[-1], values=self.value_dtype)
                dense = reference.packed_to_dense(p.index, p.offsets, p.values, p.scale, p.plan)
                return dense.to(self.values.dtype)
            if purpose.startswith("inference"):
                packed = ops.pack(layout, tokens=int(purpose.split()[1]), values=self.value_dtype)
                return packed.settled("index", "offsets", "values")
            return ops.pack(layout, tokens=max(*self.tokens, 128), transpose=purpose == "backward")

    @property
    def packed_nbytes(self) -> int:
        """Bytes of what inference has packed so far, the unpacked weight included; 0 before the first call."""
        found = [entry for name, (_, entry) in self._packs.items() if name not in ("forward", "backward")]
        return sum(e.numel() * e.element_size() if isinstance(e, Tensor) else e.nbytes for e in found)

    def _stamp(self, purpose: str) -> tuple[Any, ...]:
        values = self._parameters["values"]
        assert values is not None
        if torch.compiler.is_compiling():  # a compiled graph holds the packed form it was traced with
            return self._packs[purpose][0] if purpose in self._packs else ()
        # The version of an inference tensor cannot be read: such a tensor counts as frozen.
        return values.data_ptr(), -1 if values.is_inference() else values._version, self.value_dtype

    def repack(self) -> None:
        """Drops what was packed: needed after a write through ``values.data``, which leaves the version counter
        alone.
        """
        with _pack_lock:
            self._packs.clear()

    def train(self, mode: bool = True) -> SparseLinear:
        super().train(mode)
        if mode and self._core_serves():
            self._packed("forward"), self._packed("backward")  # before anything is compiled
        return self

    def _core_serves(self) -> bool:
        return _native.C is not None and self.values.device.type == "cpu" and self.values.dtype != torch.float64

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, layout={self.layout}"
        text += f", blocksize={self.blocksize}" if self.blocksize else ""
        text += f", nm={self.nm[0]}:{self.nm[1]}" if self.nm else ""
        text += f", density={self.density:.4f}, bias={self.bias is not None}"
        text += f", rank={self.low_rank_a.shape[0]}" if self.low_rank_a is not None else ""
        text += f", activation={self.activation}" if self.activation != "none" else ""
        text += f", tokens={self.tokens}" if len(self.tokens) > 1 else ""
        text += f", dense from {self.dense_from} rows" if self.dense_from is not None else ""
        return text + (f", values={self.value_dtype}" if self.value_dtype != "float32" else "")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packs": {}}

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self.repack()
        return self.train(self.training)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = state_dict.get(prefix + "weight")
        if dense is not None and prefix + "values" not in state_dict:
            loaded = layouts.from_dense(dense, self.layout, self.blocksize, self.nm)
            state_dict.update({prefix + name: tensor for name, tensor in loaded.tensors().items()})
            del state_dict[prefix + "weight"]
        names = [name for name in self.to_layout().tensors() if prefix + name in state_dict]
        if "values" in names and len(names) == len(self.to_layout().tensors()):
            for name in names:
                incoming, own = state_dict[prefix + name], getattr(self, name)
                if incoming.shape != own.shape:
                    own.data = own.data.new_empty(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.to_layout().validate()
        self.repack()
        self.train(self.training)


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)
