"""The packed form of a projection's weight: all that the stacks know of how a layer keeps its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

from ... import layouts, ops
from ...packing import Kind, Packed
from ..forms import Form, Forms, Purpose
from ..linear import SparseLinear
from ..packed_only import PackedLinear
from .recognise import Projection, UnknownLayer

__all__ = ["Generations", "exact", "is_whole", "packed_of", "rounds"]

_generation = attrgetter("generation")
_TOKENS = 128  # packed for panels of tokens, whatever the length of a call


class Generations:
    """What layers keep of their weights, as long as none was told to forget it."""

    def __init__(self, linears: Sequence[SparseLinear]) -> None:
        self._forms = [linear._forms for linear in linears]
        self._known = list(map(_generation, self._forms))

    def same(self) -> bool:
        return list(map(_generation, self._forms)) == self._known


def rounds(projection: Projection) -> bool:
    """Whether its product rounds activations."""
    return isinstance(projection.module, SparseLinear) and projection.module.activations != "float32"


@contextmanager
def exact(projections: Iterable[Projection]) -> Iterator[None]:
    """The same layers without any rounding of theirs, of weights or activations; none of them packed alone."""
    layers = {id(p.module): p.module for p in projections if isinstance(p.module, SparseLinear)}
    names = ("value_dtype", "activations", "_forms")
    held = [(vars(layer), {name: vars(layer)[name] for name in names}) for layer in layers.values()]
    for attributes, _ in held:
        forms = Forms("float32", attributes["tokens"])
        attributes.update(value_dtype="float32", activations="float32", _forms=forms)
    try:
        yield
    finally:
        for attributes, before in held:
            attributes.update(before)


def is_whole(projection: Projection) -> bool:
    """Whether it is all of a SparseLinear, whose packed form the program then shares."""
    module = projection.module
    return isinstance(module, SparseLinear) and (projection.begin, projection.end) == (0, module.out_features)


def packed_of(projection: Projection) -> Packed:
    """The outputs [begin, end) of a projection's weight, packed in groups of rows or in quads. A whole
    :class:`SparseLinear` shares the form that it multiplies with by itself.
    """
    module, begin, end = projection.module, projection.begin, projection.end
    if not isinstance(module, SparseLinear):
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        weight: Tensor = getattr(module, name)
        whole = _whole(weight.detach()[begin:end].to(torch.float32))
        return ops.pack(whole, tokens=_TOKENS).in_huge_pages("index", "values")
    if is_whole(projection):
        for form in (module._forms.largest, Form(Purpose.INFERENCE, _TOKENS)):
            packed = module._packed(form)
            if packed.plan.kind in (Kind.GROUPS, Kind.QUADS):  # those that a linear step reads
                return packed
    if isinstance(module, PackedLinear) and not module.exact:
        raise UnknownLayer("a layer that it needs in parts is kept packed, its values rounded")
    part = _rows_of(module.to_layout(), begin, end)
    packed = ops.pack(part, tokens=_TOKENS, value_dtype=module.value_dtype, activations=module.activations)
    return packed.in_huge_pages("index", "values")


def _whole(weight: Tensor) -> layouts.BSR:
    """A dense weight `[N, K]` as column blocks, zeros stored too: as many outputs at a time as divide N."""
    rows, columns = weight.shape
    height = next(h for h in (16, 8, 4, 2, 1) if rows % h == 0)
    crow = torch.arange(0, rows // height * columns + 1, columns, dtype=torch.int32)
    col = torch.arange(columns, dtype=torch.int32).repeat(rows // height)
    values = weight.view(rows // height, height, columns).transpose(1, 2).reshape(-1, height, 1)
    return layouts.BSR((rows, columns), (height, 1), crow, col, values)


def _rows_of(layout: layouts.Layout, begin: int, end: int) -> layouts.Layout:
    """The rows [begin, end) of a layout, as csr where they cut blocks apart."""
    if isinstance(layout, layouts.NM):
        return layouts.NM(
            (end - begin, layout.shape[1]), layout.n, layout.m, layout.values[begin:end], layout.indices[begin:end]
        )
    height = layout.blocksize[0] if isinstance(layout, layouts.BSR) else 1
    if begin % height or end % height:
        return layouts.from_dense(layout.to_dense()[begin:end], "csr")
    crow = layout.crow_indices[begin // height : end // height + 1]
    first, last = int(crow[0]), int(crow[-1])
    crow, col, values = crow - first, layout.col_indices[first:last], layout.values[first:last]
    shape = (end - begin, layout.shape[1])
    if isinstance(layout, layouts.BSR):
        return layouts.BSR(shape, layout.blocksize, crow, col, values)
    return layouts.CSR(shape, crow, col, values)
