"""Programs over whole sequences, made and run both ways."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseprune import encoder_program as P
from sparseprune import layouts, ops, reference
from sparseprune.native.encoder import BoundEncoder

HIDDEN, HEADS, DEPTH, FFN = 20, 2, 6, 33


class Maker:
    """Collects the tensors and weights of a program."""

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: list[Tensor] = []
        self.weights: list[P.Weight] = []

    def tensor(self, t: Tensor) -> int:
        self.tensors.append(t)
        return len(self.tensors) - 1

    def vector(self, size: int) -> int:
        return self.tensor(torch.randn(size, generator=self.generator))

    def weight(
        self, rows: int, columns: int, layout: str = "csr", values: str = "float32", density: float = 0.5
    ) -> int:
        w = torch.randn(rows, columns, generator=self.generator) / columns**0.5
        if layout.startswith("bsr"):
            height = int(layout.removeprefix("bsr"))
            kept = torch.rand(rows // height, 1, columns, generator=self.generator) < density
            held = layouts.from_dense((w.view(-1, height, columns) * kept).view(rows, columns), "bsr", (height, 1))
        else:
            held = layouts.from_dense(w * (torch.rand(w.shape, generator=self.generator) < density), "csr")
        p = ops.pack(held, value_dtype=values)
        scale = -1 if p.scale is None else self.tensor(p.scale)
        places = [self.tensor(t) for t in (p.values, p.index, p.offsets)]
        self.weights.append(P.Weight(*places, scale, p.plan))
        return len(self.weights) - 1

    def program(self, steps: list[P.Step], buffers: tuple[int, ...], result: int = 0) -> P.Program:
        return P.Program(buffers, tuple(self.weights), tuple(steps), result)


def run(made: Maker, program: P.Program, x: Tensor, real: Tensor | None, tables=()) -> tuple[Tensor, Tensor]:
    """(through the core, by the reference)."""
    expected = reference.encoder(x, real, made.tensors, list(tables), *program.encode())
    return ops.encoder(x, real, program, made.tensors, tables), expected


def agree(made: Maker, program: P.Program, tables=(), batch: int = 3, length: int = 11, **tolerance: float) -> None:
    x = torch.randn(batch, length, program.buffers[0], generator=made.generator)
    real = torch.rand(batch, length, generator=made.generator) < 0.7
    for mask in (None, real, torch.ones_like(real)):
        found, expected = run(made, program, x, mask, tables)
        torch.testing.assert_close(found, expected, rtol=tolerance.get("tol", 1e-4), atol=tolerance.get("tol", 2e-5))
        if mask is not None:
            assert not found[~mask].any()


def layer(made: Maker, **attention) -> tuple[list[P.Step], tuple[int, ...]]:
    """Post-norm attention and feed-forward."""
    width = HEADS * DEPTH
    steps: list[P.Step] = [
        P.Linear(1, 0, made.weight(width, HIDDEN), made.vector(width), to_row=i * width, together=i < 2)
        for i in range(3)
    ]
    steps += [
        P.Attention(2, 1, HEADS, HEADS, DEPTH, 0, width, 2 * width, DEPTH**-0.5, **attention),
        P.Linear(0, 2, made.weight(HIDDEN, width), made.vector(HIDDEN), combine="add"),
        P.Norm(0, 0, HIDDEN, made.vector(HIDDEN), made.vector(HIDDEN), 1e-5),
        P.Linear(3, 0, made.weight(FFN, HIDDEN), made.vector(FFN), "gelu"),
        P.Linear(0, 3, made.weight(HIDDEN, FFN), made.vector(HIDDEN), combine="add"),
        P.Norm(0, 0, HIDDEN, made.vector(HIDDEN), made.vector(HIDDEN), 1e-12),
    ]
    return steps, (HIDDEN, 3 * width, width, FFN)


def bad(change) -> None:
    made = Maker()
    steps, buffers = layer(made)
    steps, buffers, result = change(made, steps, buffers) or (steps, buffers, 0)
    program = P.Program(tuple(buffers), tuple(made.weights), tuple(steps), result)
    with pytest.raises(ValueError):
        BoundEncoder([t.contiguous() for t in made.tensors], *program.encode())
