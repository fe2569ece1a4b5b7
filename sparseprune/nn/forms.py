"""What a SparseLinear has packed of its weight, and when that is stale."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import layouts, ops
from ..ops.packing import structure_of_layout
from ..packing import ACTIVATION_DTYPES, VALUE_DTYPES, Packed, why_not_quads
from ..tensor_state import Cached

__all__ = ["Form", "Forms", "Purpose", "check_precision"]

_TRAINING_TOKENS = 128  # at least, of the forms that training reads


class Purpose(StrEnum):
    """What a form is for. Those of training hold the structure only: values enter them at every step."""

    INFERENCE = "inference"
    FORWARD = "forward"
    BACKWARD = "backward"


class Form(NamedTuple):
    """One way in which a weight is held: for what, the number of tokens it is tuned for, and whether it is
    ``unpacked``, the dense weight that is made of the packed one.
    """

    purpose: Purpose
    tokens: int
    unpacked: bool = False


class Forms:
    """The forms of one layer. Each is asked for with the tensors it is made of and is made again where they have
    changed, unseen or not: :mod:`sparseprune.tensor_state` says how that is known. Copies and pickles are empty.

    value_dtype, activations: of those for inference; tokens: rising numbers of rows of x, one packed form each.
    """

    def __init__(self, value_dtype: str, tokens: tuple[int, ...], activations: str = "float32") -> None:
        self.value_dtype, self.tokens, self.activations = value_dtype, tokens, activations
        self._structures: dict[Form, Cached[Packed]] = {}
        self._filled: dict[Form, Cached[Packed]] = {}
        self._dense: dict[Form, Cached[Tensor]] = {}
        self._limits = [  # (most rows, form); more rows take the largest
            (math.isqrt(small * large), Form(Purpose.INFERENCE, small)) for small, large in itertools.pairwise(tokens)
        ]
        self.largest = Form(Purpose.INFERENCE, tokens[-1])
        self.unpacked = self.largest._replace(unpacked=True)
        self.forward, self.backward = (
            Form(purpose, max(*tokens, _TRAINING_TOKENS)) for purpose in (Purpose.FORWARD, Purpose.BACKWARD)
        )
        #: How often everything was forgotten: what others made of these forms is stale with them.
        self.generation = 0

    def for_rows(self, rows: int) -> Form:
        """The packed form whose number of tokens is nearest by ratio; the largest for a number that is left open, as
        torch.export leaves it: a comparison would hold the program to one side of it.
        """
        for most, form in self._limits if type(rows) is int else ():
            if rows <= most:
                return form
        return self.largest

    @property
    def for_inference(self) -> tuple[Form, ...]:
        """Every form that inference may take."""
        return (*(form for _, form in self._limits), self.largest, self.unpacked)

    def structure(self, form: Form, layout: layouts.Layout, indices: tuple[Tensor, ...]) -> Packed:
        """The packed structure, its values of no meaning. indices: the tensors of the layout but ``values``. ValueError
        on indices that a kernel must not see.
        """
        cached = self._structures.setdefault(form, Cached())
        return cached.of(indices, lambda: _pack(form, layout, self.value_dtype, self.activations))

    def filled(
        self, form: Form, values: Tensor, indices: tuple[Tensor, ...], layout: Callable[[], layouts.Layout]
    ) -> Packed:
        """The packed form with these values."""
        cached = self._filled.get(form) or self._filled.setdefault(form, Cached())

        def make() -> Packed:
            with torch.no_grad():
                return ops.refill(self.structure(form, layout(), indices), values).in_huge_pages("values")

        return cached.of((values, *indices), make)

    def dense(
        self, form: Form, values: Tensor, indices: tuple[Tensor, ...], layout: Callable[[], layouts.Layout]
    ) -> Tensor:
        """The dense weight `[N, K]` in the dtype of values, rounded as the packed form is."""
        cached = self._dense.get(form) or self._dense.setdefault(form, Cached())

        def make() -> Tensor:
            with torch.no_grad():
                return ops.refill(self.structure(form, layout(), indices), values).to_dense().to(values.dtype)

        return cached.of((values, *indices), make)

    def known(self, *forms: Form) -> bool:
        """Whether the structures of all of these are there."""
        return all(form in self._structures and self._structures[form].made is not None for form in forms)

    def traced(self, form: Form) -> Packed:
        """The structure as a compiled graph may hold it; one that is :meth:`known`."""
        found = self._structures[form].made
        assert found is not None
        return found

    @property
    def used(self) -> set[Form]:
        """What inference has made so far."""
        return {form for cached in (self._filled, self._dense) for form in cached}

    @property
    def nbytes(self) -> int:
        """Bytes of what inference has made so far."""
        packed = [cached.made for cached in self._filled.values()]
        dense = [cached.made for cached in self._dense.values()]
        return sum(p.nbytes for p in packed if p is not None) + sum(d.nbytes for d in dense if d is not None)

    def tensors(self) -> list[Tensor]:
        """Everything that is held: what kernels read, where values enter it, and unpacked weights."""
        found = [cached.made for made in (self._structures, self._filled) for cached in made.values()]
        dense = [cached.made for cached in self._dense.values()]
        parts = [tensor for packed in found if packed is not None for tensor in packed.tensors().values()]
        return [*parts, *(tensor for tensor in dense if tensor is not None)]

    def drop(self) -> None:
        """Forgets everything."""
        self.generation += 1
        for made in (self._structures, self._filled, self._dense):
            made.clear()

    def __reduce__(self) -> tuple:
        return type(self), (self.value_dtype, self.tokens, self.activations)


def _pack(form: Form, layout: layouts.Layout, value_dtype: str, activations: str) -> Packed:
    with torch.no_grad():
        if form.purpose is not Purpose.INFERENCE:
            transpose = form.purpose is Purpose.BACKWARD
            return structure_of_layout(layout, form.tokens, torch.float32, transpose=transpose)
        structure = structure_of_layout(layout, form.tokens, VALUE_DTYPES[value_dtype], activations=activations)
        return structure.in_huge_pages("index", "offsets")


def check_precision(layout: layouts.Layout, value_dtype: str, activations: str, dense_from: int | None) -> None:
    """ValueError unless inference can hold values of this layout so, and take activations so."""
    if value_dtype not in VALUE_DTYPES:
        raise ValueError(f"SparseLinear: value_dtype expected one of {tuple(VALUE_DTYPES)}, got {value_dtype!r}")
    if activations not in ACTIVATION_DTYPES:
        raise ValueError(f"SparseLinear: activations expected one of {ACTIVATION_DTYPES}, got {activations!r}")
    if activations != "int8":
        return
    if value_dtype != "int8":
        raise ValueError(f"SparseLinear: activations='int8' expected value_dtype='int8', got {value_dtype!r}")
    if dense_from is not None:
        raise ValueError(f"SparseLinear: activations='int8' has no dense_from, got {dense_from}")
    reason = why_not_quads(layout.shape)
    if reason is not None:
        raise ValueError(f"SparseLinear: activations='int8' {reason}; use activations='float32'")
