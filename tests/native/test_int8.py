"""Products with int8 weights and activations in 8 bits: every tier to the bit of the reference, on odd shapes."""

from __future__ import annotations

import pytest
import torch

from sparseprune import layouts, ops, reference
from sparseprune.activations import ACTIVATIONS
from sparseprune.native.linear import linear as native_linear
from sparseprune.ops.packing import _canonical_places
from sparseprune.packing import Kind, Packed, Plan, bitmask8, flat_positions
from sparseprune.reference.int8 import round_tokens

TOKENS = (0, 1, 3, 8, 15, 16, 17, 33, 48, 64, 65, 130)


def weight(rows: int, columns: int, density: float, block: tuple[int, int]) -> layouts.Layout:
    generator = torch.Generator().manual_seed(rows * 7919 + columns)
    r, c = block
    kept = torch.rand(rows // r, 1, columns // c, 1, generator=generator) < density
    w = (torch.randn(rows // r, r, columns // c, c, generator=generator) * kept).reshape(rows, columns)
    return layouts.CSR.from_dense(w) if block == (1, 1) else layouts.BSR.from_dense(w, block)


def nm(rows: int, columns: int) -> layouts.Layout:
    w = torch.randn(rows, columns // 4, 4, generator=torch.Generator().manual_seed(3))
    w[:, :, ::2] = 0
    return layouts.NM.from_dense(w.reshape(rows, columns), 2, 4)


WEIGHTS = {
    "1x4": weight(70, 132, 0.2, (1, 4)),
    "1x4, several K-blocks": weight(130, 2400, 0.1, (1, 4)),
    "4x4": weight(36, 300, 0.3, (4, 4)),
    "2x4": weight(34, 52, 0.4, (2, 4)),
    "16x4": weight(80, 64, 0.3, (16, 4)),
    "8x1": weight(72, 200, 0.3, (8, 1)),
    "16x1, several K-blocks": weight(160, 1200, 0.1, (16, 1)),
    "csr": weight(33, 100, 0.1, (1, 1)),
    "dense": weight(48, 68, 1.0, (16, 1)),
    "dense, odd rows": weight(33, 20, 1.0, (1, 1)),
    "2:4": nm(17, 36),
    "zero": weight(16, 8, 0.0, (1, 4)),
    "one quad": weight(1, 4, 1.0, (1, 4)),
    "half": weight(70, 148, 0.5, (1, 1)),
    "some empty rows": weight(90, 64, 0.02, (1, 1)),
    "one row": weight(1, 516, 0.3, (1, 1)),
    "no rows": layouts.CSR.from_dense(torch.zeros(0, 8)),
}


def pack(layout: layouts.Layout, tokens: int = 128):
    return ops.pack(layout, tokens=tokens, value_dtype="int8", activations="int8")


def as_bits(layout: layouts.Layout):
    """The form of few tokens, also where another is taken."""
    parts = bitmask8.pack(_canonical_places(layout))
    return ops.refill(Packed(*parts, torch.empty(0, dtype=torch.int8)), layout.values)


def arguments(packed):
    return packed.values, packed.index, packed.offsets, packed.scale


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("tuned", [1, 8, 16, 128])
def test_every_tier_gives_the_references_bits(tier, name, tuned):
    layout = WEIGHTS[name]
    packed = pack(layout, tuned)
    assert packed.plan.kind in ((Kind.QUADS,) if tuned > 8 else (Kind.QUADS, Kind.BITMASK8))
    rows, columns = packed.shape
    bias = torch.randn(rows)
    for n in TOKENS:
        x = torch.randn(n, columns) * 3 + 1
        residual = torch.randn(n, rows)
        for given in ((None, None, "none"), (bias, None, "relu"), (bias, residual, "none")):
            expected = reference.packed_linear(x, *arguments(packed), *given[:2], packed.plan, given[2])
            found = ops.packed_linear(x, packed, *given)
            assert torch.equal(found, expected), (n, given[2], (found - expected).abs().max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_bits_and_quads_give_the_same(tier, name):
    """A layer may hold both, for calls of few tokens and of many."""
    layout = WEIGHTS[name]
    quads, bits = pack(layout), as_bits(layout)
    assert (quads.plan.kind, bits.plan.kind) == (Kind.QUADS, Kind.BITMASK8)
    assert torch.equal(bits.to_dense(), quads.to_dense()) and torch.equal(bits.scale, quads.scale)
    assert bits.n_values == quads.n_values == layout.values.numel()
    for n in TOKENS:
        x = torch.randn(n, layout.shape[1])
        assert torch.equal(ops.packed_linear(x, bits), ops.packed_linear(x, quads))


def test_bits_by_two_threads(tier):
    layout = weight(1300, 512, 0.5, (1, 1))
    packed, x = as_bits(layout), torch.randn(5, 512)
    expected = reference.packed_linear(x, *arguments(packed), None, None, packed.plan, "none")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for n in (1, 5):
                assert torch.equal(ops.packed_linear(x[:n], packed), expected[:n])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tuned", [1, 128])
def test_activations_and_norm_follow(tier, close, tuned):
    packed = pack(WEIGHTS["half"], tuned)
    x, bias, gain, shift = torch.randn(37, 148), torch.randn(70), torch.randn(70), torch.randn(70)
    plain = reference.packed_linear(x, *arguments(packed), bias, None, packed.plan, "none")
    expected = torch.nn.functional.layer_norm(plain, gain.shape, gain, shift, 1e-5)
    close(native_linear(x, packed, bias, norm=(gain, shift, 1e-5)), expected)
    for activation in ACTIVATIONS[1:]:
        expected = reference.packed_linear(x, *arguments(packed), bias, None, packed.plan, activation)
        close(ops.packed_linear(x, packed, bias, None, activation), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packing", ["quads", "bits"])
def test_other_dtypes_and_strides(tier, dtype, packing):
    packed = pack(WEIGHTS["4x4"]) if packing == "quads" else as_bits(WEIGHTS["4x4"])
    x = torch.randn(2, 300, 9).to(dtype).transpose(1, 2)
    expected = reference.packed_linear(x, *arguments(packed), None, None, packed.plan, "none")
    found = ops.packed_linear(x, packed)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("packing", ["quads", "bits"])
def test_extreme_tokens(tier, packing):
    """The largest products, which pmaddubsw would saturate without the rule on pairs; ranges without an inverse."""
    w = torch.full((8, 4096), 1.0)
    w[1::2] *= -1
    w[2] = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(1024)
    w[3] = torch.tensor([1.0, -1.0]).repeat(2048)
    layout = layouts.BSR.from_dense(w, (1, 4))
    packed = pack(layout) if packing == "quads" else as_bits(layout)
    x = torch.zeros(9, 4096)
    x[0], x[1], x[2] = 1.0, -1.0, 1e-38
    x[3, 5], x[4, 5], x[5, 5] = torch.nan, torch.inf, -torch.inf
    x[6] = torch.linspace(-1, 1, 4096)
    x[7, ::2], x[7, 1::2] = 3e38, -3e38
    expected = reference.packed_linear(x, *arguments(packed), None, None, packed.plan, "none")
    found = ops.packed_linear(x, packed)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert expected[[3, 4, 5, 7]].isnan().all() and not expected[[0, 1, 2, 6, 8]].isnan().any()
    torch.testing.assert_close(expected[0, 0].item(), 4096.0, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", WEIGHTS)
def test_neighbours_never_exceed_what_16_bits_hold(name):
    packed = pack(WEIGHTS[name])
    pairs = packed.values.view(-1, 2).int()
    assert int(pairs.sum(1).abs().max()) <= 128 and int(pairs.abs().max()) <= 127
    positions = flat_positions(packed.index, packed.offsets, packed.plan)
    sums = torch.zeros(packed.shape[0], dtype=torch.int64)
    sums.index_add_(0, positions // packed.shape[1], packed.values[: positions.numel()].long())
    assert torch.equal(sums.float(), packed.scale[1])
    dense = WEIGHTS[name].to_dense()
    assert ((packed.to_dense() - dense).abs() <= packed.scale[0].unsqueeze(1) * 0.501).all()


def test_rounding_is_within_half_a_step():
    x = torch.randn(50, 64) * torch.rand(50, 1) * 10
    whole, scale = round_tokens(x)
    assert int(whole.abs().max()) <= 255
    assert ((whole * scale - x).abs() <= scale * 1.01).all()  # the zero is rounded too
    assert ((whole * scale - x).abs().mean() / scale.mean()) < 0.3


def test_errors():
    odd = layouts.CSR.from_dense(torch.randn(4, 6))
    for wrong in (odd, layouts.CSR.from_dense(torch.randn(4, 1)), layouts.CSR.from_dense(torch.randn(4, 0))):
        for tuned in (1, 128):
            with pytest.raises(ValueError, match=f"multiple of 4, at most 65536, got {wrong.shape[1]}"):
                pack(wrong, tuned)
    with pytest.raises(ValueError, match="value_dtype='int8'"):
        ops.pack(WEIGHTS["1x4"], activations="int8")
    with pytest.raises(ValueError, match="activations expected"):
        ops.pack(WEIGHTS["1x4"], value_dtype="int8", activations="int4")


def test_plan_is_named():
    plan = pack(WEIGHTS["1x4, several K-blocks"]).plan
    assert isinstance(plan, Plan) and plan.columns == 2400 and plan.k_block % 4 == 0 and plan.k_block < 2400
