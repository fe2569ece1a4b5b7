"""A packed weight: plain tensors and a plan."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._native import require_c
from .dtypes import VALUE_CODES
from .huge_pages import in_huge_pages
from .kinds import Kind
from .places import flat_positions, to_dense
from .plan import SLACK, Plan
from .quantise import quantise

__all__ = ["Packed", "check_length", "with_values"]


@dataclass(frozen=True)
class Packed:
    """A weight `[rows, columns]` in the order of its kernel, as plain tensors.

    plan: its sizes and kind; the kind's module says what index and offsets hold. perm int32 `[values]`: the flat place
    of each packed value in the canonical values, -1 in the slack. scale: float32 `[rows]`, what the values of a row are
    to be multiplied with, where they are int8; else None. stored: how many canonical values it takes, where the slack
    is not all that has no place. Forms of kind "quads" and "bitmask8" take
    activations in 8 bits.
    """

    plan: Plan
    index: Tensor
    offsets: Tensor
    perm: Tensor
    values: Tensor
    scale: Tensor | None = None
    stored: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.plan.rows, self.plan.columns

    @property
    def n_values(self) -> int:
        """How many canonical values it takes. ValueError on a kind that is not there."""
        if self.stored is not None:
            return self.stored
        if self.plan.kind in (Kind.GROUPS, Kind.BITMASK, Kind.BITMASK8):
            return self.perm.numel() - SLACK * self.plan.height
        raise ValueError(f"packing: kind expected one of {[int(kind) for kind in Kind]}, got {self.plan.kind}")

    @property
    def nbytes(self) -> int:
        """Bytes that the forward kernel reads: everything but ``perm``."""
        parts = [self.index, self.offsets, self.values, *([] if self.scale is None else [self.scale])]
        return sum(t.numel() * t.element_size() for t in parts)

    @cached_property
    def weight(self) -> Any:
        """What the compiled core reads: the addresses of these tensors, which this object keeps alive."""
        return require_c().Weight(
            self.plan,
            self.values.data_ptr(),
            VALUE_CODES[self.values.dtype],
            self.index.data_ptr(),
            self.offsets.data_ptr(),
            0 if self.scale is None else self.scale.data_ptr(),
        )

    def __reduce__(self) -> tuple:
        parts = self.index, self.offsets, self.perm, self.values  # cloned: a part may lie in memory with many others
        cloned = tuple(part.clone() for part in parts)
        _keep_for_child(cloned)
        return Packed, (self.plan, *cloned, self.scale, self.stored)

    def to_dense(self) -> Tensor:
        """The dense `[rows, columns]`, float32 or wider, that its kernel multiplies with."""
        return to_dense(self.index, self.offsets, self.values, self.scale, self.plan)

    def kept(self) -> Tensor:
        """bool `[rows, columns]`: where the canonical values lie. Of quads, whose fours are filled, the non-zeros."""
        if self.plan.kind == Kind.QUADS:
            return self.to_dense() != 0
        found = torch.zeros(self.plan.rows * self.plan.columns, dtype=torch.bool, device=self.index.device)
        found[flat_positions(self.index, self.offsets, self.plan)] = True
        return found.view(self.shape)

    def without_places(self) -> Packed:
        """The same weight without ``perm``: it multiplies, and takes no other values."""
        return replace(self, perm=self.perm.new_empty(0), stored=self.n_values)

    def in_huge_pages(self, *names: str) -> Packed:
        """The same weight, these of its tensors in huge pages."""
        moved: dict[str, Any] = {name: in_huge_pages(getattr(self, name)) for name in names}
        return replace(self, **moved)

    def tensors(self) -> dict[str, Tensor]:
        found = {"index": self.index, "offsets": self.offsets, "perm": self.perm, "values": self.values}
        return found if self.scale is None else {**found, "scale": self.scale}


def _keep_for_child(tensors: tuple[Tensor, ...]) -> None:
    """While the arguments of a process that is being started are pickled: keeps these as long as the process. It is
    started after that, and handed the files that their memory is then in.
    """
    context: Any = sys.modules.get("multiprocessing.context")  # without it no process is being started
    starting = None if context is None else context.get_spawning_popen()
    if starting is not None:
        starting.__dict__.setdefault("_sparseprune_kept", []).append(tensors)


def check_length(op: str, values: Tensor, packed: Packed) -> None:
    """ValueError unless there are as many canonical values as the structure takes."""
    if values.numel() != packed.n_values:
        raise ValueError(
            f"{op}: values expected {packed.n_values} entries, as many as the structure keeps, got {values.numel()}; "
            "load values and indices together, or make a new SparseLinear"
        )


def with_values(packed: Packed, values: Tensor, gather: Callable[..., Tensor]) -> Packed:
    """The same structure with these canonical values (any shape); int8 ones with one scale an output. ``gather``: the
    op ``gather_values`` of whoever asks. ValueError unless the structure takes as many values.
    """
    check_length("pack", values, packed)
    if packed.values.dtype != torch.int8:
        return replace(packed, values=gather(values.detach(), packed.perm, packed.values.dtype))
    exact = gather(values.detach(), packed.perm, torch.float32)
    narrow, scale = quantise(exact, packed.index, packed.offsets, packed.plan)
    return replace(packed, values=narrow, scale=scale)
