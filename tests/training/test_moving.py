"""Sparse products while the masks still move: the same function, the dense gradient of the weight, the same run."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseprune import _native
from sparseprune.gan import GANConfig, GANPruner
from sparseprune.pruning.schedules import CubicSchedule
from sparseprune.training import DistillConfig, DistillPruner
from sparseprune.training.moving import MovingLinear, move_sparse_

needs_core = pytest.mark.skipif(_native.C is None, reason="the compiled core is not built")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))


def data(count=6):
    torch.manual_seed(1)
    return [(torch.randn(16, 192), torch.randint(0, 4, (16,))) for _ in range(count)]


def config(kind=DistillConfig, **more):
    return kind(**{"schedule": CubicSchedule(0.1), "steps": 24, "scope": "layer", **more})


def moving(own):
    return [name for name, layer in own.named_modules() if isinstance(layer, MovingLinear)]


@pytest.mark.parametrize("bias", [True, False])
def test_the_function_is_the_masked_linear_s_and_the_weight_s_gradient_is_dense(bias):
    torch.manual_seed(0)
    linear, mask = nn.Linear(48, 32, bias), torch.rand(32, 48) < 0.1
    with torch.no_grad():
        linear.weight.mul_(mask)
    layer = MovingLinear(linear)
    layer.follow_(mask)
    parts = []
    for module in (layer, linear):
        x = torch.linspace(-1, 1, 5 * 7 * 48).view(5, 7, 48).requires_grad_()
        y = module(x)
        y.square().sum().backward()
        parts.append([y.detach(), x.grad, *(p.grad.clone() for p in linear.parameters())])
        linear.zero_grad()
    for a, b in zip(*parts):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert parts[0][2][~mask].abs().sum() > 0
    assert layer.weight is linear.weight and list(layer.state_dict()) == list(linear.state_dict())


@needs_core
@pytest.mark.parametrize("granularity", ["element", {"4": "element", "*": "16x1"}])
@pytest.mark.parametrize("method", ["scores", "movement", "magnitude", "fisher"])
def test_a_run_is_the_dense_one_up_to_rounding(method, granularity):
    seen, runs = set(), {}
    for heal in ("auto", "dense"):
        pruner = DistillPruner(model(), config(method=method, granularity=granularity, heal=heal))

        def watch(record, pruner=pruner, heal=heal):
            seen.add((heal, record["phase"], bool(moving(pruner.model))))

        history = pruner.fit(data(), callback=watch)
        runs[heal] = [step["loss"] for step in history.steps], pruner.masks
    assert ("auto", "prune", True) in seen and ("auto", "prune", False) in seen  # few kept, and many
    assert not {("dense", "prune", True), ("auto", "heal", True)} & seen
    torch.testing.assert_close(torch.tensor(runs["auto"][0]), torch.tensor(runs["dense"][0]), rtol=1e-3, atol=1e-4)
    for name, mask in runs["dense"][1].items():  # a score that rounding moved may swap with its neighbour
        assert (mask != runs["auto"][1][name]).float().mean() < 0.002, name


@needs_core
def test_the_adversary_s_run_is_the_dense_one_up_to_rounding():
    losses = []
    for heal in ("auto", "dense"):
        pruner = GANPruner(model(), config(GANConfig, heal=heal))
        losses.append([step["loss"] for step in pruner.fit(data()).steps])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-4)


@needs_core
def test_a_run_that_is_stopped_leaves_plain_linears_and_goes_on_to_the_bit(tmp_path):
    whole = DistillPruner(model(), config())
    expected = [step["loss"] for step in whole.fit(data(), checkpoint=tmp_path / "whole", checkpoint_every=5).steps]

    def stop(record):
        if record["step"] == 12:
            assert len(moving(first.model)) == 2  # the last Linear is too small to pay
            raise KeyboardInterrupt

    first = DistillPruner(model(), config())
    with pytest.raises(KeyboardInterrupt):
        first.fit(data(), checkpoint=tmp_path / "own", checkpoint_every=5, callback=stop)
    assert not moving(first.model) and [type(layer) for layer in first.model][::2] == [nn.Linear] * 3
    second = DistillPruner(model(), config())
    second.fit(data(), checkpoint=tmp_path / "own", checkpoint_every=5)
    assert [step["loss"] for step in second.history.steps] == expected
    for name, mask in whole.masks.items():
        assert torch.equal(mask, second.masks[name])
    for a, b in zip(whole.finalize().parameters(), second.finalize().parameters()):
        assert torch.equal(a, b)


@needs_core
def test_a_copy_and_a_pickle_from_within_a_run_are_plain():
    found = []

    def take(record):
        if moving(pruner.model) and not found:
            stored = io.BytesIO()
            torch.save(pruner.model, stored)
            stored.seek(0)
            found.extend([copy.deepcopy(pruner.model), torch.load(stored, weights_only=False)])
            layer = pruner.model[0]
            one = copy.copy(layer)
            assert type(one) is nn.Linear and one is not layer.original and one.weight is layer.weight

    pruner = DistillPruner(model(), config())
    pruner.fit(data(), callback=take)
    assert len(found) == 2
    for own in found:
        assert not moving(own)
        with torch.no_grad():  # other weights: no mask of that step may stand in their way
            own[0].weight.fill_(1.0)
        x = torch.randn(3, 192)
        torch.testing.assert_close(own[0](x), x.sum(1, keepdim=True) + own[0].bias)


@needs_core
def test_a_restored_snapshot_is_not_read_through_the_masks_of_a_later_step():
    kept, found = {}, []

    def go_back(record):
        if record["density"] < 0.2:
            if not kept:
                kept.update(pruner._tensors())
            elif not found:
                pruner._restore_tensors(kept)
                x = torch.randn(3, 192)
                plain = model()
                plain.load_state_dict(pruner.model.state_dict())
                found.append((pruner.model(x), plain(x)))

    pruner = DistillPruner(model(), config())
    pruner.fit(data(), callback=go_back)
    torch.testing.assert_close(*found[0])


@pytest.mark.parametrize(
    "more",
    [
        {"autocast": "bfloat16"},
        {"autocast": "bfloat16", "value_dtype": "int8"},  # which rounds once the masks are hard, not before
        {"heal": "dense"},
        {"schedule": CubicSchedule(0.3)},
    ],
)
def test_products_stay_dense_in_bfloat16_where_it_is_asked_for_and_where_much_is_kept(more):
    found, phases, pruner = [], set(), DistillPruner(model(), config(steps=12, **more))

    def watch(record):
        phases.add(record["phase"])
        found.extend(moving(pruner.model))

    pruner.fit(data(), callback=watch)
    assert not found and phases == {"prune", "heal"}


@needs_core
def test_hooks_and_names_that_a_model_has_stay():
    own, seen = model(), []
    own[0].register_forward_hook(lambda *args: seen.append(1))
    pruner = DistillPruner(own, config())
    pruner.fit(data(), callback=lambda record: seen.append(moving(pruner.model)))
    assert all(found in ([], ["2"]) for found in seen if found != 1) and ["2"] in seen  # a hook sees the layer it is on
    assert seen.count(1) >= 24 and list(own.state_dict()) == list(model().state_dict())


@needs_core
@pytest.mark.parametrize("put", ["copy_", "data"])
def test_weights_that_a_callback_puts_into_the_model_are_read_whole(put):
    """An average of the weights of many steps, say, which is 0 under no mask."""
    found = []

    def look(record):
        if moving(pruner.model):
            own, other, x = pruner.model, model(), torch.randn(3, 192)
            held = copy.deepcopy(own.state_dict())
            for mine, theirs in zip(own.parameters(), other.parameters()):
                (mine.data if put == "data" else mine.detach()).copy_(theirs.detach())
            found.append((own(x), other(x)))
            own.load_state_dict(held)

    pruner = DistillPruner(model(), config())
    pruner.fit(data(), callback=look)
    assert found
    for pair in found:
        torch.testing.assert_close(*pair)


class Perturbed(nn.Module):
    """Calls its layers with other weights than they hold."""

    def __init__(self):
        super().__init__()
        self.inner = model()

    def forward(self, x):
        lent = {name: own + 0.01 for name, own in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, lent, (x,))


@needs_core
def test_weights_that_a_forward_lends_its_layers_are_read_whole():
    losses = []
    for heal in ("auto", "dense"):
        pruner, seen = DistillPruner(Perturbed(), config(features="logits", heal=heal)), []
        steps = pruner.fit(data(), callback=lambda record, p=pruner, seen=seen: seen.extend(moving(p.model))).steps
        losses.append([step["loss"] for step in steps if step["phase"] == "prune"])
        assert bool(seen) == (heal == "auto")
    torch.testing.assert_close(*map(torch.tensor, losses))


@needs_core
def test_a_run_goes_on_where_a_linear_has_a_buffer_of_its_own(tmp_path):
    def own():
        found = model()
        found[0].register_buffer("seen", torch.zeros(2))
        return found

    def stop(record):
        if record["step"] == 12:
            raise KeyboardInterrupt

    first = DistillPruner(own(), config())
    with pytest.raises(KeyboardInterrupt):
        first.fit(data(), checkpoint=tmp_path / "own", checkpoint_every=4, callback=stop)
    second = DistillPruner(own(), config())
    second.fit(data(), checkpoint=tmp_path / "own", checkpoint_every=4)
    assert "0.seen" in second.finalize().state_dict()


def test_masks_are_not_counted_where_no_layer_can_be_sparse():
    own, dense = nn.Linear(192, 256), config(heal="dense")
    move_sparse_(nn.Sequential(own), SimpleNamespace(masks={"0": None}, config=dense, frozen=False))
