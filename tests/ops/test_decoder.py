"""The op decoder: a program through the compiled core against the same steps in plain torch."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

from sparseprune import _native, layouts, native, ops, reference
from sparseprune import decoder_program as P
from sparseprune.packing import Kind

pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")

HIDDEN, DEPTH, FFN = 36, 10, 52
FORMS = ["csr1", "csr128", "bsr2", "bsr4", "bsr8", "bsr16", "whole"]
VALUES = ["float32", "bfloat16", "int8"]
ROUNDING = {"csr1 int8": Kind.BITMASK8, "quads": Kind.QUADS, "quads of four": Kind.QUADS}


class Maker:
    """Collects the tensors and weights of a program."""

    def __init__(self, form: str = "csr1", values: str = "float32", density: float = 0.5) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.form, self.values, self.density = form, values, density
        self.activations = "int8" if form in ROUNDING else "float32"
        self.tensors: list[Tensor] = []
        self.weights: list[P.Weight] = []

    def tensor(self, t: Tensor) -> int:
        self.tensors.append(t)
        return len(self.tensors) - 1

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def vector(self, size: int) -> int:
        return self.tensor(self.random(size))

    def norm(self, size: int, centred: bool = False) -> P.RowNorm:
        return P.RowNorm(self.vector(size), self.vector(size) if centred else -1, 1e-5, centred)

    def weight(self, rows: int, columns: int) -> int:
        w = self.random(rows, columns) / columns**0.5
        if self.form == "whole":
            scale = -1
            if self.values == "int8":
                step = w.abs().amax(1) / 127
                scale, w = self.tensor(step), (w / step.unsqueeze(1)).round().to(torch.int8)
            else:
                w = w.to(getattr(torch, self.values))
            self.weights.append(P.Weight(self.tensor(w), -1, -1, scale, P.whole_plan(rows, columns)))
            return len(self.weights) - 1
        kept = torch.rand(w.shape, generator=self.generator) < self.density
        held: layouts.Layout = layouts.from_dense(w * kept, "csr")
        tokens = 1 if self.form.startswith("csr1 ") or self.form == "csr1" else 128
        if self.form.startswith("quads"):
            height = 4 if self.form == "quads of four" and rows % 4 == 0 else 1
            blocks = w.view(rows // height, height, columns // 4, 4)
            blocks = blocks * kept[: rows // height, None, : columns // 4, None]
            held = layouts.BSR.from_dense(blocks.reshape(rows, columns), (height, 4))
        if self.form.startswith("bsr"):
            height = next(h for h in (int(self.form[3:]), 4, 2, 1) if rows % h == 0)
            blocks = w.view(-1, height, columns) * kept.view(-1, height, columns)[:, :1]
            held = layouts.from_dense(blocks.view(w.shape), "bsr", (height, 1))
        p = ops.pack(held, tokens=tokens, value_dtype=self.values, activations=self.activations)
        scale = -1 if p.scale is None else self.tensor(p.scale)
        places = [self.tensor(t) for t in (p.values, p.index, p.offsets)]
        self.weights.append(P.Weight(*places, scale, p.plan))
        return len(self.weights) - 1


def layer(
    made: Maker, heads: int = 4, kv_heads: int = 2, depth: int = DEPTH, turned: int = DEPTH, mask: int = -1,
    normed: bool = False, ffn: int = FFN,
) -> P.Program:  # fmt: skip
    """A pre-norm layer with a gated feed-forward and a last norm."""
    width, kv = heads * depth, kv_heads * depth
    before, behind = made.norm(HIDDEN), made.norm(HIDDEN, True)
    steps: list[P.Step] = [
        P.Linear(1, 0, made.weight(width, HIDDEN), made.vector(width), norm=before, together=True),
        P.Linear(1, 0, made.weight(kv, HIDDEN), norm=before, to_row=width, together=True),
        P.Linear(1, 0, made.weight(kv, HIDDEN), norm=before, to_row=width + kv),
        P.Attention(
            2, 1, heads, kv_heads, depth, (0, depth), (width, depth), (width + kv, depth), depth**-0.5, 0, turned, 0,
            mask, made.norm(depth) if normed else P.RowNorm(), made.norm(depth, True) if normed else P.RowNorm(),
        ),
        P.Linear(0, 2, made.weight(HIDDEN, width), made.vector(HIDDEN), add=True),
        P.Linear(3, 0, made.weight(ffn, HIDDEN), activation="silu", norm=behind, together=True),
        P.Linear(3, 0, made.weight(ffn, HIDDEN), norm=behind, to_row=ffn),
        P.Linear(0, 3, made.weight(HIDDEN, ffn), add=True, gated=True),
        P.Norm(4, 0, HIDDEN, made.norm(HIDDEN)),
    ]  # fmt: skip
    return P.Program((HIDDEN, width + 2 * kv, width, 2 * ffn, HIDDEN), tuple(made.weights), tuple(steps), 4)


def agree(
    made: Maker, program: P.Program, batch: int = 1, tokens: int = 1, past: int = 9, masks=(), kv_heads: int = 2,
    depth: int = DEPTH, turned: int = DEPTH, room: int = 40, tolerance: float = 2e-5,
) -> Tensor:  # fmt: skip
    x = made.random(batch, tokens, HIDDEN)
    keys, values = (made.random(batch, kv_heads, room, depth) for _ in range(2))
    angle = made.random(batch, tokens, max(2, turned))
    tables = [angle.cos(), angle.sin()]
    other = [keys.clone()], [values.clone()]
    expected = reference.decoder(x, *other, past, list(masks), tables, made.tensors, *program.encode())
    found = ops.decoder(x, [keys], [values], past, program, made.tensors, masks, tables)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(keys, other[0][0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(values, other[1][0], rtol=tolerance, atol=tolerance)
    return found


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 1), (3, 2), (1, 7), (16, 1)])
def test_every_form_of_weight(tier, form, values, batch, tokens):
    made = Maker(form, values)
    agree(made, layer(made), batch, tokens)


@pytest.mark.parametrize("form", ROUNDING)
@pytest.mark.parametrize("batch, tokens", [(1, 1), (3, 1), (1, 7), (16, 1)])
def test_activations_in_8_bits(tier, form, batch, tokens):
    """A sum that differs in its last bit may round to the next number."""
    made = Maker(form, "int8")
    program = layer(made)
    assert {w.plan.kind for w in program.weights} == {ROUNDING[form]}
    agree(made, program, batch, tokens, tolerance=2e-2)


@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("form", ["csr1", "csr128", "bsr16"])
def test_densities(form, density):
    made = Maker(form, density=density)
    agree(made, layer(made), 2, 1)


@pytest.mark.parametrize(
    "heads, kv_heads, depth, turned", [(4, 4, 8, 8), (6, 1, 64, 64), (2, 1, 128, 32), (3, 3, 7, 4), (1, 1, 16, 0)]
)
@pytest.mark.parametrize("past", [0, 1, 8, 33])
def test_heads(tier, heads, kv_heads, depth, turned, past):
    made = Maker()
    program = layer(made, heads, kv_heads, depth, turned, normed=depth > 8)
    agree(made, program, 2, 3, past, kv_heads=kv_heads, depth=depth, turned=turned)


def test_masks():
    """Padding in front, holes, a key behind the new tokens, and a token that sees nothing."""
    past, tokens, room = 9, 3, 40
    seen = torch.ones(2, tokens, room, dtype=torch.bool).tril(past)
    seen[0, :, :4] = False
    seen[1, 1, 2:8:2] = False
    seen[1, 0, 30] = True
    seen[0, 2] = False
    made = Maker()
    program = layer(made, mask=0)
    for mask in (seen, seen[:, :, : past + tokens].contiguous(), seen[:1]):
        agree(made, program, 2, tokens, past, (mask,))


def test_masks_and_caches_that_are_views():
    past, made = 5, Maker()
    program = layer(made, mask=0)
    seen = torch.ones(1, 1, 20, dtype=torch.bool).tril(past).expand(3, 1, 20)
    big = made.random(2, 3, 5, 30, DEPTH)
    keys, values = big[0, :, 1:3, :25], big[1, :, 2:4]
    x, angle = made.random(3, 1, HIDDEN), made.random(1, 1, DEPTH)
    tables = [angle.cos(), angle.sin()]
    other = keys.clone(), values.clone()
    outside = big.clone()
    expected = reference.decoder(x, [other[0]], [other[1]], past, [seen], tables, made.tensors, *program.encode())
    found = ops.decoder(x, [keys], [values], past, program, made.tensors, [seen], tables)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(keys, other[0])
    outside[0, :, 1:3, past] = keys[:, :, past]
    outside[1, :, 2:4, past] = values[:, :, past]
    assert torch.equal(big, outside)  # and nowhere else


def test_not_a_number_stays_one():
    made = Maker()
    program = layer(made)
    x, cache = torch.full((1, 1, HIDDEN), float("nan")), [torch.zeros(1, 2, 4, DEPTH)]
    tables = [torch.ones(1, 1, DEPTH)] * 2
    found = ops.decoder(x, cache, [cache[0].clone()], 0, program, made.tensors, (), tables)
    assert found.isnan().all()


def test_wide_weights_are_shared_by_threads():
    """Enough work for a team."""
    for form in ("csr1", "bsr16", "whole"):
        made = Maker(form)
        program = layer(made, heads=4, kv_heads=2, depth=64, turned=64, ffn=3000)
        for batch in (1, 5):
            agree(made, program, batch, 1, depth=64, turned=64, tolerance=1e-4)


def test_encode_and_decode():
    made = Maker()
    program = layer(made, mask=0, normed=True)
    assert P.Program.decode(*program.encode()) == dataclasses.replace(program)


def test_opcheck():
    made = Maker()
    program = layer(made)
    cache = [made.random(1, 2, 8, DEPTH)], [made.random(1, 2, 8, DEPTH)]
    tables = [torch.ones(1, 1, DEPTH)] * 2
    arguments = (made.random(1, 1, HIDDEN), *cache, 3, [], tables, made.tensors, *program.encode())
    torch.library.opcheck(torch.ops.sparseprune.decoder.default, arguments)


def test_writes_are_seen_by_autograd():
    made = Maker()
    program = layer(made)
    learned = torch.randn(1, 2, 8, DEPTH, requires_grad=True)
    keys = learned * 1
    loss = keys.square().sum()
    with torch.no_grad():
        ops.decoder(
            made.random(1, 1, HIDDEN), [keys.detach()], [made.random(1, 2, 8, DEPTH)], 3, program, made.tensors, (),
            [torch.ones(1, 1, DEPTH)] * 2,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_refusals():
    made = Maker()
    program = layer(made, mask=0)
    x, tables = made.random(2, 1, HIDDEN), [torch.ones(1, 1, DEPTH)] * 2
    cache = made.random(2, 2, 8, DEPTH)
    seen = torch.ones(2, 1, 8, dtype=torch.bool)

    def call(x=x, keys=cache, values=cache, past=3, masks=(seen,), tables=tables):
        return ops.decoder(x, [keys.clone()], [values.clone()], past, program, made.tensors, masks, tables)

    call()
    with pytest.raises(ValueError, match="x expected"):
        call(x=x[..., 1:])
    with pytest.raises(ValueError, match="keys expected"):
        call(past=8)
    with pytest.raises(ValueError, match="values expected"):
        call(values=cache.double())
    with pytest.raises(ValueError, match="mask expected"):
        call(masks=(seen[..., :3],))
    with pytest.raises(ValueError, match="mask expected"):
        call(masks=(torch.ones(2, 1, 9, dtype=torch.bool),))
    with pytest.raises(ValueError, match="masks expected"):
        call(masks=())
    with pytest.raises(ValueError, match="tables expected"):
        call(tables=[tables[0][..., 1:]] * 2)
    with pytest.raises(ValueError, match=r"cos and sin of one shape, got \[1, 1, 10\] and \[2, 1, 10\]"):
        call(tables=[tables[0], tables[0].repeat(2, 1, 1)])
    with pytest.raises(ValueError, match="cos and sin of one shape"):
        call(tables=[tables[0], torch.ones(1, 1, DEPTH + 2)])
    with pytest.raises(RuntimeError, match="no gradient"):
        call(x=x.clone().requires_grad_())
    many = torch.ones(17, 1, HIDDEN)
    wide = torch.ones(17, 2, 8, DEPTH)
    found = ops.decoder(many, [wide], [wide.clone()], 3, program, made.tensors, [seen[:1]], tables)  # by the reference
    assert found.shape == many.shape


def test_tables_that_lie_differently_have_no_numbers():
    """The core reads sin with the strides of cos."""
    cos = torch.ones(2, 3, DEPTH)
    numbers = native.decoder.table_numbers
    assert numbers(cos, cos.clone())[2:] == (3 * DEPTH, DEPTH, DEPTH)
    assert numbers(cos[:, :1], torch.ones(2, 1, DEPTH).expand(2, 1, DEPTH)[:, :1].repeat(1, 3, 1)[:, :1])
    for sin in (cos[:1], cos[..., 1:], cos[:, :1].expand_as(cos), torch.ones(2, DEPTH, 3).transpose(1, 2)):
        with pytest.raises(ValueError, match="sin expected as cos"):
            numbers(cos, sin)


def test_the_reference_computes_where_its_inputs_are():
    """On another device than the CPU: meta, whose tensors hold nothing."""
    made = Maker("whole")
    program = layer(made)
    tensors = [t.to("meta") for t in made.tensors]
    x, cache = torch.ones(2, 3, HIDDEN, device="meta"), torch.ones(2, 2, 8, DEPTH, device="meta")
    tables = [torch.ones(1, 3, DEPTH, device="meta")] * 2
    found = reference.decoder(x, [cache], [cache.clone()], 3, [], tables, tensors, *program.encode())
    assert found.shape == x.shape and found.device.type == "meta"


def test_more_entries_than_columns_are_refused():
    """Values of a K-block are made floats in memory for one entry a column."""
    made = Maker("csr128", "bfloat16")
    w = made.weights[made.weight(FFN, HIDDEN)]
    program = P.Program((HIDDEN, FFN), (w,), (P.Linear(1, 0, 0),), 1)
    native.decoder.BoundDecoder(made.tensors, *program.encode())
    offsets = made.tensors[w.offsets].clone()
    entries = int(offsets[-1, 0])
    assert entries > HIDDEN and w.plan.height < 8
    offsets[1:, 0] = entries  # all of them in the first slot
    made.tensors[w.offsets] = offsets
    with pytest.raises(ValueError, match="more entries than a K-block has columns"):
        native.decoder.BoundDecoder(made.tensors, *program.encode())


@pytest.mark.parametrize("form", ["csr128", "bsr4", "bsr16", "csr1", *ROUNDING])
def test_random_offsets_and_indices_are_refused_or_run(form):
    """Numbers of packed weights changed at random: the core raises, or reads nothing outside; sanitizers watch."""
    made = Maker(form, "int8" if form in ROUNDING else "bfloat16")
    program = layer(made)
    plan = program.encode()
    draw = random.Random(0)
    refused = 0
    for _ in range(100):
        weight = draw.choice(program.weights)
        tensors = list(made.tensors)
        place = draw.choice([weight.offsets, weight.indices])
        changed = tensors[place].clone().contiguous()
        flat = changed.view(-1)
        limit = 127 if changed.dtype == torch.uint8 else 32767
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(flat.numel() - 60 if place == weight.indices else flat.numel())
            flat[at] = min(limit, draw.choice([0, 1, 2, int(flat[at]) + 1, 35, 36, 200, 1 << 14, 1 << 30]))
        tensors[place] = changed
        try:
            bound = native.decoder.BoundDecoder(tensors, *plan)
        except ValueError:
            refused += 1
            continue
        keys, values, table = torch.zeros(2, 2, 8, DEPTH), torch.zeros(2, 2, 8, DEPTH), torch.ones(1, 1, DEPTH)
        numbers, turns = native.encoder.cache_numbers(keys, values), native.decoder.table_numbers(table, table)
        bound(torch.ones(2, 1, HIDDEN), list(numbers), 8, 3, [], list(turns))
    assert refused > 20


def test_random_plans_are_refused_or_run():
    """Numbers of a plan changed at random: the core raises, or writes nothing outside; sanitizers watch."""
    made = Maker("csr128")
    program = layer(made, mask=0, normed=True)
    plan, scalars = program.encode()
    draw = random.Random(0)
    refused = 0
    for _ in range(400):
        changed = list(plan)
        for _ in range(draw.randint(1, 2)):
            changed[draw.randrange(len(changed))] = draw.choice([-1, 0, 1, 2, 3, 7, 10, 36, 64, 1 << 20, 1 << 40])
        try:
            bound = native.decoder.BoundDecoder(made.tensors, changed, scalars)
            keys, values = torch.zeros(2, 2, 8, DEPTH), torch.zeros(2, 2, 8, DEPTH)  # the numbers hold neither
            numbers = list(native.encoder.cache_numbers(keys, values))
            mask, table = torch.ones(2, 1, 8, dtype=torch.bool), torch.ones(1, 1, DEPTH)
            if changed[2 : 2 + changed[1]] != plan[2:7] or changed[7] != plan[7]:
                continue  # x and the result have other widths: for the caller to see
            attention = [s for s in P.Program.decode(changed, scalars).steps if isinstance(s, P.Attention)]
            if any(s.depth != DEPTH or s.kv_heads > 2 for s in attention):
                continue  # the cache has other heads: for the caller to see
            seen, turns = native.decoder.mask_numbers(mask), native.decoder.table_numbers(table, table)
            bound(torch.ones(2, 1, HIDDEN), numbers, 8, 3, list(seen), list(turns))
        except ValueError:
            refused += 1
    assert refused > 100
