"""The op encoder: a program through the compiled core against the same steps in plain torch."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch
from programs import DEPTH, FFN, HEADS, HIDDEN, Maker, agree, bad, layer

from sparseprune import _native, layouts, ops, reference
from sparseprune import encoder_program as P
from sparseprune.activations import ACTIVATIONS
from sparseprune.native.encoder import BoundEncoder

pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")

@pytest.mark.parametrize("batch, length", [(1, 1), (1, 17), (5, 9), (2, 64), (3, 65), (1, 200), (9, 3), (0, 4), (2, 0)])
def test_a_layer(batch, length, tier):
    made = Maker()
    agree(made, made.program(*layer(made)), batch=batch, length=length)


@pytest.mark.parametrize("layout", ["csr", "bsr1", "bsr2", "bsr4", "bsr8", "bsr16"])
@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8"])
def test_weights(layout, values, tier):
    made = Maker()
    w = made.weight(48, HIDDEN, layout, values)
    agree(made, made.program([P.Linear(1, 0, w, made.vector(48))], (HIDDEN, 48), 1), length=70)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("combine", P.COMBINE)
@pytest.mark.parametrize("biased", [False, True])
def test_activations_and_combinations(activation, combine, biased, tier):
    made = Maker()
    steps = [
        P.Linear(1, 0, made.weight(FFN, HIDDEN), made.vector(FFN)),
        P.Linear(1, 0, made.weight(FFN, HIDDEN), made.vector(FFN) if biased else -1, activation, combine),
    ]
    agree(made, made.program(steps, (HIDDEN, FFN), 1))


@pytest.mark.parametrize("width", [8, 16, 64])
def test_gelu_is_exact_to_a_millionth(width, tier):
    """Of values at every distance from 0, infinity and NaN: against float64."""
    x = torch.cat([torch.linspace(-9, 9, 200_001), torch.tensor([1e-30, -1e-30, -200.0, 200.0, 3e38, -3e38, 0.0])])
    x = torch.nn.functional.pad(x, (0, -len(x) % width))
    made = Maker()
    one = layouts.from_dense(torch.ones(1, 1), "csr")
    packed = ops.pack(one)
    made.weights.append(
        P.Weight(*(made.tensor(t) for t in (packed.values, packed.index, packed.offsets)), -1, packed.plan)
    )
    program = made.program([P.Linear(1, 0, 0, activation="gelu")], (1, 1), 1)
    found = ops.encoder(x.view(-1, width, 1), None, program, made.tensors).flatten()
    expected = torch.nn.functional.gelu(x.double())
    torch.testing.assert_close(found.double(), expected, rtol=2e-7, atol=1e-6)
    odd = torch.tensor([float("nan"), float("inf")]).view(1, 2, 1)
    found = ops.encoder(odd, None, program, made.tensors).flatten()
    assert found[0].isnan() and found[1] == float("inf")


def test_rows_of_buffers(tier):
    """Parts of buffers are read and written; an empty and a full weight."""
    made = Maker()
    steps = [
        P.Linear(1, 0, made.weight(18, HIDDEN)),
        P.Linear(1, 0, made.weight(5, 7), made.vector(5), to_row=3, from_row=11),
        P.Linear(1, 0, made.weight(3, HIDDEN, density=0.0), made.vector(3)),
        P.Linear(1, 0, made.weight(4, HIDDEN, density=1.0), made.vector(4), to_row=8, combine="add"),
        P.Norm(1, 0, 6, made.vector(6), made.vector(6), 1e-3, to_row=12, from_row=9),
    ]
    agree(made, made.program(steps, (HIDDEN, 18), 1))


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 20])
def test_norms(centred, biased, rows, tier):
    made = Maker()
    step = P.Norm(1, 0, rows, made.vector(rows), made.vector(rows) if biased else -1, 1e-5, centred)
    agree(made, made.program([step], (HIDDEN, rows), 1), length=67)


@pytest.mark.parametrize("window", [-1, 0, 1, 7, 300])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("length", [11, 130])
def test_attention_windows_and_biases(window, biased, length, tier):
    made = Maker()
    tables = [torch.randn(HEADS, length, length, generator=made.generator)] if biased else []
    steps, buffers = layer(made, window=window, table=0 if biased else -1)
    agree(made, made.program(steps, buffers), tables, length=length)


@pytest.mark.parametrize(
    "heads, kv_heads, depth", [(4, 2, 8), (4, 1, 5), (3, 3, 64), (1, 1, 1), (2, 2, 12), (6, 3, 16)]
)
def test_heads(heads, kv_heads, depth, tier):
    made = Maker()
    width, kv = heads * depth, kv_heads * depth
    steps = [
        P.Linear(1, 0, made.weight(width + 2 * kv, HIDDEN)),
        P.Attention(2, 1, heads, kv_heads, depth, 0, width, width + kv, depth**-0.5),
    ]
    agree(made, made.program(steps, (HIDDEN, width + 2 * kv, width), 2), length=37)


@pytest.mark.parametrize("depth", [2, 6, 16])
def test_rotary(depth, tier):
    made = Maker()
    angle = torch.rand(29, depth // 2, generator=made.generator).repeat(1, 2) * 6
    tables = [torch.zeros(1), angle.cos(), angle.sin()]
    steps = [
        P.Linear(1, 0, made.weight(4 * depth, HIDDEN)),
        P.Rotary(1, 2, depth, 1, 0, together=True),
        P.Rotary(1, 1, depth, 1, 3 * depth),
    ]
    agree(made, made.program(steps, (HIDDEN, 4 * depth), 1), tables, length=29)


def test_threads_and_strides(tier):
    """One thread and several; x may be a view, in another dtype."""
    made = Maker()
    program = made.program(*layer(made))
    wide = torch.randn(4, 31, 2 * HIDDEN, generator=made.generator)
    x, before = wide[..., :HIDDEN], torch.get_num_threads()
    expected = reference.encoder(x, None, made.tensors, [], *program.encode())
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.testing.assert_close(ops.encoder(x, None, program, made.tensors), expected, rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)
    half = ops.encoder(x.bfloat16(), None, program, made.tensors)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=5e-2, atol=5e-2)


def test_opcheck():
    made = Maker()
    program = made.program(*layer(made))
    arguments = torch.randn(2, 5, HIDDEN), torch.ones(2, 5, dtype=torch.bool), made.tensors, [], *program.encode()
    torch.library.opcheck(torch.ops.sparseprune.encoder, arguments)


def test_it_compiles_in_one_graph():
    made = Maker()
    program = made.program(*layer(made))
    x = torch.randn(2, 5, HIDDEN)
    compiled = torch.compile(lambda x: ops.encoder(x, None, program, made.tensors) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ops.encoder(x, None, program, made.tensors) * 2)


def test_encode_and_decode_are_inverse():
    made = Maker()
    steps, buffers = layer(made, window=3)
    steps.append(P.Rotary(1, HEADS, DEPTH, 4, 2))
    program = made.program(steps, buffers, 2)
    plan, scalars = program.encode()
    assert P.Program.decode(plan, scalars) == program
    with pytest.raises(ValueError, match="expected version 1, got 9"):
        P.Program.decode([9, *plan[1:]], scalars)


def test_a_step_that_is_not_there_is_no_attention():
    made = Maker()
    plan, scalars = made.program([P.Round(1, 0, 8)], (8, 8)).encode()
    assert P.Program.decode(plan, scalars).steps == (P.Round(1, 0, 8),)
    plan[-16] = len(P.StepKind)
    with pytest.raises(ValueError, match="kind expected one of"):
        P.Program.decode(plan, scalars)
    with pytest.raises(TypeError, match=r"a step expected one of Linear, .* got Weight"):
        made.program([P.Weight(0, 0, 0, 0, None)], (8, 8)).encode()


def test_refusals_of_the_op():
    made = Maker()
    program = made.program(*layer(made))
    x = torch.randn(2, 5, HIDDEN)
    with pytest.raises(ValueError, match="x expected"):
        ops.encoder(x[..., 1:], None, program, made.tensors)
    with pytest.raises(ValueError, match="mask expected bool"):
        ops.encoder(x, torch.ones(2, 5), program, made.tensors)
    with pytest.raises(RuntimeError, match="no gradient"):
        ops.encoder(x.requires_grad_(), None, program, made.tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, s, b: ([], b, 4),
        lambda m, s, b: ([], (), 0),
        lambda m, s, b: ([], (0,), 0),
        lambda m, s, b: ([], (4,) * 9, 0),
        lambda m, s, b: ([P.Linear(0, 0, 0)], b, 0),  # writes what it reads
        lambda m, s, b: ([P.Linear(4, 0, 0)], b, 0),
        lambda m, s, b: ([P.Linear(1, 0, 99)], b, 0),
        lambda m, s, b: ([P.Linear(1, 0, 0, 999)], b, 0),
        lambda m, s, b: ([P.Linear(1, 0, 0, to_row=30)], b, 0),
        lambda m, s, b: ([P.Linear(1, 0, 0, to_row=-1)], b, 0),
        lambda m, s, b: ([P.Linear(1, 0, 0, m.vector(3))], b, 0),
        lambda m, s, b: ([P.Norm(0, 0, HIDDEN + 1, m.vector(99))], b, 0),
        lambda m, s, b: ([P.Norm(0, 0, HIDDEN, m.vector(2))], b, 0),
        lambda m, s, b: ([P.Norm(0, 0, 0, m.vector(2))], b, 0),
        lambda m, s, b: ([P.Norm(0, 0, 9, m.vector(9), to_row=1)], b, 0),
        lambda m, s, b: ([P.Rotary(1, 2, 5, 0)], b, 0),
        lambda m, s, b: ([P.Rotary(1, 200, 6, 0)], b, 0),
        lambda m, s, b: ([P.Rotary(1, 2, 6, -1)], b, 0),
        lambda m, s, b: ([P.Attention(1, 1, 2, 2, 6, 0, 12, 24, 1.0)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 2, 3, 6, 0, 12, 24, 1.0)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 4, 2, 6, 0, 12, 24, 1.0)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 2, 2, 6, 0, 12, 25, 1.0)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 2, 2, 6, 0, 12, 24, 1.0, window=-2)], b, 0),
        lambda m, s, b: ([P.Attention(2, 1, 1 << 40, 1, 6, 0, 12, 24, 1.0)], b, 0),
    ],
)
def test_plans_that_do_not_fit(change):
    bad(change)


def test_truncated_and_random_plans_never_crash():
    """Every number replaced in turn, and every prefix: an error or a result, never a crash."""
    made = Maker()
    plan, scalars = made.program(*layer(made)).encode()
    tensors = [t.contiguous() for t in made.tensors]
    for end in range(len(plan)):
        with pytest.raises(ValueError):
            BoundEncoder(tensors, plan[:end], scalars)
    with pytest.raises(ValueError):
        BoundEncoder(tensors, [*plan, 0], scalars)
    x = torch.randn(2, 5, HIDDEN)
    for place in range(len(plan)):
        for value in (-1, 0, 1, 3, 1 << 33, -(1 << 62)):
            changed = [*plan[:place], value, *plan[place + 1 :]]
            with contextlib.suppress(ValueError):
                bound = BoundEncoder(tensors, changed, scalars)
                if changed[2] == HIDDEN:
                    bound(x, None, [])
    with pytest.raises(ValueError):
        BoundEncoder(tensors, plan, [])


@pytest.mark.parametrize("part", ["values", "index", "offsets"])
def test_packed_tensors_that_are_too_short(part):
    made = Maker()
    program = made.program(*layer(made))
    place = {"values": program.weights[0].values, "offsets": program.weights[0].offsets}.get(part, 1)
    tensors = [t.contiguous() for t in made.tensors]
    tensors[place] = tensors[place].flatten()[:3].contiguous()
    with pytest.raises(ValueError):
        BoundEncoder(tensors, *program.encode())


def test_more_entries_than_columns_are_refused():
    """Values of a K-block are made floats in memory for one entry a column."""
    made = Maker()
    w = made.weights[made.weight(48, HIDDEN, "csr", "bfloat16")]
    program = made.program([P.Linear(1, 0, 0)], (HIDDEN, 48), 1)
    BoundEncoder(made.tensors, *program.encode())
    offsets = made.tensors[w.offsets].clone()
    assert int(offsets[-1, 0]) > HIDDEN and w.plan.height < 8
    offsets[1:, 0] = int(offsets[-1, 0])  # all of them in the first slot
    made.tensors[w.offsets] = offsets
    with pytest.raises(ValueError, match="more entries than a K-block has columns"):
        BoundEncoder(made.tensors, *program.encode())


@pytest.mark.parametrize("layout", ["csr", "bsr4", "bsr16"])
def test_random_offsets_and_indices_are_refused_or_run(layout):
    """Numbers of a packed weight changed at random: the core raises, or reads nothing outside; sanitizers watch."""
    made = Maker()
    w = made.weights[made.weight(48, HIDDEN, layout, "bfloat16")]
    plan = made.program([P.Linear(1, 0, 0)], (HIDDEN, 48), 1).encode()
    draw, refused = random.Random(0), 0
    for _ in range(100):
        tensors = list(made.tensors)
        place = draw.choice([w.offsets, w.indices])
        changed = tensors[place].clone().contiguous()
        flat = changed.view(-1)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(flat.numel() - 60 if place == w.indices else flat.numel())
            most = torch.iinfo(changed.dtype).max
            flat[at] = min(most, draw.choice([0, 1, 2, int(flat[at]) + 1, 19, 20, 200, 1 << 14, 1 << 30]))
        tensors[place] = changed
        try:
            bound = BoundEncoder(tensors, *plan)
        except ValueError:
            refused += 1
            continue
        bound(torch.ones(2, 5, HIDDEN), None, [])
    assert refused > 20


@pytest.mark.parametrize("what", ["bias", "index", "offsets", "scale"])
def test_tensors_of_another_dtype(what):
    """Memory of another width must not be read as if it were of the right one."""
    made = Maker()
    w = made.weight(48, HIDDEN, "csr", "int8")
    program = made.program([P.Linear(1, 0, w, made.vector(48))], (HIDDEN, 48), 1)
    tensors = [t.contiguous() for t in made.tensors]
    place = {"scale": 0, "index": 2, "offsets": 3, "bias": 4}[what]
    tensors[place] = tensors[place].to(torch.int8)
    with pytest.raises(ValueError):
        BoundEncoder(tensors, *program.encode())


def test_tables_that_are_too_short():
    made = Maker()
    program = made.program([P.Linear(1, 0, made.weight(12, HIDDEN)), P.Rotary(1, 2, 6, 0)], (HIDDEN, 12), 1)
    bound = BoundEncoder(made.tensors, *program.encode())
    x = torch.randn(1, 5, HIDDEN)
    for tables in ([], [torch.ones(5, 6)], [torch.ones(5, 6), torch.ones(4, 6)]):
        with pytest.raises(ValueError, match="table"):
            bound(x, None, tables)
