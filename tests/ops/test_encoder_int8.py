"""Rounded activations in a program: the core against the reference, and plans that the core must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseprune import _native, layouts, ops, reference
from sparseprune import encoder_program as P
from sparseprune.native.encoder import BoundEncoder

pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")


class Made:
    """A program over int8 weights of the given shapes, and its tensors."""

    def __init__(self, *blocks: tuple[int, int, tuple[int, int]]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.tensors: list[Tensor] = []
        self.weights: list[P.Weight] = []
        for rows, columns, (r, c) in blocks:
            kept = torch.rand(rows // r, 1, columns // c, 1, generator=generator) < 0.5
            w = (torch.randn(rows // r, r, columns // c, c, generator=generator) * kept).reshape(rows, columns)
            p = ops.pack(layouts.BSR.from_dense(w, (r, c)), value_dtype="int8", activations="int8")
            places = [self.place(t) for t in (p.values, p.index, p.offsets)]
            self.weights.append(P.Weight(*places, self.place(p.scale), p.plan))

    def place(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def program(self, buffers: tuple[int, ...], *steps: P.Step) -> P.Program:
        return P.Program(buffers, tuple(self.weights), steps, 0)


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 21), (2, 130)])
def test_to_the_bit_without_transcendental_functions(tier, batch, length):
    made = Made((28, 24, (1, 4)), (24, 28, (4, 4)), (24, 24, (8, 1)))
    bias = made.place(torch.randn(28))
    program = made.program(
        (24, 28, 9, 24),
        P.Round(2, 0, 24),
        P.Linear(1, 2, 0, bias, "relu", together=True),
        P.Linear(3, 2, 2),
        P.Round(2, 1, 28),
        P.Linear(0, 2, 1, combine="add"),
        P.Linear(3, 2, 1, combine="multiply"),
        P.Linear(0, 2, 1, combine="add"),
    )
    assert P.Program.decode(*program.encode()) == program
    x = torch.randn(batch, length, 24)
    real = torch.rand(batch, length) < 0.7
    for mask in (None, real):
        expected = reference.encoder(x, mask, made.tensors, [], *program.encode())
        assert torch.equal(ops.encoder(x, mask, program, made.tensors), expected)


def test_features_from_a_row_on_and_activation(tier):
    made = Made((16, 8, (1, 4)))
    steps = P.Round(1, 0, 8, from_row=4), P.Linear(0, 1, 0, activation="gelu", to_row=2)
    program = made.program((20, 4), *steps)
    x = torch.randn(2, 19, 20)
    expected = reference.encoder(x, None, made.tensors, [], *program.encode())
    torch.testing.assert_close(ops.encoder(x, None, program, made.tensors), expected, rtol=1e-5, atol=1e-5)


REFUSED = {
    "floats read as rounded": ((24, 8), [P.Linear(0, 1, 0)], "rounded from 24"),
    "other features": ((24, 8), [P.Round(1, 0, 20), P.Linear(0, 1, 0)], "rounded from 24"),
    "rounded read as floats": ((24, 24), [P.Round(1, 0, 24), P.Norm(0, 1, 4, 4)], "reads floats from a rounded"),
    "floats written behind": ((24, 24), [P.Round(1, 0, 24), P.Norm(1, 0, 4, 4)], "writes floats to a rounded"),
    "no room": ((24, 7), [P.Round(1, 0, 24)], "with 8 features"),
    "into itself": ((24, 8), [P.Round(0, 0, 24)], "buffer of its own"),
    "no fours": ((24, 8), [P.Round(1, 0, 22)], "in fours"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_plan_that_reads_what_is_not_there_is_refused(case):
    buffers, steps, message = REFUSED[case]
    made = Made((24, 24, (1, 4)))
    made.place(torch.ones(4))
    program = made.program(buffers, *steps)
    with pytest.raises(ValueError, match=message):
        BoundEncoder(made.tensors, *program.encode())


def test_a_weight_that_does_not_fit_is_refused():
    made = Made((24, 24, (1, 4)))
    good = made.weights[0]
    steps = P.Round(1, 0, 24), P.Linear(0, 1, 0)
    for other, message in (
        (good._replace(scale=-1), "scale"),
        (good._replace(plan=good.plan._replace(columns=22)), "in fours"),
        (good._replace(plan=good.plan._replace(k_block=10)), "in fours"),
        (good._replace(values=made.place(made.tensors[good.values][:20].clone())), "values expected at least"),
        (good._replace(values=made.place(made.tensors[good.values].float())), "int8"),
        (good._replace(scale=made.place(torch.ones(24))), "scale expected at least 48"),
    ):
        made.weights = [other]
        with pytest.raises(ValueError, match=message):
            BoundEncoder(made.tensors, *made.program((24, 8), *steps).encode())
