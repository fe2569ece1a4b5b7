"""Sparse matmul ops: values and gradients against dense torch, opcheck, compile, autocast, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseprune import layouts, ops, reference


def sparse_weight(rows: int, columns: int, layout: str, density: float = 0.3, dtype=torch.float32) -> layouts.Layout:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    w = torch.randn(rows, columns, generator=generator)
    if layout == "csr":
        w *= torch.rand(rows, columns, generator=generator) < density
    elif layout == "nm":
        kept = torch.rand(rows, columns // 4, 4, generator=generator).argsort(2) < 2
        w *= kept.view(rows, columns)
    else:
        r, c = (int(side) for side in layout.removeprefix("bsr").split("x"))
        kept = torch.rand(rows // r, 1, columns // c, 1, generator=generator) < density
        w = (w.view(rows // r, r, columns // c, c) * kept).reshape(rows, columns)
    w = w.to(dtype)
    if layout.startswith("bsr"):
        return layouts.BSR.from_dense(w, (r, c))
    return layouts.from_dense(w, layout, nm=(2, 4))


LAYOUTS = ["csr", "nm", "bsr16x1", "bsr8x1", "bsr4x1", "bsr4x4", "bsr2x2"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(48, 64), (80, 36)])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_match_dense(layout, shape, activation, close):
    weight = sparse_weight(*shape, layout)
    x, bias = torch.randn(3, 7, shape[1], requires_grad=True), torch.randn(shape[0], requires_grad=True)
    values = weight.values.clone().requires_grad_(True)
    live = type(weight)(**{**vars(weight), "values": values})
    y = ops.layout_linear(x, live, bias, activation)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, values, bias), dy)
    dense = live.to_dense()
    expected_y = reference.activate(F.linear(x, dense, bias), activation)
    expected = torch.autograd.grad(expected_y, (x, values, bias), dy)
    close(y, expected_y)
    for a, b in zip(got, expected):
        close(a, b)
    packed, packed_t = ops.pack(weight), ops.pack(weight, transpose=True)
    y = ops.trained_linear(x, values, packed, packed_t, bias, activation)
    close(y, expected_y)
    for a, b in zip(torch.autograd.grad(y, (x, values, bias), dy), expected):
        close(a, b)


def test_gradcheck_in_float64():
    for layout in ("csr", "nm", "bsr4x1"):
        weight = sparse_weight(8, 12, layout, dtype=torch.float64)
        x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
        bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
        values = weight.values.clone().requires_grad_(True)

        def run(x: Tensor, values: Tensor, bias: Tensor, weight: layouts.Layout = weight) -> Tensor:
            return ops.layout_linear(x, type(weight)(**{**vars(weight), "values": values}), bias, "silu")

        assert torch.autograd.gradcheck(run, (x, values, bias))
        packed, packed_t = ops.pack(weight), ops.pack(weight, transpose=True)
        assert torch.autograd.gradcheck(
            lambda x, v, b, p=packed, t=packed_t: ops.trained_linear(x, v, p, t, b, "gelu"), (x, values, bias)
        )
    mask = torch.rand(8, 12) < 0.4
    w = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w, b: ops.masked_linear(x, w, mask, b), (x, w, bias))


@pytest.mark.parametrize("lead", [(), (5,), (2, 0), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_straight_through_gives_every_weight_the_gradient_of_the_masked_one(lead, dtype):
    torch.manual_seed(0)
    mask, x = torch.rand(8, 12) < 0.25, torch.randn(*lead, 12, dtype=dtype)
    w, bias = torch.randn(8, 12, dtype=dtype), torch.randn(8, dtype=dtype)
    dy, found = torch.randn(*lead, 8, dtype=dtype), []
    held = (w * mask).requires_grad_()
    parts = x.clone().requires_grad_(), held, bias.clone().requires_grad_()
    torch.nn.functional.linear(*parts).backward(dy)
    own = x.clone().requires_grad_(), w.clone().requires_grad_(), bias.clone().requires_grad_()
    y = ops.masked_linear(own[0], own[1], mask, own[2], straight_through=True)
    y.backward(dy)
    found = [part.grad for part in own]
    close = {torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}.get(dtype, {"rtol": 1e-5, "atol": 1e-5})
    torch.testing.assert_close(y, torch.nn.functional.linear(x, held.detach(), bias), **close)
    for gradient, part in zip(found, parts):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, part.grad, **close)


def test_straight_through_can_be_differentiated_again():
    mask = torch.rand(4, 6) < 0.5
    x, w = torch.randn(3, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 6, dtype=torch.float64)
    held = (w * mask).requires_grad_()
    own = w.clone().requires_grad_()
    grads = []
    for y, weight in ((x @ held.t(), held), (ops.masked_linear(x, own, mask, straight_through=True), own)):
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
        grads.append(torch.autograd.grad(gradient.pow(2).sum(), x)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("shape", [(2, 0), (0, 2), (0, 0)])
def test_straight_through_takes_a_weight_without_rows_or_columns(shape):
    x, w = torch.randn(3, shape[1], requires_grad=True), torch.randn(shape, requires_grad=True)
    ops.masked_linear(x, w, torch.zeros(shape, dtype=torch.bool), straight_through=True).sum().backward()
    assert w.grad.shape == w.shape and x.grad.shape == x.shape


def test_straight_through_runs_under_vmap():
    torch.manual_seed(0)
    mask, x = torch.rand(8, 12) < 0.25, torch.randn(5, 3, 12)
    w, bias = torch.randn(8, 12), torch.randn(8)
    own = [part.clone().requires_grad_() for part in (x, w, bias)]
    together = [part.clone().requires_grad_() for part in (x, w, bias)]
    y = torch.vmap(lambda row: ops.masked_linear(row, own[1], mask, own[2], straight_through=True))(own[0])
    z = ops.masked_linear(together[0], together[1], mask, together[2], straight_through=True)
    torch.testing.assert_close(y, z)
    for a, b in zip(torch.autograd.grad(y.pow(2).sum(), own), torch.autograd.grad(z.pow(2).sum(), together)):
        torch.testing.assert_close(a, b)


def test_an_activation_inside_the_op_has_the_same_gradient(close):
    weight = sparse_weight(16, 24, "csr")
    x, values = torch.randn(4, 24, requires_grad=True), weight.values.clone().requires_grad_(True)
    fused = torch.ops.sparseprune.csr_linear(x, weight.crow_indices, weight.col_indices, values, None, "gelu")
    apart = ops.csr_linear(x, weight.crow_indices, weight.col_indices, values, None, "gelu")
    for a, b in zip(torch.autograd.grad(fused.sum(), (x, values)), torch.autograd.grad(apart.sum(), (x, values))):
        close(a, b)


def test_opcheck():
    check = torch.library.opcheck
    op = torch.ops.sparseprune
    csr, bsr, nm = (sparse_weight(16, 24, name) for name in ("csr", "bsr8x1", "nm"))
    x, bias = torch.randn(5, 24, requires_grad=True), torch.randn(16, requires_grad=True)
    dy = torch.randn(5, 16)
    live = csr.values.clone().requires_grad_(True)
    check(op.csr_linear.default, (x, csr.crow_indices, csr.col_indices, live, bias, "gelu"))
    check(op.bsr_linear.default, (x, bsr.crow_indices, bsr.col_indices, bsr.values, bias, "none"))
    check(op.nm_linear.default, (x, nm.values, nm.indices, 2, 4, None, "relu"))
    check(op.masked_linear.default, (x, torch.randn(16, 24, requires_grad=True), torch.rand(16, 24) < 0.5, bias))
    check(op.csr_linear_dx.default, (dy, csr.crow_indices, csr.col_indices, csr.values, 24))
    check(op.sddmm.default, (x.detach(), dy, bsr.crow_indices, bsr.col_indices, 8, 1))
    packed, t = ops.pack(csr), ops.pack(csr, transpose=True)
    check(op.gather_values.default, (csr.values, packed.perm, torch.float32))
    structure = (packed.index, packed.offsets)
    check(op.packed_linear.default, (x.detach(), packed.values, *structure, None, None, dy, packed.plan, "silu"))
    check(op.packed_sddmm.default, (x.detach(), dy, *structure, packed.perm, packed.plan, csr.nnz))
    check(
        op.trained_linear.default,
        (x, live, bias, *structure, packed.perm, packed.plan, t.index, t.offsets, t.perm, t.plan),
    )
    check(op.add_layer_norm.default, (dy, None, torch.ones(16), torch.zeros(16), 1e-5))


@pytest.mark.parametrize("layout", ["csr", "bsr16x1", "nm"])
def test_compile_fullgraph(layout, close):
    weight = sparse_weight(32, 24, layout)
    packed, packed_t = ops.pack(weight), ops.pack(weight, transpose=True)
    x, bias = torch.randn(6, 24, requires_grad=True), torch.randn(32, requires_grad=True)
    values = weight.values.clone().requires_grad_(True)

    def trained(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return ops.trained_linear(x, values, packed, packed_t, bias, "gelu").sum()

    def canonical(x: Tensor) -> Tensor:
        return ops.packed_linear(ops.layout_linear(x, weight, bias.detach(), "relu")[:, :24].contiguous(), packed)

    got = torch.autograd.grad(torch.compile(trained, fullgraph=True)(x, values, bias), (x, values, bias))
    for a, b in zip(got, torch.autograd.grad(trained(x, values, bias), (x, values, bias))):
        close(a, b)
    with torch.no_grad():
        close(torch.compile(canonical, fullgraph=True)(x.detach()), canonical(x.detach()))


def test_autocast_and_half_inputs_follow_linear(close):
    weight = sparse_weight(32, 24, "csr")
    x, dense = torch.randn(5, 24), weight.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ops.layout_linear(x, weight), F.linear(x, dense)
    assert y.dtype == expected.dtype == torch.bfloat16
    close(y, expected)
    for dtype in (torch.bfloat16, torch.float16):
        for act in ("none", "gelu"):
            y = ops.packed_linear(x.to(dtype), ops.pack(weight), activation=act)
            assert y.dtype == dtype
            expected = reference.activate(F.linear(x.to(dtype).float(), dense), act)
            close(y, expected)


def test_errors_name_what_was_expected():
    weight = sparse_weight(16, 24, "csr")
    x = torch.randn(5, 24)
    with pytest.raises(ValueError, match="activation expected one of"):
        ops.layout_linear(x, weight, activation="swish")
    with pytest.raises(ValueError, match=r"bias expected shape \[16\]"):
        ops.layout_linear(x, weight, torch.zeros(15))
    with pytest.raises(ValueError, match="expected 24 features"):
        ops.packed_linear(torch.randn(5, 23), ops.pack(weight))
    with pytest.raises(RuntimeError, match="trained_linear"):
        ops.packed_linear(x.requires_grad_(), ops.pack(weight))
    with pytest.raises(ValueError, match="value_dtype expected one of"):
        ops.pack(weight, value_dtype="int4")
    with pytest.raises(ValueError, match="must divide in_features"):
        bsr = sparse_weight(16, 24, "bsr4x4")
        ops.bsr_linear(torch.randn(5, 23), bsr.crow_indices, bsr.col_indices, bsr.values)
