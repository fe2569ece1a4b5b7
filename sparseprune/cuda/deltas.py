"""Very sparse weights for few tokens: a byte an entry, the distance to the column before, instead of a 32-bit index.

csrc/cuda/linear_delta.cu has the format. The structure is made once; values enter it by one gather, and stay while they
cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations import ACTIVATION_CODES
from ..device_memory import may_remember, remembered
from ..packing import DELTA_RUN, DELTA_STEP
from ._environment import DTYPE_CODES, launching, same_device
from ._tensors import address, as_dtype
from .structures import Csr, rows_of

__all__ = ["DELTA_TOKENS", "Deltas", "deltas_linear", "deltas_of", "pack_deltas"]

DELTA_TOKENS = 8
#: Entries for each kept one, steps and padding included, up to which bytes beat indices: 3 to 6 bytes in 16 bits.
MOST_GROWTH = 1.5


@dataclass(frozen=True)
class Deltas:
    """The structure of a weight `[N_out, K]`: deltas uint8 `[entries]`; starts int32 `[N_out + 1]`: where rows begin,
    in runs of 8 entries; place int32 `[entries]`: where the value of each lies among the canonical ones, -1: it has
    none.
    """

    shape: tuple[int, int]
    starts: Tensor
    deltas: Tensor
    place: Tensor

    def pay(self, entries: int) -> bool:
        """Whether bytes take less than the indices of so many kept entries."""
        return self.deltas.numel() <= MOST_GROWTH * entries + DELTA_RUN * self.shape[0]

    def filled(self, canonical: Tensor, dtype: torch.dtype) -> Tensor:
        """`[entries]` of dtype: the values, 0 where there is none."""
        flat = canonical.detach().reshape(-1)
        if flat.numel() == 0:
            return torch.zeros(self.place.numel(), dtype=dtype, device=flat.device)
        return torch.where(self.place < 0, 0, flat[self.place.clamp(min=0)]).to(dtype)


def pack_deltas(structure: Csr, columns: int) -> Deltas:
    """The structure of a valid csr weight `[N_out, columns]`."""
    crow, col, device = structure.crow, structure.col, structure.col.device
    rows, entries = crow.numel() - 1, col.numel()
    before = torch.full_like(col, -1)
    before[1:] = col[:-1]
    first = crow[:-1][crow[1:] > crow[:-1]].long()  # the first entry of each row that has one
    before[first] = -1
    gap = col - before
    steps = (gap - 1) // DELTA_STEP  # entries without a value before each
    upto = torch.zeros(entries + 1, dtype=torch.int64, device=device)
    upto[1:] = (steps + 1).cumsum(0)
    in_row = upto[crow[1:].long()] - upto[crow[:-1].long()]
    starts = torch.zeros(rows + 1, dtype=torch.int32, device=device)
    starts[1:] = ((in_row + DELTA_RUN - 1) // DELTA_RUN).cumsum(0)
    total = int(starts[-1]) * DELTA_RUN if rows else 0
    row = rows_of(crow, entries).long()
    at = starts[row].long() * DELTA_RUN + upto[1:] - 1 - upto[crow[row].long()]
    # A row's entries are steps but for its values, and nothing from its end on.
    deltas = torch.full((total,), 255, dtype=torch.uint8, device=device)
    row_of = torch.repeat_interleave(
        torch.arange(rows, device=device), (starts[1:] - starts[:-1]) * DELTA_RUN, output_size=total
    )
    beyond = torch.arange(total, device=device) - starts[row_of].long() * DELTA_RUN >= in_row[row_of]
    deltas[beyond] = 0
    deltas[at] = (gap - steps * DELTA_STEP).to(torch.uint8)
    place = torch.full((total,), -1, dtype=torch.int32, device=device)
    place[at] = torch.arange(entries, dtype=torch.int32, device=device) if structure.place is None else structure.place
    return Deltas((rows, columns), starts, deltas, place)


def deltas_of(structure: Csr, columns: int, canonical: Tensor, dtype: torch.dtype) -> tuple[Deltas, Tensor] | None:
    """(structure, values in dtype); None where csr's indices take no more, or a CUDA graph is being recorded and the
    structure was not made before.
    """
    indices = structure.crow, structure.col
    found = remembered(f"deltas {columns}", indices, lambda: pack_deltas(structure, columns))
    if found is None or not found.pay(structure.col.numel()):
        return None
    values = None
    if may_remember(canonical):
        kind = f"deltas {columns} {dtype}"
        values = remembered(kind, (*indices, canonical), lambda: found.filled(canonical, dtype))
    return found, found.filled(canonical, dtype) if values is None else values


def deltas_linear(
    x: Tensor, deltas: Deltas, values: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """x: `[..., K]`, at most 8 tokens, of the values' dtype; returns activation(x W^T + bias) `[..., N_out]`."""
    same_device("deltas_linear", x, deltas.deltas, values)
    rows, columns = deltas.shape
    flat = x.reshape(-1, columns).contiguous()
    y = x.new_empty((*x.shape[:-1], rows))
    if y.numel() == 0:
        return y
    bias = as_dtype(bias, x.dtype)
    with launching(x) as (cuda, stream):
        cuda.delta_linear(
            flat.data_ptr(), deltas.starts.data_ptr(), deltas.deltas.data_ptr(), values.data_ptr(), address(bias),
            y.data_ptr(), flat.shape[0], rows, columns, DTYPE_CODES[x.dtype], ACTIVATION_CODES[activation], stream,
        )  # fmt: skip
    return y
