"""torch.func, and gradients of many outputs at once, through ops with gradients of their own."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import sparseprune as sp
from sparseprune import ops

LAYOUTS = {"csr": sp.Element(), "bsr": sp.Block(4, 1), "nm": sp.NM(2, 4)}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():  # of vmap, which runs ops one by one
        warnings.simplefilter("ignore")
        yield


def models(layout):
    """(dense, the same sparse)."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    sp.prune_(dense, sparsity=0.5, granularity=LAYOUTS[layout])
    sparse = copy.deepcopy(dense)
    sp.sparsify_(sparse, layout=layout, blocksize=(4, 1) if layout == "bsr" else None)
    return dense, sparse


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_each_sample(layout, close):
    dense, sparse = models(layout)
    x = torch.randn(3, 16)

    def each(model):
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(parameters, row):
            return functional_call(model, (parameters, buffers), (row[None],)).square().sum()

        whole = grad(lambda p: vmap(loss, (None, 0))(p, x).sum())(parameters)
        return vmap(grad(loss), (None, 0))(parameters, x), whole

    for expected, found in zip(each(dense), each(sparse)):
        for name in ("0", "2"):
            close(found[f"{name}.bias"], expected[f"{name}.bias"])
            held, values = sparse[int(name)].to_layout(), found[f"{name}.values"]
            kept = replace(held, values=torch.ones_like(held.values)).to_dense()
            rows = values if values.dim() > held.values.dim() else values[None]
            matrices = torch.stack([replace(held, values=row).to_dense() for row in rows])
            close(matrices.view_as(expected[f"{name}.weight"]), expected[f"{name}.weight"] * kept)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jacobians(layout, frozen, close):
    dense, sparse = (model.requires_grad_(not frozen) for model in models(layout))
    x = torch.randn(3, 16)
    close(jacrev(sparse)(x), jacrev(dense)(x))
    close(jacrev(jacrev(lambda r: sparse(r).pow(3).sum()))(x[0]), jacrev(jacrev(lambda r: dense(r).pow(3).sum()))(x[0]))
    for way in (False, True):
        found = torch.autograd.functional.jacobian(sparse, x, vectorize=way)
        close(found, torch.autograd.functional.jacobian(dense, x, vectorize=way))
    if not frozen:
        every = torch.eye(48).view(48, 3, 16)
        found, expected = (
            torch.autograd.grad(model(x), model[0].bias, every, is_grads_batched=True)[0] for model in (sparse, dense)
        )
        close(found, expected)


@pytest.mark.parametrize("straight_through", [False, True])
def test_masked_weights(straight_through, close):
    x, w, bias, mask = torch.randn(5, 16), torch.randn(8, 16), torch.randn(8), torch.rand(8, 16) > 0.5

    def masked(w, x):
        return ops.masked_linear(x, w, mask, bias, straight_through=straight_through).square().sum()

    def plain(w, x):
        return F.linear(x, w * mask, bias).square().sum()

    close(grad(masked)(w, x) * mask, grad(plain)(w, x))
    close(vmap(grad(masked), (None, 0))(w, x) * mask, vmap(grad(plain), (None, 0))(w, x))
    found = torch.autograd.functional.jacobian(lambda b: ops.masked_linear(x, w, mask, b), bias, vectorize=True)
    close(found, torch.eye(8).expand(5, 8, 8))


def _norms():
    weight, bias = torch.rand(16) + 0.5, torch.randn(16)
    return [
        (lambda x: ops.rms_norm(x, weight, 1e-6), lambda x: F.rms_norm(x, (16,), weight, 1e-6)),
        (
            lambda x: ops.add_layer_norm(x, x.flip(-1), weight, bias, 1e-5),
            lambda x: F.layer_norm(x + x.flip(-1), (16,), weight, bias, 1e-5),
        ),
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_norms_of_frozen_weights_have_derivatives(which, close):
    found, expected = _norms()[which]
    x, tangent = torch.randn(4, 16), torch.randn(4, 16)
    for derive in (
        grad(lambda f, x: f(x).pow(3).sum(), argnums=1),
        grad(lambda f, x: vmap(f)(x).pow(3).sum(), argnums=1),
        lambda f, x: jvp(f, (x,), (tangent,))[1],
        lambda f, x: jvp(vmap(f), (x,), (tangent,))[1],
        lambda f, x: jacfwd(f)(x[0]),
    ):
        close(derive(found, x), derive(expected, x))


def test_a_tangent_below_vmap_is_refused_too():
    _, sparse = models("csr")
    x = torch.randn(3, 16)
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*densify_"):
        jvp(vmap(sparse), (x,), (x,))
