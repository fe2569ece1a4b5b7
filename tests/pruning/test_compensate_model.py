"""compensate_ on a whole model: never more parameters, never a worse fit on the inputs it was judged by, sparse where
a low-rank term earns its place.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseprune as sp


def low_rank_model():
    """Weights that are mostly of rank 2: there a low-rank term beats any choice of kept weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        for linear in (model[0], model[2]):
            linear.weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64) + 0.05 * torch.randn(64, 64))
    return model


def test_the_outputs_come_closer_within_the_budget():
    dense = low_rank_model().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    kept = {name: int((m.weight != 0).sum()) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    data, held_out = torch.randn(8, 64, 64), torch.randn(256, 64)
    with torch.no_grad():
        before = (model(held_out) - dense(held_out)).square().mean()
        report = sp.compensate_(model, dense, list(data))
        after = (model(held_out) - dense(held_out)).square().mean()
    assert after < 0.5 * before
    for name, layer in report.layers.items():
        assert layer.parameters <= layer.budget == kept[name]
    sparse = [m for m in model.modules() if isinstance(m, sp.SparseLinear)]
    assert sparse and all(m.low_rank_a is not None for m in sparse)
    assert "rank" in str(report)


def test_without_ranks_the_masks_and_the_modules_stay():
    dense = low_rank_model().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    masks = [m.weight != 0 for m in model if isinstance(m, nn.Linear)]
    sp.compensate_(model, dense, [torch.randn(512, 64)], ranks=())
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(not bool((m.weight[~mask]).any()) for m, mask in zip([model[0], model[2]], masks))
    assert model[2].bias is None


def test_bad_input():
    dense = low_rank_model()
    with pytest.raises(ValueError, match="none with zeros"):
        sp.compensate_(copy.deepcopy(dense), dense, [torch.randn(64, 64)])
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    with pytest.raises(ValueError, match="expected a Linear"):
        sp.compensate_(model, nn.Sequential(nn.Linear(3, 3)), [torch.randn(64, 64)])


def test_an_error_in_a_later_layer_leaves_the_model_as_it_was():
    dense = low_rank_model()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.5)
    with torch.no_grad():
        model[0].bias[3] = float("nan")  # the second layer reads NaN, the first does not
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="finite"):
        sp.compensate_(model, dense, [torch.randn(64, 64)])
    assert all(torch.equal(before[n].nan_to_num(7), t.nan_to_num(7)) for n, t in model.state_dict().items())


def test_a_model_that_is_a_linear_is_compensated_without_a_low_rank_term():
    dense = low_rank_model()[0]
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    report = sp.compensate_(model, dense, [torch.randn(512, 64)])
    assert report.layers[""].rank == 0 and type(model) is nn.Linear


class Twice(nn.Module):
    """A layer that it calls under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = low_rank_model()[0]

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_layer_of_two_names_stays_one():
    dense = Twice().eval()
    model = copy.deepcopy(dense)
    sp.prune_(model, sparsity=0.8)
    seen = []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(512, 64)
    before = (model(x) - dense(x)).square().mean()
    report = sp.compensate_(model, dense, [x])
    assert list(report.layers) == ["a"] and model.a is model.b and model.a.low_rank_a is not None
    seen.clear()
    assert (model(x) - dense(x)).square().mean() < before and len(seen) == 2
