"""AdamW under masks: zeros stay zero, everything else is torch's AdamW."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune import optim


def pruned_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(17, 32), nn.ReLU(), nn.Linear(32, 3)).to(dtype)
    with torch.no_grad():
        model[0].weight[torch.rand(32, 17) < 0.9] = 0
    return model


def run(model, optimizers, steps, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(8, 17, generator=generator).to(dtype)
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_kept_entries_follow_torch_and_zeros_stay_exactly_zero():
    ours, theirs = pruned_model(), pruned_model()
    zeros = ours[0].weight == 0
    a = sp.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(30):
        for model, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            model(torch.randn(8, 17, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            theirs[0].weight[zeros] = 0
        assert torch.equal(ours[0].weight == 0, zeros)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    state = a.state[ours[0].weight]
    assert not state["exp_avg"][zeros].any() and not state["exp_avg_sq"][zeros].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    model = pruned_model(dtype)
    zeros = model[0].weight == 0
    optimizer = sp.AdamW(model.parameters(), lr=1e-2)
    before = model[0].weight.detach().clone()
    run(model, [optimizer], 5, dtype)
    assert torch.equal(model[0].weight == 0, zeros) and not torch.equal(model[0].weight, before)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == wide


def test_which_zeros_are_held_without_masks():
    matrix, vector = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.zeros(4))
    fresh, dense = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.ones(2, 2))
    with torch.no_grad():
        matrix[0] = 0
    optimizer = sp.AdamW([{"params": [matrix, vector, fresh]}])
    optimizer.add_param_group({"params": [dense], "lr": 0.5})
    assert set(optimizer.masks()) == {matrix}
    for p in (matrix, vector, fresh, dense):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not matrix[0].any() and vector.all() and fresh.all() and bool((dense < 0.6).all())


def test_masks_given_by_parameter_name_and_list():
    model = pruned_model()
    mask = torch.zeros(32, 17, dtype=torch.bool)
    mask[:5] = True
    for masks, params in (
        ({model[0].weight: mask}, model.parameters()),
        ({"0.weight": mask}, model.named_parameters()),
        ([mask, None, None, None], model.parameters()),
    ):
        fresh = sp.AdamW(params, masks=masks)
        assert [m.sum() for m in fresh.masks().values()] == [85]
    run(model, [fresh], 1)
    assert not model[0].weight[5:].any()
    fresh.set_masks({model[0].weight: None})
    run(model, [fresh], 1)
    assert model[0].weight[5:].any()


def test_bad_arguments():
    model = pruned_model()
    for keywords, message in (
        ({"lr": -1}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"masks": [None]}, "4 entries"),
        ({"masks": {"nothing": torch.ones(1)}}, "nothing"),
        ({"masks": [torch.ones(2, 2, dtype=torch.bool), None, None, None]}, r"bool of shape \[32, 17\]"),
    ):
        with pytest.raises(ValueError, match=message):
            sp.AdamW(model.parameters(), **keywords)
    sparse = nn.Embedding(4, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="SparseAdam"):
        sp.AdamW(sparse.parameters()).step()


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "capturable", "differentiable"])
def test_options_that_ask_for_another_step_are_refused(option):
    """In a group, in one that is added, in a state of torch's AdamW, and in a group that is changed later."""
    model = pruned_model()
    message = f"AdamW: {option} expected False or left out, got True; "
    with pytest.raises(ValueError, match=message):
        sp.AdamW([{"params": list(model.parameters()), option: True}])
    optimizer = sp.AdamW(model[0].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": list(model[2].parameters()), option: True})
    assert len(optimizer.param_groups) == 1
    theirs = torch.optim.AdamW(model[0].parameters()).state_dict()
    theirs["param_groups"][0].update({option: True, "lr": 0.5})
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(theirs)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_a_state_of_torch_is_taken_over():
    """Its options at their defaults, and those by which torch only chooses among its ways to one result."""
    ours, theirs = pruned_model(), pruned_model()
    b = torch.optim.AdamW(theirs.parameters(), lr=1e-2, foreach=True)
    run(theirs, [b], 3)
    ours.load_state_dict(theirs.state_dict())
    a = sp.AdamW(ours.parameters(), masks=[None] * 4)
    a.load_state_dict(b.state_dict())
    run(ours, [a], 3)
    run(theirs, [b], 3)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_the_decay_of_adam_is_refused_and_groups_have_their_numbers_checked():
    model = pruned_model()
    adam = torch.optim.Adam(model.parameters(), weight_decay=0.1)
    with pytest.raises(ValueError, match="decoupled_weight_decay expected True"):
        sp.AdamW(model.parameters()).load_state_dict(adam.state_dict())
    sp.AdamW(model.parameters()).load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="lr expected to be at least 0, got -1"):
        sp.AdamW([{"params": list(model.parameters()), "lr": -1}])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_is_bit_identical(dtype):
    straight = pruned_model(dtype)
    optimizer = sp.AdamW(straight.parameters(), lr=1e-2)
    run(straight, [optimizer], 3, dtype)
    buffer = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer)
    resumed = pruned_model(dtype)
    resumed.load_state_dict(saved["model"])
    again = sp.AdamW(resumed.parameters(), masks=[None] * 4)
    again.load_state_dict(saved["optimizer"])
    assert again.state[resumed[0].weight]["mask"].dtype == torch.bool
    for model, optimiser in ((straight, optimizer), (resumed, again)):
        run(model, [optimiser], 3, dtype)
    for p, q in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(p, q)


def test_schedulers_closures_and_deepcopy():
    model = pruned_model()
    optimizer = sp.AdamW(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 17)).sum()
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    scheduler.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    twin = copy.deepcopy(optimizer)
    assert len(twin.masks()) == 1
    twin.add_param_group({"params": [nn.Parameter(torch.eye(3))]})
    assert len(twin.masks()) == 2


def test_a_step_is_not_recorded_in_a_cuda_graph(monkeypatch):
    """Its number and learning rate would be those of the recording in every replay. Asked of the parameters' device."""
    model = pruned_model()
    optimizer = sp.AdamW(model.parameters())
    optimizer.step()
    monkeypatch.setattr(optim, "capturing", lambda device: device.type == "cpu")
    with pytest.raises(RuntimeError, match=r"AdamW: step\(\) expected outside of a CUDA graph"):
        optimizer.step()
