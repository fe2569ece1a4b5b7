"""SparseLinear: a drop-in for ``nn.Linear`` that stores and multiplies only what pruning kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _native, layouts, native, ops
from ..activations import ACTIVATIONS, activate
from ..device_memory import may_remember, remembered
from ..packing import Packed
from ..tensor_state import note_gradients, place_of
from .direct import is_plain
from .forms import Form, Forms, check_precision
from .readonly import read_only
from .routes import Call, Route, choose_route, in_graph
from .saving import guard_saving

__all__ = ["SparseLinear"]

_NO_WRITE = (
    "SparseLinear.weight expected to be read, got a write: it is a dense copy of what the layer holds, and the write "
    "would be lost. Write to .values, take a .clone(), or call densify_(model) first (before adapters are merged, say)"
)
_NO_OTHER = (
    "SparseLinear.weight expected to be read, got another in its place: the layer holds no dense weight. Call "
    "densify_(model) first, or give the layer other weights by load_state_dict({'weight': ...}, strict=False)"
)


class SparseLinear(nn.Module):
    """y = activation(x W^T + bias + (x A^T) B^T) with W `[N, K]` in one of the sparse layouts.

    x: `[..., K]`; returns `[..., N]` in x's dtype (under autocast in that of ``F.linear``). ``values`` is a Parameter
    in the layout's own shape and trains; the structure is fixed: ``crow_indices, col_indices`` (csr, bsr) or
    ``indices`` (nm), buffers in the state dict. ``bias``, ``low_rank_a`` `[r, K]` and ``low_rank_b`` `[N, r]` are
    optional Parameters. ``weight`` is the dense `[N, K]` matrix, made on demand, read-only; gradients pass through it.

    What the kernels read is packed from ``values``, in huge pages where the system has them, and kept until they
    change, in whatever way: values that want a gradient are compared with what was packed at every call, a pass over
    their bytes. Frozen ones (``model.requires_grad_(False)``) are not, which is what decoding wants; there a write is
    noticed by the version counter, and after one that passes it by, through ``.data`` or NumPy, call :meth:`repack`. A
    load_state_dict may bring another structure of the same shape, or a dense ``weight``, which is converted to this
    layer's layout. What torch.jit.trace records multiplies with the layout's own tensors, without rounding them, so
    that the traced module may be loaded too.

    ``activation`` is part of the layer, saved with it.

    ``value_dtype`` is how the inference kernels hold the values: "float32" (exact), "bfloat16", or "int8" (one scale
    an output); with ``activations="int8"`` they round x to 8 bits too, with a scale a token. ``tokens``: the numbers of
    rows of x that packed forms are tuned for, one form each; any number of rows works, and takes the form whose number
    is nearest by ratio. ``dense_from``: inference with that many rows or more multiplies with the unpacked weight
    instead, which is kept too, dense in the dtype of ``values``; None: never.

    ValueError on a layout whose tensors do not fit each other, on a bias that is not `[N]`, on one low-rank factor
    without the other or factors of other shapes, on ``tokens`` or ``dense_from`` below 1, on an unknown ``activation``,
    ``value_dtype`` or ``activations``, and where 8-bit activations do not go with the rest.
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
        activations: str = "float32",
        tokens: int | Sequence[int] = 128,
        dense_from: int | None = None,
    ) -> None:
        super().__init__()
        guard_saving(SparseLinear)
        counts = (tokens,) if isinstance(tokens, int) else tuple(sorted(set(tokens)))
        if not counts or counts[0] < 1:
            raise ValueError(f"SparseLinear: tokens expected one or more numbers >= 1, got {tokens!r}")
        if dense_from is not None and dense_from < 1:
            raise ValueError(f"SparseLinear: dense_from expected at least 1 or None, got {dense_from}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"SparseLinear: activation expected one of {ACTIVATIONS}, got {activation!r}")
        check_precision(layout, value_dtype, activations, dense_from)
        layout.validate()
        self.out_features, self.in_features = layout.shape
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"SparseLinear: bias expected shape [{self.out_features}], got {list(bias.shape)}")
        self.layout = layout.layout
        self.blocksize = layout.blocksize if isinstance(layout, layouts.BSR) else None
        self.nm = (layout.n, layout.m) if isinstance(layout, layouts.NM) else None
        self.activation, self.value_dtype, self.activations = activation, value_dtype, activations
        self.tokens, self.dense_from = counts, dense_from
        self.values = nn.Parameter(layout.values.detach())
        for name, tensor in layout.tensors().items():
            if name != "values":
                self.register_buffer(name, tensor)
        self.register_parameter("bias", _as_parameter(bias))
        self.register_parameter("low_rank_a", None)
        self.register_parameter("low_rank_b", None)
        self._indices = tuple(name for name in layout.tensors() if name != "values")
        self._forms = Forms(value_dtype, counts, activations)
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
        linear.weight = nn.Parameter(self.dense(), requires_grad=self.values.requires_grad)
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
        self.low_rank_a, self.low_rank_b = _as_parameter(low_rank_a), _as_parameter(low_rank_b)

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

    def dense(self) -> Tensor:
        """The dense `[N, K]` weight, the low-rank term included, as a tensor of the caller's own, without history."""
        return self._dense().detach()

    def _dense(self) -> Tensor:
        dense = self.to_layout().to_dense()
        if self.low_rank_a is not None and self.low_rank_b is not None:
            kind = "cpu" if dense.is_meta else dense.device.type
            with torch.autocast(kind, enabled=False):  # a weight, whatever rounds the products around it
                dense = dense + self.low_rank_b @ self.low_rank_a
        return dense

    @property
    def weight(self) -> Tensor:
        """:meth:`dense` with the gradients of ``values`` and of the low-rank factors, made on every access, to be read:
        RuntimeError where something writes to it, since that would be lost.
        """
        dense, place = self._dense(), () if in_graph() else place_of(self.values)
        if place and dense.requires_grad:  # a step may follow that values frozen by then do not show
            dense.register_hook(lambda _: note_gradients(place))
        return read_only(dense, _NO_WRITE)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # where setting a Parameter ends, past the property
            raise AttributeError(_NO_OTHER)
        super().register_parameter(name, param)

    def held(self) -> Tensor:
        """:meth:`dense` without the low-rank term, whatever the layer still has of it."""
        return self.to_layout().to_dense().detach()

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of ``values``."""
        return self._own("values")

    def sources(self) -> tuple[Tensor, ...]:
        """The tensors that packed forms are made of, and are stale with."""
        return tuple(self.to_layout().tensors().values())

    @property
    def canonical_names(self) -> tuple[str, ...]:
        """What the tensors of the layout are called in a state dict."""
        return ("values", *self._indices)

    @property
    def nnz(self) -> int:
        """Stored weight entries, the low-rank factors included."""
        factors = (self.low_rank_a, self.low_rank_b)
        return self.values.numel() + sum(f.numel() for f in factors if f is not None)

    @property
    def density(self) -> float:
        """nnz / (N * K)."""
        return self.nnz / max(1, self.out_features * self.in_features)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, norm: nn.LayerNorm | None = None, then: str = "none"
    ) -> Tensor:
        """input: `[..., K]`; residual: `[..., N]`, added after the activation; norm: over `[N]`, with weight and bias,
        what comes last; then: the activation of this call, where the layer has none of its own; returns `[..., N]`.

        ValueError where input, residual or norm has another width, TypeError where norm is no LayerNorm.
        """
        shape = input.shape
        if not shape or shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear: input expected [..., {self.in_features}], got {list(shape)}")
        if residual is not None and residual.shape != (*shape[:-1], self.out_features):
            expected = [*shape[:-1], self.out_features]
            raise ValueError(f"SparseLinear: residual expected {expected}, got {list(residual.shape)}")
        activation = then if self.activation == "none" else self.activation
        if norm is not None:
            return self._normalised(input, residual, norm, activation)
        return self._linear(input, residual, activation)

    def _normalised(self, input: Tensor, residual: Tensor | None, norm: nn.LayerNorm, activation: str) -> Tensor:
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
        if torch.is_autocast_enabled(input.device.type):  # whose LayerNorm has dtypes of its own
            result = self._linear(input, None, activation)
            return norm(result if residual is None else result + residual)
        if self.low_rank_a is None:
            route = self.route(input, residual, gain, shift)
            if (
                route.call is Call.DIRECT
                and route.form is not None
                and not route.form.unpacked
                and {gain.dtype, shift.dtype} <= native.linear.DTYPES
            ):
                after = (gain, shift, norm.eps)
                return native.linear.linear(input, self._packed(route.form), self.bias, residual, activation, after)
        return ops.add_layer_norm(self._linear(input, None, activation), residual, gain, shift, norm.eps)

    def _linear(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        if self._own("low_rank_a") is not None:
            return self._linear_with_low_rank(input, residual, activation)
        return self._sparse(input, residual, activation)

    def _linear_with_low_rank(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        assert self.low_rank_a is not None and self.low_rank_b is not None
        correction = F.linear(F.linear(input, self.low_rank_a), self.low_rank_b)
        if activation == "none" and residual is not None:
            return self._sparse(input, correction + residual, "none")
        result = activate(self._sparse(input, correction, "none"), activation)
        return result if residual is None else result + residual

    def route(self, input: Tensor, *others: Tensor | None) -> Route:
        """The way that a call takes now; others: what else takes part, as the residual. What ``forward`` and
        :func:`explain` both ask.
        """
        return choose_route(
            input, others, self._own("values"), self._own("bias"), self._forms, self.dense_from, self.training
        )

    def _sparse(self, input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        call, form, why = self.route(input, residual)
        bias = self._own("bias")
        if call is Call.CANONICAL:
            result = ops.layout_linear(input, self.to_layout(), bias, activation)
            return result if residual is None else result + residual
        if call is Call.UNPACKED:
            return self._unpacked_on_gpu(ops.linear.autocast_input(input), bias, residual, activation)
        if call is Call.REFUSED:
            self._refuse_call(why)
        if call is Call.TRAINED or form is None:
            forward, backward = self._structure(self._forms.forward), self._structure(self._forms.backward)
            return ops.trained_linear(input, self.values, forward, backward, bias, activation, residual)
        if call is Call.INFERRED:
            structure = self._structure(form._replace(unpacked=False))
            return ops.inferred_linear(input, self.values, structure, bias, residual, activation, form.unpacked)
        if form.unpacked:
            return self._unpacked(input, bias, residual, activation, form)
        if call is Call.DIRECT:
            return native.linear.linear(input, self._packed(form), bias, residual, activation)
        return ops.packed_linear(input, self._packed(form), bias, residual, activation)

    def _refuse_call(self, why: str) -> NoReturn:
        raise RuntimeError(f"SparseLinear: {why}")

    def trained(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """input: `[..., K]`; returns `[..., N]`: the layer with the caller's ``values`` (of their shape) and bias."""
        forward, backward = self._structure(self._forms.forward), self._structure(self._forms.backward)
        return ops.trained_linear(input, values, forward, backward, bias, self.activation, None)

    def _unpacked(
        self, input: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, form: Form
    ) -> Tensor:
        weight = self._forms.dense(form, self._own("values"), self._index_tensors(), self.to_layout)
        if not torch.is_autocast_enabled(input.device.type):
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        result = activate(F.linear(input, weight, bias), activation)
        return result if residual is None else result + residual

    def _unpacked_on_gpu(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str) -> Tensor:
        def make() -> Tensor:
            return self.to_layout().to_dense().detach().to(x.dtype)

        values, weight = self._own("values"), None
        if may_remember(values):
            weight = remembered(f"dense {x.dtype}", (values, *self._index_tensors()), make)
        result = F.linear(x, make() if weight is None else weight, None if bias is None else bias.to(x.dtype))
        result = activate(result, activation)
        return result if residual is None else result + residual

    def _own(self, name: str) -> Any:
        """A parameter, past nn.Module.__getattr__, which takes longer than all checks; or what stands in its place:
        sharding and parametrisations put a plain attribute there.
        """
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _index_tensors(self) -> tuple[Tensor, ...]:
        buffers: Any = self._buffers
        return tuple([buffers[name] if name in buffers else getattr(self, name) for name in self._indices])

    def _structure(self, form: Form) -> Packed:
        # A graph holds the structure it was traced with, and takes the values anew.
        if in_graph():
            return self._forms.traced(form)
        return self._forms.structure(form, self.to_layout(), self._index_tensors())

    def _packed(self, form: Form) -> Packed:
        return self._forms.filled(form, self._own("values"), self._index_tensors(), self.to_layout)

    @property
    def packed_nbytes(self) -> int:
        """Bytes of what inference has packed so far, the unpacked weight included; 0 before the first call."""
        return self._forms.nbytes

    def repack(self) -> None:
        """Drops what was packed: needed after a write to frozen values that leaves the version counter alone, through
        ``.data`` or NumPy.
        """
        self._forms.drop()

    def train(self, mode: bool = True) -> SparseLinear:
        super().train(mode)
        self._prepare()
        return self

    def _prepare(self) -> None:
        """Packs what a training step reads, which a compiled one cannot. The values may be elsewhere, as a shard."""
        if not self.training or in_graph() or _native.C is None or not all(is_plain(t) for t in self._index_tensors()):
            return
        try:
            self._structure(self._forms.forward), self._structure(self._forms.backward)
        except ValueError:  # memory of to_empty, say, not filled yet: the call says what is wrong, if it still is
            self.repack()

    def extra_repr(self) -> str:
        text = f"{self.in_features}, {self.out_features}, layout={self.layout}"
        text += f", blocksize={self.blocksize}" if self.blocksize else ""
        text += f", nm={self.nm[0]}:{self.nm[1]}" if self.nm else ""
        text += f", density={self.density:.4f}, bias={self.bias is not None}"
        text += f", rank={self.low_rank_a.shape[0]}" if self.low_rank_a is not None else ""
        text += f", activation={self.activation}" if self.activation != "none" else ""
        text += f", tokens={self.tokens}" if len(self.tokens) > 1 else ""
        text += f", dense from {self.dense_from} rows" if self.dense_from is not None else ""
        text += f", value_dtype={self.value_dtype}" if self.value_dtype != "float32" else ""
        return text + (f", activations={self.activations}" if self.activations != "float32" else "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_saving(SparseLinear)

    def _apply(self, fn: Any, recurse: bool = True) -> SparseLinear:
        super()._apply(fn, recurse)
        self.repack()
        self._prepare()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        dense = state_dict.get(prefix + "weight")
        if dense is not None and prefix + "values" not in state_dict:
            loaded = layouts.from_dense(dense, self.layout, self.blocksize, self.nm)
            state_dict.update({prefix + name: tensor for name, tensor in loaded.tensors().items()})
            del state_dict[prefix + "weight"]
        own = self.to_layout()
        given = {name: state_dict[prefix + name] for name in own.tensors() if prefix + name in state_dict}
        if all(isinstance(t, Tensor) and not t.is_meta for t in given.values()):
            whole = len(given) == len(own.tensors())
            # Before anything is written: a layer whose tensors do not belong together would be left behind.
            fitting = {n: t for n, t in given.items() if whole or t.shape == own.tensors()[n].shape}
            incoming_layout = replace(own, **fitting)
            incoming_layout.validate() if whole else incoming_layout.validate_structure()
            for name, incoming in given.items() if whole else ():
                mine = getattr(self, name)
                if incoming.shape != mine.shape:
                    mine.data = mine.data.new_empty(incoming.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.repack()
        self._prepare()


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor)
