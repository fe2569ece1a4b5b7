"""A registered criterion as the method of the trainer, and what the trainer does to the models it is given."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sparseprune import Block, CubicSchedule
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.pruning import Criterion, criteria, register_criterion
from sparseprune.training import DistillConfig, DistillPruner


class Smoothed(Criterion):
    """|w| times the root of a running mean of squared gradients, updated in place."""

    name = "test_smoothed"
    needs_gradients = True

    def __init__(self) -> None:
        self.mean, self.calls = {}, 0

    def observe(self, weights, gradients):
        self.calls += 1
        for fqn, gradient in gradients.items():
            self.mean.setdefault(fqn, torch.zeros_like(gradient)).lerp_(gradient.square(), 0.1)

    def scores(self, context):
        return {fqn: w.abs() * self.mean[fqn].sqrt() for fqn, w in context.weights.items()}

    def state_dict(self):
        return {"mean": self.mean, "calls": self.calls}

    def load_state_dict(self, state):
        self.mean, self.calls = dict(state["mean"]), state["calls"]


class Size(Criterion):
    """|w| under another name."""

    name = "test_size"

    def scores(self, context):
        return {fqn: w.abs() for fqn, w in context.weights.items()}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    register_criterion("test_smoothed", Smoothed)
    register_criterion("test_size", Size)


class Killed(Exception):
    pass


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(poison=None):
    torch.manual_seed(1)
    found = []
    for i in range(6):
        x = torch.randn(16, 9)
        found.append((x if i != poison else x * float("nan"), x[:, :3].argmax(1)))
    return found


def config(method="test_smoothed", **settings):
    return DistillConfig(**{"method": method, "schedule": CubicSchedule(0.2), "epochs": 4.0, "lr": 1e-2, **settings})


def run(path=None, stop=None, data=None, **settings):
    def kill(record):
        if record["step"] == stop:
            raise Killed

    pruner = DistillPruner(model(), config(**settings))
    pruner.fit(data or batches(), checkpoint=path, checkpoint_every=1, callback=kill)
    return pruner


def test_a_criterion_of_ones_own_does_what_the_method_of_the_trainer_does():
    own, built_in = run(method="test_size"), run(method="magnitude")
    assert all(torch.equal(own.masks[name], mask) for name, mask in built_in.masks.items())
    for a, b in zip(own.finalize().parameters(), built_in.finalize().parameters()):
        assert torch.equal(a, b)


def test_the_movement_criterion_is_the_movement_method():
    class Moved(Criterion):
        needs_gradients = True

        def __init__(self):
            self.moved = {}

        def observe(self, weights, gradients):
            for fqn, gradient in gradients.items():
                self.moved[fqn] = self.moved.get(fqn, 0) - gradient * weights[fqn]

        def scores(self, context):
            return self.moved

    register_criterion("test_moved", Moved)
    own, built_in = run(method="test_moved"), run(method="movement")
    assert all(torch.equal(own.masks[name], mask) for name, mask in built_in.masks.items())


def test_a_criterion_of_gradients_prunes_units_to_the_exact_count():
    pruner = run(granularity={"4": "element", "*": Block(8, 1)})
    kept = sum(int(mask.sum()) for name, mask in pruner.masks.items() if name != "4")
    assert kept == 8 * (75 - round(0.8 * 75)) and pruner.gates.criterion.calls > 0
    assert set(pruner.gates.criterion.mean) == {"0", "2", "4"}
    plain = run(method="magnitude", granularity={"4": "element", "*": Block(8, 1)})
    assert any(not torch.equal(pruner.masks[name], mask) for name, mask in plain.masks.items())


def test_a_resume_goes_on_with_what_the_criterion_has_seen(tmp_path):
    whole = run()
    for stop in (3, 9):
        path = tmp_path / str(stop)
        with pytest.raises(Killed):
            run(path, stop)
        again = run(path)
        assert again.gates.criterion.calls == whole.gates.criterion.calls
        assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
        for a, b in zip(again.finalize().parameters(), copy.deepcopy(whole).finalize().parameters()):
            assert torch.equal(a, b)


def test_a_resume_goes_on_with_the_fisher_matrix_and_the_inverse_it_had(tmp_path):
    whole, path = run(method="fisher"), tmp_path / "killed"
    with pytest.raises(Killed):
        run(path, 11, method="fisher")  # inverted at 8, and next at 16
    again = run(path, method="fisher")
    for name, state in whole.gates.criterion.state.items():
        assert state["steps"].tolist()[1] > 11
        assert all(torch.equal(value, again.gates.criterion.state[name][key]) for key, value in state.items())
    assert all(torch.equal(again.masks[name], mask) for name, mask in whole.masks.items())
    plain = run(method="magnitude")
    assert any(not torch.equal(plain.masks[name], mask) for name, mask in whole.masks.items())


def test_a_run_that_goes_back_to_before_its_first_step_keeps_what_the_criterion_has_seen():
    class Poisoned:
        calls = 0

        def __call__(self, logits, targets):
            self.calls += 1
            return nn.functional.cross_entropy(logits, targets) * (float("nan") if 7 < self.calls < 11 else 1)

    pruner = DistillPruner(model(), config(method="fisher", epochs=4.0))
    history = pruner.fit(batches(), loss=Poisoned())
    assert any(event["event"] == "restored a snapshot" for event in history.events)
    assert pruner.gates.kept == pruner.gates.total - round(0.8 * pruner.gates.total)
    steps = {int(state["steps"][0]) for state in pruner.gates.criterion.state.values()}
    assert len(steps) == 1 and 7 < steps.pop() < 24


def test_a_run_too_short_for_a_gradient_says_so():
    with pytest.raises(ValueError, match=r"no gradient seen for 0, 2, 4; .*give a short run more time"):
        DistillPruner(model(), config(method="fisher", max_seconds=1e-7)).fit(batches())


def test_final_masks_need_no_more_of_what_the_criterion_saw(tmp_path):
    path = tmp_path / "killed"
    with pytest.raises(Killed):
        run(path, 22, method="fisher")
    small = tmp_path / "magnitude"
    with pytest.raises(Killed):
        run(small, 22, method="magnitude")
    assert path.stat().st_size < 1.2 * small.stat().st_size  # F alone has 32 times as many numbers as the weights
    whole, again = run(method="fisher"), run(path, method="fisher")
    for a, b in zip(again.finalize().parameters(), whole.finalize().parameters()):
        assert torch.equal(a, b)


def test_a_step_that_is_not_finite_is_not_observed():
    pruner = run(data=batches(poison=4), epochs=3.0)
    assert any("not finite" in event["event"] for event in pruner.history.events)
    assert all(bool(mean.isfinite().all()) for mean in pruner.gates.criterion.mean.values())


def test_the_adversary_takes_a_criterion_too():
    small = DiscriminatorConfig(depth=2, width=16, rows=16)
    pruner = GANPruner(model(), GANConfig(method="test_smoothed", schedule=CubicSchedule(0.2), discriminator=small))
    pruner.fit(batches())
    assert pruner.gates.kept == pruner.gates.total - round(0.8 * pruner.gates.total)


def test_methods_that_cannot_be_are_refused_by_name():
    with pytest.raises(ValueError, match="'rowwise'; call register_criterion first"):
        config(method="rowwise")
    with pytest.raises(ValueError, match="'wanda', which needs data; use prune_"):
        config(method="wanda")
    with pytest.raises(ValueError, match="register_criterion first"):
        DistillConfig.from_json(config().to_json().replace("test_smoothed", "never_registered"))
    assert DistillConfig.from_json(config().to_json()) == config()

    class Short(Criterion):
        name = "test_short"

        def scores(self, context):
            return {"0": context.weights["0"]}

    register_criterion("test_short", Short)
    with pytest.raises(ValueError, match=r"'test_short': scores of '2' expected shape \[16, 24\], got none"):
        run(method="test_short")


def test_the_teacher_given_stays_as_trainable_as_it_was():
    dense = model()
    dense[0].weight.requires_grad_(False)
    before = copy.deepcopy(dense.state_dict())
    for _ in range(2):
        student = copy.deepcopy(dense)
        pruner = DistillPruner(student, config("scores"), teacher=dense)
        pruner.fit(batches())
        pruner.finalize()
        assert [p.requires_grad for p in dense.parameters()] == [False] + [True] * 5 and not dense.training
        assert all(p.grad is None for p in dense.parameters())
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_a_student_that_cannot_learn_is_refused():
    with pytest.raises(ValueError, match=r"no trainable weight in the student, expected .*requires_grad_"):
        DistillPruner(model().requires_grad_(False))
