"""Healing on the sparse kernels: the same function and gradients, the same parameters, the same resume."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseprune import _native
from sparseprune.data import RowLoader
from sparseprune.nn.simulated import SimulatedLinear
from sparseprune.nn.stand_in import StandIn, put_back_
from sparseprune.training import DistillConfig, DistillPruner
from sparseprune.training.healing import HealingLinear, heal_sparse_

needs_core = pytest.mark.skipif(_native.C is None, reason="the compiled core is not built")


@pytest.mark.parametrize("blocksize", [None, (16, 1)])
def test_the_function_and_its_gradients_are_those_of_the_masked_linear(blocksize):
    torch.manual_seed(0)
    linear = nn.Linear(48, 32)
    mask = torch.rand(32 // 16, 48) < 0.3 if blocksize else torch.rand(32, 48) < 0.2
    mask = mask.repeat_interleave(16, 0) if blocksize else mask
    with torch.no_grad():
        linear.weight.mul_(mask)
        linear.weight.view(-1)[mask.view(-1).nonzero()[0]] = (
            0.0  # kept, and zero by chance: it has a gradient all the same
        )
    layer = HealingLinear(linear, mask, blocksize)
    x = torch.randn(5, 7, 48)
    found, expected = [], []
    for module, out in ((layer, found), (linear, expected)):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        out += [y.detach(), own.grad, linear.weight.grad.clone(), linear.bias.grad.clone()]
        linear.weight.grad = linear.bias.grad = None
    expected[2] = expected[2] * mask
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert list(layer.state_dict()) == list(linear.state_dict()) and layer.weight is linear.weight


@pytest.mark.parametrize("blocksize", [None, (1, 4), (16, 1)])
@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_a_call_makes_no_index_anew(blocksize, value_dtype):
    torch.manual_seed(0)
    r, c = blocksize or (1, 1)
    mask = (torch.rand(32 // r, 48 // c) < 0.3).repeat_interleave(r, 0).repeat_interleave(c, 1)
    layer = HealingLinear(nn.Linear(48, 32), mask, blocksize, value_dtype, value_dtype)
    seen = set()

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(str(func).split(".")[1])
            return func(*args, **kwargs or {})

    with Watching():
        layer(torch.randn(5, 48))
    assert "index_select" in seen and not seen & {"arange", "floor_divide", "nonzero"}


def test_a_shared_layer_heals_under_every_name():
    model = nn.Module()
    model.first = model.second = nn.Linear(256, 256)
    original = model.first
    masks = {"first": torch.rand(256, 256) < 0.1}
    config = DistillConfig(heal="auto", value_dtype="int8")
    gates = SimpleNamespace(config=config, masks=masks, free=lambda name: None)
    made, _, _ = heal_sparse_(model, gates)
    kind = HealingLinear if made else SimulatedLinear
    assert model.first is model.second and type(model.first) is kind
    put_back_(model)
    assert model.first is model.second is original


def test_a_forward_that_was_replaced_is_kept():
    model = nn.Sequential(nn.Linear(256, 256))
    plain = model[0].forward
    model[0].forward = lambda input: plain(input) + 1
    gates = SimpleNamespace(
        config=DistillConfig(value_dtype="int8"), masks={"0": torch.rand(256, 256) < 0.1}, free=lambda name: None
    )
    x = torch.randn(3, 256)
    expected = model(x)
    made, left, exact = heal_sparse_(model, gates)
    assert made == [] and "forward was replaced" in left["0"] and "forward was replaced" in exact["0"]
    assert torch.equal(model(x), expected)


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 256), nn.ReLU(), nn.Linear(256, 4))
    x = torch.randn(256, 200)
    return model, RowLoader(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long(), 32, shuffle=True)


def fit(heal, checkpoint=None, stop=None, **more):
    model, loader = model_and_data()
    pruner = DistillPruner(model, DistillConfig(steps=20, heal=heal, ce=1.0, **more))

    def callback(record):
        if stop is not None and record["step"] + 1 == stop:
            raise KeyboardInterrupt

    pruner.fit(loader, loader, checkpoint=checkpoint, checkpoint_every=1, callback=callback)
    return pruner, model


@needs_core
def test_a_run_heals_sparse_where_it_pays_and_gives_the_plain_linears_back():
    pruner, model = fit("auto")
    (event,) = [e for e in pruner.history.events if e["event"].startswith("healing")]
    assert event["layers"] == ["0"] and "fewer than" in event["left"]["2"]
    first = model[0]
    done = pruner.finalize()
    assert done[0] is first and type(first) is nn.Linear and next(iter(done.state_dict())) == "0.weight"
    other, _ = fit("dense")
    other.finalize()
    assert not [e for e in other.history.events if e["event"].startswith("healing") and e["layers"]]
    for name in pruner.masks:
        assert torch.equal(pruner.masks[name], other.masks[name])
    torch.testing.assert_close(done[0].weight, other.model[0].weight, rtol=1e-3, atol=1e-4)
    kept = pruner.masks["0"]
    assert not done[0].weight[~kept].any()


@needs_core
def test_a_run_stopped_while_it_heals_goes_on_to_the_bit(tmp_path):
    whole, _ = fit("auto")
    with pytest.raises(KeyboardInterrupt):
        fit("auto", tmp_path / "c.pt", stop=17)
    again, _ = fit("auto", tmp_path / "c.pt")
    for a, b in zip(whole.finalize().parameters(), again.finalize().parameters()):
        assert torch.equal(a, b)


@needs_core
@pytest.mark.parametrize("more", [{}, {"value_dtype": "int8", "activations": "int8"}, {"compensation": "low_rank"}])
def test_a_run_stopped_while_it_heals_leaves_plain_linears_and_goes_on(more):
    """Weights that were loaded into the model afterwards met the old masks in its products, a second run's too."""

    def pruner():
        model, loader = model_and_data()
        return DistillPruner(model, DistillConfig(steps=20, ce=1.0, **more)), model, loader

    def stop(record):
        if record["step"] == 17:
            raise KeyboardInterrupt

    whole, expected, loader = pruner()
    whole.fit(loader)  # without a best state, in which a difference would be lost
    whole.finalize()
    stopped, model, loader = pruner()
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(loader, callback=stop)
    assert stopped.gates.frozen and not any(isinstance(m, StandIn) for m in model.modules())
    kinds = []
    stopped.fit(loader, callback=lambda _: kinds.append({type(m) for m in stopped.model.modules()}))
    assert len(kinds) == 2 and all(HealingLinear in found for found in kinds)  # and on sparse kernels, as before
    found, wanted = stopped.finalize().state_dict(), expected.state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@needs_core
def test_a_model_that_is_copied_while_it_heals_computes_the_same():
    seen = []

    class Watching(DistillPruner):
        def _evaluate(self, loader, task):
            if self.gates.frozen and not seen:
                twin = copy.deepcopy(self.model)
                x = torch.randn(3, 200)
                with torch.no_grad():
                    before = self.model(x)
                    put_back_(twin)
                    seen.append((before, twin(x)))
            return super()._evaluate(loader, task)

    model, loader = model_and_data()
    Watching(model, DistillConfig(steps=20)).fit(loader, loader)
    torch.testing.assert_close(*seen[0], rtol=1e-4, atol=1e-5)


def test_smoothing_changes_the_training_and_not_the_validation():
    losses = {}
    for share in (0.0, 0.3):
        pruner, _ = fit("dense", label_smoothing=share, lr=0.0)
        losses[share] = (pruner.history.steps[0]["ce"], pruner.history.evaluations[0]["loss"])
    assert losses[0.3][0] != losses[0.0][0] and losses[0.3][1] == pytest.approx(losses[0.0][1], rel=0.2)
    model, loader = model_and_data()
    with pytest.raises(ValueError, match="label_smoothing expected"):
        DistillPruner(model, DistillConfig(steps=2, label_smoothing=0.1)).fit(loader, loss=nn.MSELoss)


def test_noise_reaches_student_and_teacher_alike():
    from sparseprune.runner.text_encoder import TextEncoder

    torch.manual_seed(0)
    model = TextEncoder(30, 3, hidden=16, ffn=32, layers=1, heads=2, dropout=0.0)
    ids = torch.randint(4, 30, (8, 6))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(8) % 3}]
    seen = {}
    for noise in (0.0, 0.5):
        pruner = DistillPruner(copy.deepcopy(model), DistillConfig(steps=1, input_noise=noise, lr=0.0, warmup=0.4))
        pruner.fit(batches)
        seen[noise] = pruner.history.steps[0]
    assert seen[0.5]["ce"] != seen[0.0]["ce"]
    assert (
        seen[0.0]["hidden"] < 1e-9 and seen[0.5]["hidden"] < 1e-9
    )  # the student is still dense: equal noise, equal states
