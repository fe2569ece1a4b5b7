"""MaskedLinear holds its zeros: forward, gradient, any optimiser, copies and saving."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseprune import MaskedLinear

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def layer(rows=7, columns=11):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows)
    return MaskedLinear.from_linear(linear, torch.rand(rows, columns) < 0.4)


def test_forward_and_gradient(close):
    masked = layer()
    x = torch.randn(5, 11)
    close(masked(x), F.linear(x, masked.weight * masked.mask, masked.bias))
    masked(x).square().sum().backward()
    assert not masked.weight.grad[~masked.mask].any()
    assert masked.weight.grad[masked.mask].any()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("copier", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_no_optimiser_resurrects_a_zero(name, copier):
    masked = layer()
    loose = nn.Parameter(masked.weight.detach().clone())  # momentum gathered before the mask came
    optimizer = OPTIMIZERS[name]([masked.weight, masked.bias, loose])
    full = masked.mask.clone()
    masked.set_mask_(torch.ones_like(full))
    for _ in range(2):
        masked(torch.randn(5, 11)).square().sum().backward()
        optimizer.step()
    masked.set_mask_(full)
    masked = copier(masked)
    if copier.__name__ != "<lambda>" or all(
        p is not masked.weight for g in optimizer.param_groups for p in g["params"]
    ):
        optimizer = OPTIMIZERS[name](masked.parameters())
    for _ in range(3):
        optimizer.step()
        assert not masked.weight[~full].any()
        assert masked.weight[full].all()


def test_it_is_a_linear_and_shares_its_parameters():
    linear = nn.Linear(4, 3)
    masked = MaskedLinear.from_linear(linear)
    assert isinstance(masked, nn.Linear)
    assert masked.weight is linear.weight and masked.bias is linear.bias
    assert set(masked.state_dict()) == {"weight", "bias", "mask"}


def test_state_dict_with_and_without_a_mask():
    masked, dense = layer(), nn.Linear(11, 7)
    kept = masked.mask.clone()
    masked.load_state_dict(dense.state_dict())
    assert torch.equal(masked.mask, kept)
    assert torch.equal(masked.weight, dense.weight * kept)
    other = MaskedLinear(11, 7, mask=torch.rand(7, 11) < 0.5)
    masked.load_state_dict(other.state_dict())
    assert torch.equal(masked.mask, other.mask)


@pytest.mark.parametrize("mask", [torch.ones(7, 11), torch.ones(11, 7, dtype=torch.bool)])
def test_a_wrong_mask_is_refused(mask):
    with pytest.raises(ValueError, match=r"mask expected bool \[7, 11\]"):
        layer().set_mask_(mask)
