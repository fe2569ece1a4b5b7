"""What a step does beside its sparse weights, through the core, on every tier."""

from __future__ import annotations

import pytest
import torch

from sparseprune import _native, ops, reference
from sparseprune.native import norms, rounded

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")

SHAPES = [(5, 1), (3, 64), (2, 7, 100), (0, 8), (33, 384), (1, 1, 577)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(tier, shape, dtype, close):
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    for gain in (weight, weight.to(dtype)):
        got = norms.rms_norm(x, gain, 1e-5)
        expected = reference.rms_norm(x.double(), gain.double(), 1e-5)
        assert got.dtype == torch.promote_types(dtype, gain.dtype) == reference.rms_norm(x, gain, 1e-5).dtype
        close(got, expected)
        close(reference.rms_norm(x, gain, 1e-5), expected)


def test_rms_norm_of_small_rows_and_of_a_slice(tier, close):
    x = (torch.randn(6, 40) * 1e-4)[:, 3:23]
    weight = torch.randn(20)
    for eps in (1e-5, 1e-8):
        got, expected = norms.rms_norm(x, weight, eps), reference.rms_norm(x.double(), weight.double(), eps)
        close(got / expected.abs().max(), expected / expected.abs().max())
    assert torch.equal(norms.rms_norm(torch.zeros(2, 20), weight, 1e-5), torch.zeros(2, 20))
    x[2, 7] = float("nan")
    assert torch.isnan(norms.rms_norm(x, weight, 1e-5)).sum(1).tolist() == [0, 0, 20, 0, 0, 0]


def test_rms_norm_has_the_gradients_of_its_formula(close):
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, 1e-3), (x, weight))
    with torch.no_grad():
        close(ops.rms_norm(x.float(), weight.float(), 1e-3), x / (x.square().mean(-1, True) + 1e-3).sqrt() * weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows, columns", [(1, 1), (8, 64), (33, 127), (16, 577), (0, 5)])
def test_rounded_linear(tier, rows, columns, dtype, close):
    weight, bias = torch.randn(rows, columns).bfloat16(), torch.randn(rows)
    for n in (0, 1, 2, 3, 4, 7, 9):
        x = (torch.randn(n, columns + 2)[:, 1 : columns + 1] / max(1, columns) ** 0.5).to(dtype)
        for shift in (bias, None):
            got = rounded.rounded_linear(x, weight, shift)
            assert got.dtype == dtype and got.shape == (n, rows)
            close(got, reference.rounded_linear(x.double(), weight, shift))
            close(got, reference.rounded_linear(x, weight, shift))
            steps, scale = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(rows) / 100
            got = rounded.rounded_linear(x, steps, shift, scale)
            close(got, reference.rounded_linear(x.double(), steps, shift, scale))
            close(got, reference.rounded_linear(x, steps, shift, scale))


def test_the_ops_pass_opcheck_and_say_what_is_wrong():
    x, weight = torch.randn(3, 16), torch.randn(16)
    torch.library.opcheck(torch.ops.sparseprune.rms_norm.default, (x, weight, 1e-5))
    torch.library.opcheck(torch.ops.sparseprune.rms_norm.default, (x.bfloat16(), weight, 1e-5))
    half = torch.randn(5, 16).bfloat16()
    torch.library.opcheck(torch.ops.sparseprune.rounded_linear.default, (x, half, torch.randn(5)))
    assert ops.rounded_linear(x, half).shape == (3, 5)
    assert torch.equal(ops.rounded_linear(x[:, :0], half[:, :0], torch.ones(5)), torch.ones(3, 5))
    with pytest.raises(RuntimeError, match="rounded_linear has no gradient"):
        ops.rounded_linear(x.clone().requires_grad_(), half)
    steps, scale = torch.ones(5, 16, dtype=torch.int8), torch.ones(5)
    torch.library.opcheck(torch.ops.sparseprune.rounded_linear.default, (x, steps, None, scale))
    with pytest.raises(ValueError, match=r"weight expected torch\.int8"):
        ops.rounded_linear(x, half, None, scale)
    with pytest.raises(ValueError, match="scale expected"):
        ops.rounded_linear(x, steps, None, scale[1:])
    with pytest.raises(ValueError, match=r"weight expected torch\.bfloat16"):
        ops.rounded_linear(x, half.float())
    with pytest.raises(ValueError, match="x expected 16 features"):
        ops.rounded_linear(x[:, :8], half)
    with pytest.raises(ValueError, match=r"rms_norm: x expected shape .*, got a scalar"):
        ops.rms_norm(torch.ones(()), torch.ones(8))
    with pytest.raises(ValueError, match=r"rms_norm: weight expected \[16\], got \[8\]"):
        ops.rms_norm(x, weight[:8])
