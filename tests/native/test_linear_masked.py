"""The masked Linear of the compiled core, sparse and dense, against the reference."""

from __future__ import annotations

import pytest
import torch

from sparseprune import ops, reference
from sparseprune.native import linear_masked

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(n, k, density, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).to(dtype)
    return w, torch.rand(n, k, generator=generator) < density


@pytest.fixture(autouse=True)
def core(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_BACKEND", "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.29, 0.6, 1.0])
@pytest.mark.parametrize("n, k, tokens", [(1, 1, 1), (33, 70, 3), (17, 40, 0), (65, 129, 21)])
def test_values_and_gradients(close, dtype, density, n, k, tokens):
    w, mask = made(n, k, density, dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, tokens, k, generator=generator).to(dtype)
    dy, bias = torch.randn(2, tokens, n, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    assert (linear_masked._kept(mask).crow is None) == (int(mask.sum()) > 0.3 * mask.numel())
    close(linear_masked.masked_linear(x, w, mask, bias), reference.masked_linear(x, w, mask, bias))
    close(linear_masked.masked_linear_dx(dy, w, mask), reference.masked_linear_dx(dy, w, mask))
    dw = linear_masked.masked_linear_dw(dy, x, mask)
    assert dw.dtype == torch.float32 and not dw[~mask].any()
    torch.testing.assert_close(dw, reference.masked_linear_dw(dy, x, mask), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.2, 0.8])
def test_what_is_masked_is_never_read_and_gets_no_gradient(density):
    w, mask = made(20, 30, density, torch.float32)
    w = torch.where(mask, w, torch.nan).requires_grad_()
    x = torch.randn(4, 30, requires_grad=True)
    y = ops.masked_linear(x, w, mask)
    y.square().sum().backward()
    assert not y.isnan().any() and not x.grad.isnan().any()
    assert not w.grad[~mask].any() and w.grad[mask].all()


def test_a_new_mask_in_the_same_tensor_counts(close):
    w, mask = made(20, 30, 0.2, torch.float32)
    x = torch.randn(4, 30)
    ops.masked_linear(x, w, mask)
    mask[:, 3] = True
    close(ops.masked_linear(x, w, mask), reference.masked_linear(x, w, mask, None))
    w.mul_(2)
    close(ops.masked_linear(x, w, mask), reference.masked_linear(x, w, mask, None))
