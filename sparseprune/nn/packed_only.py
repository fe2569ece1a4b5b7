"""PackedLinear: a SparseLinear of which only the packed forms are left, the ones that inference multiplies with."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from .. import _native, layouts, native, ops
from ..cuda import why_not_cuda
from ..device_memory import forget_gone
from ..packing import Kind, Packed
from .direct import is_plain
from .forms import Form, Purpose
from .linear import SparseLinear
from .readonly import read_only
from .routes import GRADIENT, Call, Route, choose_packed_route

__all__ = ["KEEP", "PLAIN", "PackedLinear", "give_back", "keep_packed_", "why_not_keep", "without_canonical"]

KEEP = ("canonical", "packed")

_PROGRAM_TOKENS = 128  # what programs of whole stacks have their weights packed for
_UNPACKED = frozenset({"values", "weight", "crow_indices", "col_indices", "indices"})  # made when asked for
_left_out: ContextVar[bool] = ContextVar("sparseprune_canonical_left_out", default=False)


class PackedLinear(SparseLinear):
    """What ``sparsify_(model, keep="packed")`` makes of a :class:`SparseLinear`: for inference, in the bytes of the
    packed form. ``values`` and the indices are no parameter and no buffers any more.

    Where the packed form holds every canonical value as it was (``exact``), they are unpacked from it, to the bit, by
    whatever asks for them: ``state_dict``, ``save``, ``densify_``, ``to(dtype)``, ``values``, ``weight``. Where it
    rounded them that is a RuntimeError, but for what rounds to the same values anyway: ``save(value_dtype="bfloat16")``
    and ``to(torch.bfloat16)`` of values held in bfloat16. A call that needs a gradient is a RuntimeError, and so is,
    where values were rounded, a call that no packed form serves, as one in float64. On another device it is packed
    anew, on an NVIDIA GPU as strips, deltas or csr (docs/gpu.md) in the dtype of the values whatever ``value_dtype``;
    where no kernel could read it, RuntimeError.
    """

    _kept: _Kept

    @property
    def exact(self) -> bool:
        """Whether it holds every canonical value as it was."""
        return self._kept.exact

    def to_layout(self) -> layouts.Layout:
        """The canonical layout, unpacked: tensors of the caller's own. RuntimeError where the packed form rounded."""
        if not self.exact:
            self._refuse("exact values")
        return self._unpacked_layout()

    def layout_to_save(self, value_dtype: str) -> layouts.Layout:
        """:meth:`to_layout` for a file that stores values so: rounding to the same as before changes nothing."""
        return self._unpacked_layout() if self.why_not_save(value_dtype) is None else self.to_layout()

    def why_not_save(self, value_dtype: str) -> str | None:
        """Why no file can hold this layer with values of this dtype."""
        if self.exact or (self._kept.as_bfloat16 and value_dtype == "bfloat16"):
            return None
        return self._lost("exact values")

    def held(self) -> Tensor:
        return self._any().to_dense().to(self.like.dtype)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        return read_only(self.to_layout().values, _no_write("values"))

    @property
    def weight(self) -> Tensor:
        return read_only(self.dense(), _no_write("weight"))

    @property
    def crow_indices(self) -> Tensor:  # type: ignore[override]
        return self._index("crow_indices")

    @property
    def col_indices(self) -> Tensor:  # type: ignore[override]
        return self._index("col_indices")

    @property
    def indices(self) -> Tensor:  # type: ignore[override]
        return self._index("indices")

    @property
    def like(self) -> Tensor:
        return self._kept.like

    def sources(self) -> tuple[Tensor, ...]:
        return ()

    @property
    def nnz(self) -> int:
        factors = (self.low_rank_a, self.low_rank_b)
        return self._kept.stored + sum(f.numel() for f in factors if f is not None)

    def route(self, input: Tensor, *others: Tensor | None) -> Route:
        route = choose_packed_route(input, others, self._own("bias"), self._forms, self.like)
        if route.call is Call.CANONICAL and not self.exact:
            return Route(Call.REFUSED, None, route.why)
        return route

    def trained(self, input: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        self._refuse_call(GRADIENT)

    @property
    def packed(self) -> tuple[Packed, ...]:
        """The forms that are held, each once."""
        return tuple({id(p): p for p in self._kept.forms.values()}.values())

    @property
    def packed_nbytes(self) -> int:
        return sum(p.nbytes for p in self.packed)

    def repack(self) -> None:
        """Nothing: there is nothing that these forms could be stale with."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, keep=packed"

    def _packed(self, form: Form) -> Packed:
        return self._kept.forms.get(form) or self._any()

    def _any(self) -> Packed:
        return self._kept.any()

    def _index(self, name: str) -> Tensor:
        if name not in self._indices:
            raise AttributeError(f"a SparseLinear of layout {self.layout} has no {name}")
        if not self._kept.same_places:
            self._refuse("exact values")
        return read_only(self._unpacked_layout().tensors()[name], _no_write(name))  # right whatever was rounded

    def _unpacked_layout(self) -> layouts.Layout:
        return _unpacked(self, self._any(), self.like.dtype)

    def _structure(self, form: Form) -> Packed:
        self._refuse("another packed form")

    def _prepare(self) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _UNPACKED:
            self._refuse(f"another {name}", self._elsewhere())
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _UNPACKED:
            self._refuse(f"its {name} to go", self._elsewhere())
        super().__delattr__(name)

    def _refuse(self, what: str, remedy: str = "") -> NoReturn:
        raise RuntimeError(self._lost(what, remedy))

    def _refuse_call(self, why: str) -> NoReturn:
        if why == GRADIENT:
            remedy = f"model.requires_grad_(False) or torch.no_grad() for inference; to train, {self._elsewhere()}"
            self._refuse("a gradient", remedy)
        remedy = f"pass x in float32, bfloat16 or float16 on the device of the weight, or {self._elsewhere()}"
        self._refuse(f"a product that no packed form computes ({why})", remedy)

    def _elsewhere(self) -> str:
        """How to come by a layer that has its canonical tensors."""
        return "densify_(model) first" if self.exact else "load the file that the model came from with keep='canonical'"

    def _lost(self, what: str, remedy: str = "") -> str:
        if not remedy and self._kept.as_bfloat16:
            remedy = "save(model, path, value_dtype='bfloat16') writes what it would have before; or keep the file"
        elif not remedy:
            remedy = "keep the file that the model came from, or save(model, path) before sparsify_"
        return (
            f"a SparseLinear [{self.out_features}, {self.in_features}] with keep='packed' expected to be run, was "
            f"asked for {what}, and holds its weight packed in {self.value_dtype} alone; {remedy}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        like = self.like
        asked = fn(like)
        why = [] if asked.device.type == "cpu" else why_not_cuda(asked)
        if why:
            self._refuse(f"its weight on {asked.device} ({'; '.join(why)})", self._elsewhere())
        if asked.dtype not in native.linear.DTYPES:
            remedy = f"float32, bfloat16 or float16, or {self._elsewhere()}"
            self._refuse(f"{asked.dtype}, in which no packed form multiplies", remedy)
        if asked.dtype != like.dtype or asked.device != like.device:
            if not (self.exact or (self._kept.as_bfloat16 and asked.dtype == torch.bfloat16)):
                self._refuse(f"its values in {asked.dtype} on {asked.device}")
            layout = self._unpacked_layout()
            moved: dict[str, Any] = {name: tensor.to(asked.device) for name, tensor in layout.tensors().items()}
            moved["values"] = moved["values"].to(asked.dtype)
            self._kept = _pack(self, replace(layout, **moved), self._kept.program)
            self._forms.drop()  # what a program made of it is stale
        nn.Module._apply(self, fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not _left_out.get():
            destination.update({prefix + name: tensor for name, tensor in self.to_layout().tensors().items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        given = [prefix + name for name in (*self.canonical_names, "weight") if prefix + name in state_dict]
        if given:
            errors.append(
                f"{prefix[:-1]}: a SparseLinear with keep='packed' expected no new values, got {given[0]}; load into "
                "the original architecture"
            )
        rest = {name: tensor for name, tensor in state_dict.items() if name not in given}
        nn.Module._load_from_state_dict(self, rest, prefix, metadata, strict, missing, unexpected, errors)


def _no_write(name: str) -> str:
    return (
        f"SparseLinear.{name} expected to be read, got a write: with keep='packed' it is a copy made of the packed "
        "form, and the write would be lost; take a .clone(), or densify_(model) first"
    )


class _Kept(NamedTuple):
    """``forms``: by call; ``program``: whether they are for one; ``like``: empty, in dtype and on device of the values;
    ``stored``: how many these were. What can be had again: the indices (``same_places``), the values (``exact``), or
    these rounded to bfloat16.
    """

    forms: dict[Form, Packed]
    program: bool
    like: Tensor
    stored: int
    same_places: bool
    exact: bool
    as_bfloat16: bool

    def any(self) -> Packed:
        return next(iter(self.forms.values()))


def _pack(layer: SparseLinear, layout: layouts.Layout, program: bool) -> _Kept:
    """The forms that a layer of this layout keeps. The layer stays as it is."""
    made: dict[Form, Packed] = {}
    on_gpu = layout.values.device.type == "cuda"

    def packed(form: Form) -> Packed:
        if form not in made and on_gpu:
            found = ops.pack_for_gpu(layout, form.tokens)
            made[form] = next((p for p in made.values() if p.plan == found.plan), found)
        if form not in made:
            found = ops.pack(layout, form.tokens, layer.value_dtype, activations=layer.activations)
            made[form] = found.without_places().in_huge_pages("index", "offsets", "values")
        return made[form]

    every = [form for form in layer._forms.for_inference if not form.unpacked]
    largest, other = layer._forms.largest, Form(Purpose.INFERENCE, _PROGRAM_TOKENS)
    if program and not on_gpu:  # whose steps read no bits
        form = largest if packed(largest).plan.kind in (Kind.GROUPS, Kind.QUADS) else other
        held = {each: packed(form) for each in (*every, other)}
    else:
        held = {each: packed(each) for each in ((*every, other) if program else every)}
    values = layout.values.detach()
    found = _unpacked(layer, next(iter(held.values())), values.dtype)
    same = all(torch.equal(a, b) for a, b in zip(_indices(found), _indices(layout)))
    rounded = values.to(torch.bfloat16)
    lost = bool(((rounded == 0) & (values != 0)).any())  # which a file rounds to something else
    as_bfloat16 = same and not lost and _same_bits(found.values, rounded.to(values.dtype))
    exact = same and _same_bits(found.values, values)
    return _Kept(held, program, values.new_empty(0), values.numel(), same, exact, as_bfloat16)


def _unpacked(layer: SparseLinear, packed: Packed, dtype: torch.dtype) -> layouts.Layout:
    return ops.unpack(packed, layer.layout, layer.blocksize, layer.nm, dtype)


#: The classes whose forward is known: a subclass may do anything.
PLAIN = (SparseLinear, PackedLinear)


def _indices(layout: layouts.Layout) -> list[Tensor]:
    return [tensor for name, tensor in layout.tensors().items() if name != "values"]


def _same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether they are equal, zeros of two signs unequal, NaN equal to itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return left.shape == right.shape and torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


def why_not_keep(layer: SparseLinear) -> str | None:
    """Why the canonical tensors of a layer have to stay."""
    values = layer.like
    if isinstance(layer, PackedLinear):
        return None
    on_gpu = values.device.type == "cuda"
    if on_gpu and (reasons := why_not_cuda(values)):
        return "; ".join(reasons)
    if not on_gpu and _native.C is None:
        return _native.why_no_c() or "the compiled core is missing"
    if (not on_gpu and not is_plain(values)) or values.dtype == torch.float64:
        return f"packs plain tensors up to float32, got {type(values).__name__}, {values.dtype} on {values.device}"
    if values.requires_grad:
        return "its values want a gradient; model.requires_grad_(False) first"
    return None


def keep_packed_(layer: SparseLinear, program: bool = False) -> PackedLinear:
    """Makes a layer, in place, one that keeps its packed forms alone; one form for each number of ``tokens``, or, for a
    layer that a ``program`` runs, the one form that it reads. ``dense_from`` ends: there is no dense copy. ValueError
    where that cannot be.
    """
    if isinstance(layer, PackedLinear):
        return layer
    why = why_not_keep(layer)
    if why is not None:
        raise ValueError(f"keep='packed': {why}")
    layer._forms.drop()
    kept = _pack(layer, layer.to_layout(), program)  # before anything goes: it may find no memory
    del layer._parameters["values"]
    for name in layer._indices:
        del layer._buffers[name]
    layer.dense_from = None
    layer.__class__ = PackedLinear
    assert isinstance(layer, PackedLinear)
    layer._kept = kept
    return layer


def give_back() -> None:
    """Returns freed memory to the system, where the C library can: packing frees arrays as large as the weight between
    small ones that stay, and the heap would grow with every layer. And what was made on a GPU of weights that are gone.
    """
    forget_gone()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def without_canonical() -> Iterator[None]:
    """Within it state dicts leave out what would have to be unpacked."""
    token = _left_out.set(True)
    try:
        yield
    finally:
        _left_out.reset(token)
