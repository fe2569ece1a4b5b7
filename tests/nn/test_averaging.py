"""Averaged models: the values of sparse layers are averaged, where they lie is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from sparseprune.nn import MaskedLinear, SparseLinear

WAYS = {
    "swa": (dict, lambda weights: sum(weights) / len(weights)),
    "ema": (lambda: {"avg_fn": get_ema_avg_fn(0.9)}, lambda weights: ema(weights)),
    "ema at once": (lambda: {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, lambda weights: ema(weights)),
}


def ema(weights):
    found = weights[0]
    for weight in weights[1:]:
        found = 0.9 * found + 0.1 * weight
    return found


def pruned(layout: str, density: float = 0.3) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(60, 48)
    with torch.no_grad():
        linear.weight.mul_(torch.rand(3, 60).repeat_interleave(16, 0) < density)
        if layout == "nm":
            linear.weight.view(48, 15, 4)[:, :, 1:3] = 0
    return linear


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("layout", ["csr", "bsr", "nm"])
@pytest.mark.parametrize("called", [False, True])
def test_values_are_averaged_and_indices_stay(layout, use_buffers, way, called):
    options, average = WAYS[way]
    model = nn.Sequential(SparseLinear.from_linear(pruned(layout), layout), nn.BatchNorm1d(48)).eval()
    averaged = AveragedModel(model, use_buffers=use_buffers, **options()).eval()
    x, layer, weights, shifts = torch.randn(5, 60), averaged.module[0], [], []
    for step in range(4):
        with torch.no_grad():
            model[0].values.mul_(-0.5).add_(0.1)
            model[1].running_mean.add_(step)
            weights.append(model[0].weight.clone())
            shifts.append(model[1].running_mean.clone())
            if called:
                averaged(x)
        averaged.update_parameters(model)
    for name, index in model[0].named_buffers():
        assert torch.equal(layer.get_buffer(name), index) and layer.get_buffer(name) is not index
    torch.testing.assert_close(layer.weight.clone(), average(weights), rtol=1e-5, atol=1e-6)
    expected = average(shifts) if use_buffers else shifts[-1]  # others are averaged as ever
    torch.testing.assert_close(averaged.module[1].running_mean, expected)
    with torch.no_grad():
        product = nn.functional.linear(x, average(weights), model[0].bias)
        torch.testing.assert_close(averaged(x), averaged.module[1](product), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_another_structure_has_no_average(use_buffers):
    linear = pruned("csr")
    model = nn.Sequential(nn.ReLU(), SparseLinear.from_linear(linear))
    averaged = AveragedModel(model, use_buffers=use_buffers)
    averaged.update_parameters(model)
    before = copy.deepcopy(averaged.state_dict())
    model[1].load_state_dict({"weight": linear.weight.detach().flip(1), "bias": linear.bias.detach()}, strict=False)
    with pytest.raises(ValueError, match=r"AveragedModel: 1\.col_indices expected the structure .*MaskedLinear"):
        averaged.update_parameters(model)
    after = averaged.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    AveragedModel(model, use_buffers=use_buffers).update_parameters(model)


@pytest.mark.parametrize("way", ["ema", "ema at once"])
def test_masks_keep_their_weights(way):
    options, average = WAYS[way]
    model = nn.Sequential(MaskedLinear.from_linear(pruned("csr")))
    averaged, weights = AveragedModel(model, use_buffers=True, **options()), []
    for _ in range(3):
        model[0].set_mask_(model[0].mask & (torch.rand(48, 60) < 0.8))
        weights.append(model[0].weight.detach().clone())
        averaged.update_parameters(model)
    x = torch.randn(5, 60)
    expected = nn.functional.linear(x, average(weights), model[0].bias)
    torch.testing.assert_close(averaged(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_by_itself_and_a_model_without_one():
    linear = pruned("csr")
    layer = SparseLinear.from_linear(linear)
    for model in (layer, linear):
        averaged = AveragedModel(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for _ in range(2):
            averaged.update_parameters(model)
        torch.testing.assert_close(averaged.module.weight.clone(), linear.weight)
