"""Gradients of the sparse products through the CUDA kernels, and the layouts that they read entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_tensors import DTYPES, HALVES, amid_nan, csr_on, weight

from sparseprune import layouts, reference
from sparseprune.cuda import linear, sddmm, structures


def randn(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SHAPES = [
    (1, 1, 1, 1.0), (9, 70, 3, 0.2), (65, 130, 37, 0.1), (70, 40, 100, 0.9), (64, 64, 16, 0.5), (130, 8, 131, 0.4),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, tokens, density", SHAPES)
def test_sddmm(device, close, dtype, rows, columns, tokens, density):
    w = weight(rows, columns, density, dtype)
    w[rows // 2] = 0 if rows > 1 else w[0]
    x, dy = randn(tokens, columns, seed=1, dtype=dtype), randn(tokens, rows, seed=2, dtype=dtype)
    crow, col, _ = csr_on(device, w)
    got = sddmm.sddmm(amid_nan(x, device), amid_nan(dy, device), crow, col, 1, 1).cpu()
    expected = reference.sddmm(x.float(), dy.float(), crow.cpu(), col.cpu(), 1, 1)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * math.sqrt(tokens))


def test_sddmm_over_many_rows_shares_their_entries(device, close):
    """More entries a row than one block of lanes takes, and more than one block a row."""
    w = weight(3, 700, 0.8, torch.float32)
    x, dy = randn(5, 700, seed=1), randn(5, 3, seed=2)
    crow, col, _ = csr_on(device, w)
    got = sddmm.sddmm(x.to(device), dy.to(device), crow, col, 1, 1).cpu()
    close(got, reference.sddmm(x, dy, crow.cpu(), col.cpu(), 1, 1))


def test_sddmm_without_tokens_or_entries(device):
    crow, col, _ = csr_on(device, torch.eye(4))
    got = sddmm.sddmm(torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device), crow, col, 1, 1)
    assert torch.equal(got.cpu(), torch.zeros(4, 1, 1))
    crow, col, _ = csr_on(device, torch.zeros(4, 4))
    ones = torch.ones(2, 4, device=device)
    assert sddmm.sddmm(ones, ones, crow, col, 1, 1).numel() == 0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_infinite_token_reaches_only_its_own_entries(device, dtype):
    w, x, dy = torch.eye(20, 30).to(dtype), torch.zeros(3, 30, dtype=dtype), torch.ones(3, 20, dtype=dtype)
    x[1, 4] = math.inf
    crow, col, _ = csr_on(device, w)
    got = sddmm.sddmm(x.to(device), dy.to(device), crow, col, 1, 1).cpu().flatten()
    assert torch.isinf(got[4]) and torch.equal(got[torch.arange(20) != 4], torch.zeros(19))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, columns, tokens, density", SHAPES)
def test_csr_linear_dx(device, close, dtype, rows, columns, tokens, density):
    w = weight(rows, columns, density, dtype)
    dy = randn(2, tokens, rows, seed=2, dtype=dtype)
    crow, col, values = csr_on(device, w)
    for _ in range(2):  # the second call finds the transpose's structure, not its values
        got = linear.csr_linear_dx(dy.to(device), crow, col, values, columns).cpu()
        close(got, reference.csr_linear_dx(dy, crow.cpu(), col.cpu(), values.cpu(), columns))
        values.mul_(-0.5)


@pytest.mark.parametrize("blocksize", [(16, 1), (1, 4), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_blocks_entry_by_entry(device, close, blocksize, dtype):
    r, c = blocksize
    kept = torch.rand(5, 8, generator=torch.Generator().manual_seed(3)) < 0.4
    kept[2] = False
    w = randn(5 * r, 8 * c, seed=4, dtype=dtype) * kept.repeat_interleave(r, 0).repeat_interleave(c, 1)
    bsr = layouts.BSR.from_dense(w, blocksize)
    crow, col, values = (t.to(device) for t in (bsr.crow_indices, bsr.col_indices, bsr.values))
    for tokens in (3, 21):
        x, dy = randn(tokens, 8 * c, seed=5, dtype=dtype), randn(tokens, 5 * r, seed=6, dtype=dtype)
        y = linear.bsr_linear(x.to(device), crow, col, values, None, "relu").cpu()
        close(y, reference.dense_linear(x, w, None, "relu"))
        dx = linear.csr_linear_dx(dy.to(device), crow, col, values, 8 * c).cpu()
        close(dx, reference.dense_linear(dy, w.t(), None, "none"))
        dw = sddmm.sddmm(x.to(device), dy.to(device), crow, col, r, c).cpu()
        expected = reference.sddmm(x, dy, bsr.crow_indices, bsr.col_indices, r, c)
        torch.testing.assert_close(dw, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nm(device, close, nm, dtype):
    w = randn(12, 40, seed=1, dtype=dtype)
    w = w * reference.nm_mask(w.abs(), *nm)
    layout = layouts.NM.from_dense(w, *nm)
    values, indices = layout.values.to(device), layout.indices.to(device)
    for tokens in (2, 19):
        x, dy = randn(tokens, 40, seed=2, dtype=dtype), randn(tokens, 12, seed=3, dtype=dtype)
        y = linear.nm_linear(x.to(device), values, indices, *nm, None, "none").cpu()
        close(y, reference.dense_linear(x, w, None, "none"))
        dx = linear.nm_linear_dx(dy.to(device), values, indices, *nm, 40).cpu()
        close(dx, reference.nm_linear_dx(dy, layout.values, layout.indices, *nm, 40))
        dw = sddmm.nm_sddmm(x.to(device), dy.to(device), indices, *nm).cpu()
        torch.testing.assert_close(dw, reference.nm_sddmm(x, dy, layout.indices, *nm), rtol=1e-4, atol=1e-3)


def test_values_in_another_dtype_are_multiplied_in_that_of_x(device, close):
    """As under autocast: float32 values and bias, x in 16 bits."""
    crow, col, values = csr_on(device, weight(16, 64, 0.5, torch.float32))
    bias = randn(16, seed=4).to(device)
    for tokens in (1, 20):
        x = randn(tokens, 64, seed=2, dtype=torch.bfloat16).to(device)
        got = linear.csr_linear(x, crow, col, values, bias, "none")
        expected = reference.csr_linear(x.cpu(), crow.cpu(), col.cpu(), values.bfloat16().cpu(), bias.cpu(), "none")
        assert got.dtype == torch.bfloat16
        close(got.cpu(), expected)


def test_the_structures_of_a_weight_without_entries():
    crow, col = torch.zeros(4, dtype=torch.int32), torch.zeros(0, dtype=torch.int32)
    turned = structures.transposed(crow, col, 5)
    assert torch.equal(turned.crow, torch.zeros(6, dtype=torch.int32)) and turned.col.numel() == 0
    assert torch.equal(structures.edges_of(crow, col, 5, 2), torch.zeros(10, dtype=torch.int32))
    assert structures.entries_of_blocks(crow, col, (2, 2)).crow.numel() == 7
