"""The op prompt, and the steps of decoders over whole sequences: through the compiled core against plain torch."""

from __future__ import annotations

import pytest
import torch
from programs import HIDDEN, Maker, agree, bad, run
from torch import Tensor

from sparseprune import _native, ops, reference
from sparseprune import encoder_program as P
from sparseprune.native.encoder import BoundEncoder

pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")

SIZES = [(1, 1), (1, 17), (5, 9), (2, 64), (3, 65), (1, 200), (9, 3), (2, 130)]


def layer(made: Maker, heads: int, kv: int, depth: int, beside: bool = False, turned: int | None = None):
    """Attention of a decoder layer; beside: a head's query, key and value lie beside each other."""
    width, step = (heads + 2 * kv) * depth, 3 * depth if beside else depth
    rows = (0, depth, 2 * depth) if beside else (0, heads * depth, (heads + kv) * depth)
    turned = depth if turned is None else turned
    steps: list[P.Step] = [P.Linear(1, 0, made.weight(width, HIDDEN), made.vector(width))]
    if turned:
        steps += [
            P.Rotary(1, n, turned, 0, row, each=True, every=step, together=True)
            for n, row in ((heads, rows[0]), (kv, rows[1]))
        ]
    steps += [
        P.Keep(1, kv, depth, rows[1], rows[2], 1, step, together=True),
        P.Attention(2, 1, heads, kv, depth, *rows, depth**-0.5, every=step, causal=True),
        P.Linear(0, 2, made.weight(HIDDEN, heads * depth), combine="add"),
    ]
    return steps, (HIDDEN, width, heads * depth)


def places(batch: int, length: int, turned: int, made: Maker) -> list[Tensor]:
    angle = torch.rand(batch, length, turned // 2, generator=made.generator).repeat(1, 1, 2) * 6
    return [angle.cos(), angle.sin()]


def empty(batch: int, kv: int, room: int, depth: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of two layers, the second of which is used; they hold what nobody may write over."""
    keys, values = ([torch.full((batch, kv, room, depth), 7.0) for _ in range(2)] for _ in range(2))
    return keys, values


@pytest.mark.parametrize("batch, length", SIZES)
@pytest.mark.parametrize("padded", [False, True])
def test_a_layer_and_its_cache(batch, length, padded, tier):
    made = Maker()
    steps, buffers = layer(made, 4, 2, 6)
    program = made.program(steps, buffers)
    x = torch.randn(batch, length, HIDDEN, generator=made.generator)
    real = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        for b in range(batch):
            real[b, : b * length // batch] = False
    tables = places(batch, length, 6, made)
    for room in (length, length + 3):
        mine, theirs = empty(batch, 2, room, 6), empty(batch, 2, room, 6)
        found = ops.prompt(x, real, *mine, program, made.tensors, tables)
        expected = reference.prompt(x, real, *theirs, made.tensors, tables, *program.encode())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        for a, b in zip([*mine[0], *mine[1]], [*theirs[0], *theirs[1]]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        written = real[:, None, :, None].expand(batch, 2, length, 6)
        assert not bool((mine[0][1][:, :, :length] == 7)[written].any())
        assert bool((mine[0][1][:, :, :length] == 7)[~written].all()) and bool((mine[0][1][:, :, length:] == 7).all())
        assert bool((mine[0][0] == 7).all()) and bool((mine[1][0] == 7).all())
    nothing = ops.prompt(x, real, [], [], program, made.tensors, tables)
    torch.testing.assert_close(nothing, found)


@pytest.mark.parametrize("heads, kv, depth", [(4, 2, 8), (4, 1, 5), (3, 3, 64), (1, 1, 2), (9, 3, 16)])
@pytest.mark.parametrize("length", [7, 150])
def test_heads(heads, kv, depth, length, tier):
    made = Maker()
    steps, buffers = layer(made, heads, kv, depth, turned=depth // 2 * 2 if depth != 64 else 16)
    program = made.program(steps, buffers)
    agree(made, program, places(3, length, steps[1].depth, made), length=length)


@pytest.mark.parametrize("turned", [0, 4, 10])
def test_heads_whose_three_lie_beside_each_other(turned, tier):
    made = Maker()
    steps, buffers = layer(made, 3, 3, 10, beside=True, turned=turned)
    agree(made, made.program(steps, buffers), places(3, 70, turned, made) if turned else [], length=70)


def test_a_token_does_not_see_what_comes_behind_it(tier):
    """To the bit: what stands behind is not multiplied with zero, so that a NaN there reaches no one."""
    made = Maker()
    steps, buffers = layer(made, 4, 2, 6)
    program, tables = made.program(steps, buffers), places(1, 131, 6, made)
    x = torch.randn(1, 131, HIDDEN, generator=made.generator)
    whole = ops.prompt(x, None, [], [], program, made.tensors, tables)
    for n in (1, 63, 64, 100):
        other = x.clone()
        other[:, n:] = 9
        changed = ops.prompt(other, None, [], [], program, made.tensors, tables)
        torch.testing.assert_close(changed[:, :n], whole[:, :n], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(changed[:, n:], whole[:, n:])


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, HIDDEN), (16, 8), (45, 300), (64, 256), (33, 520)])
@pytest.mark.parametrize("combine", P.COMBINE)
def test_dense_weights(values, rows, columns, combine, tier):
    made = Maker()
    w = torch.randn(rows, columns, generator=made.generator) / columns**0.5
    scale = -1
    if values == "int8":
        step = w.abs().amax(1).clamp_min(1e-9) / 127
        scale, w = made.tensor(step), (w / step.unsqueeze(1)).round().to(torch.int8)
    made.weights.append(P.Weight(made.tensor(w.to(getattr(torch, values))), -1, -1, scale, P.whole_plan(rows, columns)))
    steps = [
        P.Linear(1, 0, 0, made.vector(rows)),
        P.Linear(1, 0, 0, made.vector(rows), "relu", combine),
        P.Linear(1, 0, 0, -1, combine=combine),
    ]
    for length in (1, 20, 70):
        agree(made, made.program(steps, (columns, rows), 1), length=length, tol=2e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_long_sequence_is_shared(threads):
    made = Maker()
    steps, buffers = layer(made, 4, 2, 6)
    program, tables = made.program(steps, buffers), places(1, 1100, 6, made)
    x, before = torch.randn(1, 1100, HIDDEN, generator=made.generator), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found, expected = run(made, program, x, None, tables)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)


def test_opcheck():
    made = Maker()
    steps, buffers = layer(made, 4, 2, 6)
    keys, values = empty(2, 2, 5, 6)
    arguments = (
        torch.randn(2, 5, HIDDEN), torch.ones(2, 5, dtype=torch.bool), keys, values, made.tensors,
        places(2, 5, 6, made), *made.program(steps, buffers).encode(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.sparseprune.prompt, arguments)


def test_encode_and_decode_are_inverse():
    made = Maker()
    program = made.program(*layer(made, 4, 2, 6))
    assert P.Program.decode(*program.encode()) == program


def test_refusals():
    made = Maker()
    steps, buffers = layer(made, 4, 2, 6)
    program, tables = made.program(steps, buffers), places(2, 5, 6, made)
    x, (keys, values) = torch.randn(2, 5, HIDDEN), empty(2, 2, 5, 6)
    with pytest.raises(ValueError, match="as many keys as values, got 1 and 2"):
        ops.prompt(x, None, keys[:1], values, program, made.tensors, tables)
    with pytest.raises(ValueError, match="keys expected of more than 1 layers, got 1"):
        ops.prompt(x, None, keys[:1], values[:1], program, made.tensors, tables)
    for wrong in (torch.zeros(2, 2, 4, 6), torch.zeros(2, 1, 5, 6), torch.zeros(2, 2, 5, 6, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"values expected float32 \[2, 2, 5 or more, 6\], got"):
            ops.prompt(x, None, keys, [values[0], wrong], program, made.tensors, tables)
    with pytest.raises(RuntimeError, match="prompt has no gradient"):
        ops.prompt(x.requires_grad_(), None, keys, values, program, made.tensors, tables)
    bound = BoundEncoder(made.tensors, *program.encode())
    with pytest.raises(ValueError, match="six numbers a layer"):
        bound(x.detach(), None, tables, [0] * 5, 5)
    with pytest.raises(ValueError, match="the cache expected 2 layers with room for 5 tokens, got 1 with 5"):
        bound(x.detach(), None, tables, [0] * 6, 5)
    with pytest.raises(ValueError, match="the cache expected 2 layers with room for 5 tokens, got 2 with 4"):
        bound(x.detach(), None, tables, [0] * 12, 4)
    with pytest.raises(ValueError, match="table 0 expected at least 60 floats"):
        bound(x.detach(), None, [t[:1] for t in tables])


@pytest.mark.parametrize(
    "change",
    [
        lambda m, s, b: ([P.Keep(1, 2, 6, 0, 12, 0, every=5)], b, 0),
        lambda m, s, b: ([P.Keep(1, 2, 6, 0, 30, 0)], b, 0),
        lambda m, s, b: ([P.Keep(1, 2, 6, 0, 12, -1)], b, 0),
        lambda m, s, b: ([P.Keep(1, 2, 6, 0, 12, 0, every=1 << 40)], b, 0),
        lambda m, s, b: ([P.Rotary(1, 2, 6, 0, every=31)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 2, 2, 6, 0, 12, 24, 1.0, every=18)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 2, 2, 6, 0, 12, 24, 1.0, every=1)], b, 0),
    ],
)
def test_plans_that_do_not_fit(change):
    bad(change)


@pytest.mark.parametrize("changed", ["values", "scale", "rows"])
def test_dense_weights_that_do_not_fit(changed):
    w, rows = torch.zeros(4, 6, dtype=torch.int8), 4
    tensors, scale = [w, torch.ones(4)], 1
    if changed == "values":
        tensors[0] = w[:3]
    elif changed == "scale":
        scale = -1
    else:
        rows = 5
    program = P.Program((6, 5), (P.Weight(0, -1, -1, scale, P.whole_plan(rows, 6)),), (P.Linear(1, 0, 0),), 1)
    with pytest.raises(ValueError, match="expected"):
        BoundEncoder(tensors, *program.encode())
