"""The contest of one token: layers whose weights come from memory, as those of a model do between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..packing import Packed
from .contest import BASELINE, Case, Contest, Entry, close_to, generator_of
from .linear import ours_linear
from .peaks import Work
from .peers import Unavailable
from .pruned import layout_of, prune_like

__all__ = ["BYTES_IN_TURN", "build_decoding"]

#: What a contestant reads before it reads the same weight again: more than a last cache holds.
BYTES_IN_TURN = 96 << 20
#: name -> (value_dtype, activations, relative error allowed against the sum of |x||w|)
_FORMS = {
    "ours float32": ("float32", "float32", 2e-6),
    "ours bfloat16": ("bfloat16", "float32", 5e-3),
    "ours int8": ("int8", "float32", 2e-2),
    "ours int8, x int8": ("int8", "int8", 4e-2),
}


def build_decoding(case: Case, peers: Sequence[str], allow_reference: bool) -> Contest:
    """y = x W^T of ``case.tokens`` tokens, W pruned: every value type of ours beside torch float32 and bfloat16. Each
    runs on as many copies of its own weight, in turn, as make :data:`BYTES_IN_TURN`; its time is that of one.
    """
    del peers  # torch alone: the other libraries stand in the suite "linear"
    n, k = case.shape
    generator = generator_of(case)
    w = prune_like(torch.randn(n, k, generator=generator) * k**-0.5, case.structure, case.sparsity)
    x = torch.randn(case.tokens, k, generator=generator)
    truth, scale = F.linear(x.double(), w.double()), F.linear(x.double().abs(), w.double().abs())
    flops, through = 2.0 * int((w != 0).sum()) * case.tokens, 4.0 * case.tokens * (n + k)
    contest = Contest(case)

    def add(name: str, calls: list[Callable[[], Tensor]], nbytes: int, relative: float, ours: bool) -> None:
        first, work = calls[0], Work(flops, nbytes + through, in_turn=len(calls))

        def run() -> None:
            for call in calls:
                call()

        def check() -> str | None:
            return close_to(first().float(), truth, scale, relative)

        contest.entries[name] = Entry(run, check, work, flops, ours, len(calls))

    for name, dtype in ((BASELINE, torch.float32), ("torch bfloat16", torch.bfloat16)):
        nbytes = n * k * dtype.itemsize
        given = x.to(dtype)
        weights = [w.to(dtype, copy=True) for _ in range(_copies(nbytes))]
        add(name, [_dense(given, each) for each in weights], nbytes, 2e-6 if name == BASELINE else 2e-2, False)
    layout = layout_of(w, case.structure)
    for name, (values, activations, relative) in _FORMS.items():
        try:
            packed = ops.pack(layout, tokens=case.tokens, value_dtype=values, activations=activations)
            forms = [_copy(packed) for _ in range(_copies(packed.nbytes))]
            runs = [ours_linear(x, form, None, allow_reference) for form in forms]
        except Unavailable as error:
            contest.absent[name] = str(error)
            continue
        add(name, runs, packed.nbytes, relative, True)
    return contest


def _copies(nbytes: int) -> int:
    return max(2, -(-BYTES_IN_TURN // max(1, nbytes)))


def _copy(packed: Packed) -> Packed:
    """In huge pages, as a layer holds it."""
    own = replace(packed, **{name: getattr(packed, name).clone() for name in ("index", "offsets", "values")})
    return own.in_huge_pages("index", "offsets", "values")


def _dense(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, weight)
