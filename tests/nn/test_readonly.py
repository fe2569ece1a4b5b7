"""SparseLinear.weight is for reading: a write is refused, never lost."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import sparseprune as sp


def layer():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    sp.prune_(linear, 0.5)
    return linear, sp.SparseLinear.from_linear(linear)


def add(w):
    w += 1


def add_to_data(w):
    w.data += 1


def set_data(w):
    w.data = torch.zeros(6, 8)


def set_item(w):
    w[0, 0] = 1.0


@pytest.mark.parametrize(
    "write",
    [
        add, add_to_data, set_data, set_item, lambda w: w.zero_(), lambda w: w.data.add_(1), lambda w: w[0].fill_(1),
        lambda w: w.detach().mul_(2), lambda w: w.t().copy_(torch.zeros(8, 6)), lambda w: w.chunk(2)[1].zero_(),
        lambda w: w.view(-1).zero_(), lambda w: torch.add(w, 1, out=w), lambda w: nn.init.normal_(w),
        lambda w: F.relu(w, inplace=True), lambda w: torch._foreach_add_([w], 1), lambda w: w.contiguous().zero_(),
        lambda w: w.requires_grad_(True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_every_kind_of_write_is_refused_with_a_remedy(write, mode):
    linear, sparse = layer()
    with mode(), pytest.raises(RuntimeError, match=r"expected to be read, got a write.*densify_"):
        write(sparse.weight)
    assert torch.equal(sparse.weight, linear.weight)


def test_reading_gives_plain_tensors():
    linear, sparse = layer()
    weight = sparse.weight
    assert weight.shape == (6, 8) and weight.dtype == torch.float32 and torch.equal(weight, linear.weight)
    x = torch.randn(3, 8, requires_grad=True)
    y = F.linear(x, weight, sparse.bias)
    y.sum().backward()
    assert type(y) is torch.Tensor and torch.equal(y, linear(x)) and x.grad is not None
    own = weight.clone()
    own.zero_()
    assert type(own) is type(weight + 1) is type(weight.double()) is type(copy.deepcopy(weight)) is torch.Tensor
    target = torch.zeros(6, 8)
    target.copy_(weight)
    assert torch.equal(target, linear.weight) and type(weight.numpy()).__name__ == "ndarray"
    assert type(pickle.loads(pickle.dumps(weight))) is torch.Tensor
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), linear.weight)
    assert type(sparse.to_linear().weight) is nn.Parameter and type(sparse.dense()) is torch.Tensor


def test_a_compiled_call_may_look_at_it():
    linear, sparse = layer()
    call = torch.compile(lambda x: F.linear(x, sparse.weight, sparse.bias), backend="eager", fullgraph=True)
    x = torch.randn(3, 8)
    assert torch.equal(call(x), linear(x))


def test_another_weight_in_its_place_is_refused():
    linear, sparse = layer()
    other = torch.randn(6, 8) * (torch.rand(6, 8) < 0.4)
    with pytest.raises(AttributeError, match=r"got another in its place.*densify_\(model\) first.*load_state_dict"):
        sparse.weight = nn.Parameter(other)
    assert torch.equal(sparse.weight, linear.weight)
    sparse.load_state_dict({"weight": other}, strict=False)
    assert torch.equal(sparse.weight, other)


@pytest.mark.parametrize("layout", ["csr", "bsr", "nm"])
def test_gradients_pass_through_it(layout, close):
    """A decoder tied to its encoder, and a penalty on the weight: each was without a gradient, and nothing said so."""
    torch.manual_seed(0)
    linear, x = nn.Linear(16, 32), torch.randn(5, 16)
    sp.prune_(linear, 0.5, granularity={"csr": sp.Element(), "bsr": sp.Block(16, 1), "nm": sp.NM(2, 4)}[layout])
    sparse = sp.SparseLinear.from_linear(linear, layout)
    sparse.set_low_rank_(torch.randn(2, 16) * 0.1, torch.randn(32, 2) * 0.1)
    linear.weight.data = sparse.dense()
    for module in (linear, sparse):
        y = F.linear(torch.relu(module(x)), module.weight.t())
        ((y - x).square().mean() + module.weight.abs().mean()).backward()
    held = sparse.to_layout()
    kept = replace(held, values=torch.ones_like(held.values)).to_dense()
    close(replace(held, values=sparse.values.grad).to_dense(), linear.weight.grad * kept)
    close(sparse.low_rank_a.grad, sparse.low_rank_b.detach().t() @ linear.weight.grad)
    close(sparse.low_rank_b.grad, linear.weight.grad @ sparse.low_rank_a.detach().t())
    assert not sparse.dense().requires_grad and not copy.deepcopy(sparse.weight).requires_grad
    with torch.no_grad():
        assert not sparse.weight.requires_grad


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_by_its_gradient_alone_is_seen_by_frozen_layers(fused, close):
    """A fused step leaves versions alone, and no product of the layer computed this gradient."""
    _, sparse = layer()
    x, optimiser = torch.randn(3, 8), torch.optim.SGD(sparse.parameters(), 0.1, fused=fused)
    for _ in range(3):
        sparse.requires_grad_(True)
        sparse.weight.square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        sparse.requires_grad_(False)
        close(sparse(x), F.linear(x, sparse.weight, sparse.bias))


class Tied(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x):
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.t())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_transforms_go_through_it(close):
    """It asked tensors of a transform for their memory, and they have none of their own."""
    linear, sparse = layer()
    x, held, found = torch.randn(3, 8), sparse.to_layout(), []
    for model in map(Tied, (linear, sparse)):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, row, model=model):
            return functional_call(model, parameters, (row[None],)).pow(3).sum()

        each = vmap(grad(loss), (None, 0))(parameters, x)
        outputs = vmap(model)(x), jvp(lambda r, weight=model.encoder.weight: F.linear(r, weight), (x,), (x,))[1]
        found.append((grad(loss)(parameters, x[0]), each, outputs))
    (one, each, outputs), (own, of_each, same) = found
    kept = replace(held, values=torch.ones_like(held.values)).to_dense()
    for output, expected in zip(same, outputs):
        close(output, expected)
    close(replace(held, values=own["encoder.values"]).to_dense(), one["encoder.weight"] * kept)
    rows = torch.stack([replace(held, values=row).to_dense() for row in of_each["encoder.values"]])
    close(rows, each["encoder.weight"] * kept)
    with pytest.raises(RuntimeError, match="expected to be read, got a write"):
        vmap(lambda row: row * sparse.weight.mul_(2).sum())(x)
