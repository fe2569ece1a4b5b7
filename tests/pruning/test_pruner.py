from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.pruning import Criterion, Fisher, PruneConfig, Pruner
from sparseprune.pruning.criteria import Movement


def build(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def optimisers():
    return {
        "sp.AdamW": lambda p: sp.AdamW(p, lr=1e-2, weight_decay=0.1),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    }


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 12, generator=generator), torch.randn(6, 8, generator=generator)


def train(model, optimizer, pruner, steps, start=0):
    """Runs the steps; returns the density and the exact zeros after each."""
    seen = []
    for step in range(start, start + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        density = pruner.step()
        seen.append((density, sum(int((m.weight == 0).sum()) for m in model if isinstance(m, nn.Linear))))
    return seen


TOTAL = 12 * 16 + 16 * 8
CONFIG = PruneConfig(schedule=sp.CubicSchedule(0.1), begin=3, end=20, every=4)
CRITERIA = ["magnitude", "movement", "soft_movement", "uncertainty", "fisher", "random"]


@pytest.mark.parametrize("optimiser", optimisers())
@pytest.mark.parametrize("criterion", CRITERIA)
def test_counts_are_exact_at_every_step_and_zeros_stay(optimiser, criterion):
    model = build()
    optimizer = optimisers()[optimiser](model.parameters())
    config = PruneConfig(schedule=sp.CubicSchedule(0.1), criterion=criterion, begin=3, end=20, every=4)
    pruner = Pruner(model, config).prepare(optimizer)
    names = list(model.state_dict())
    seen = train(model, optimizer, pruner, 30)
    assert [s for s, (d, z) in enumerate(seen, 1) if s <= 3 and (d, z) != (1, 0)] == []
    for density, zero in seen[3:]:
        assert zero == round((1 - density) * TOTAL)
    assert sorted({d for d, _ in seen}, reverse=True) == list(dict.fromkeys(d for d, _ in seen))
    changes = [s for s in range(2, 31) if seen[s - 1][0] != seen[s - 2][0]]
    assert changes == [4, 8, 12, 16, 20]
    assert pruner.frozen and pruner.density == 0.1 and seen[-1][1] == TOTAL - pruner.masks.kept
    assert pruner.finalize() is model and list(model.state_dict()) == names
    assert not optimizer._optimizer_step_pre_hooks and pruner.report().kept == TOTAL - round(0.9 * TOTAL)
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.step()


@pytest.mark.parametrize("granularity", [sp.Block(4, 1), sp.NM(1, 4), {"0": sp.Block(1, 4), "*": "element"}], ids=str)
@pytest.mark.parametrize(
    "schedule", [sp.LinearSchedule(0.25), sp.OneShotSchedule(0.25, at=0.5), sp.ConstantSchedule(0.25)], ids=str
)
def test_granularities_and_schedules_end_where_they_should(granularity, schedule):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(model, PruneConfig(schedule, granularity=granularity, end=10, every=3)).prepare(optimizer)
    seen = train(model, optimizer, pruner, 12)
    assert seen[-1][1] == 0.75 * TOTAL
    if isinstance(schedule, sp.ConstantSchedule):
        assert all(z == 0.75 * TOTAL for _, z in seen)
    if isinstance(schedule, sp.OneShotSchedule):
        assert [z for _, z in seen[:5]] == [0] * 5


def test_a_final_density_that_nm_cannot_give_is_refused():
    with pytest.raises(ValueError, match=r"NM\(n=2, m=4\) fixes the sparsity at 0.5"):
        Pruner(build(), PruneConfig(sp.CubicSchedule(0.1), granularity=sp.NM(2, 4)))


def test_a_pruned_weight_comes_back_with_its_value_until_the_masks_are_fixed():
    turn = {"sign": 1.0}

    def alternating(linear, fqn):
        return turn["sign"] * torch.arange(linear.weight.numel(), dtype=torch.float32).reshape(linear.weight.shape)

    model = build()
    before = [m.weight.detach().clone() for m in (model[0], model[2])]
    config = PruneConfig(sp.ConstantSchedule(0.5), criterion=alternating, scope="layer", end=4, every=1)
    pruner = Pruner(model, config).prepare()
    pruner.step()
    first = pruner.masks
    turn["sign"] = -1.0
    pruner.step()
    second = pruner.masks
    assert torch.equal(second["0"], ~first["0"])
    for module, dense, name in zip((model[0], model[2]), before, ("0", "2")):
        assert torch.equal(module.weight, dense * second[name])
    pruner.step()
    pruner.step()
    turn["sign"] = 1.0
    pruner.step()
    assert pruner.frozen and pruner.masks.mask_hash() == second.mask_hash()


def test_momentum_does_not_move_what_is_behind_the_mask():
    shift = {"by": 0}

    def rolling(linear, fqn):
        count = linear.weight.numel()
        return torch.arange(count).roll(shift["by"] * count // 2).reshape(linear.weight.shape).float()

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, PruneConfig(sp.ConstantSchedule(0.5), rolling, scope="layer", begin=2, end=90)).prepare(
        optimizer
    )
    train(model, optimizer, pruner, 2)
    train(model, optimizer, pruner, 1, 2)
    aside = {fqn: values.clone() for fqn, values in pruner._behind.items()}
    train(model, optimizer, pruner, 9, 3)
    shift["by"] = 1
    train(model, optimizer, pruner, 1, 12)
    for module, fqn in ((model[0], "0"), (model[2], "2")):
        assert torch.equal(module.weight[aside[fqn] != 0], aside[fqn][aside[fqn] != 0])


def test_movement_is_the_sum_over_the_steps_at_the_values_behind_the_mask():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(model, PruneConfig(sp.ConstantSchedule(0.5), "movement", end=100, every=1000)).prepare(optimizer)
    expected = torch.zeros_like(model[0].weight)
    dense = model[0].weight.detach().clone()
    for step in range(4):
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        expected -= model[0].weight.grad * dense
        optimizer.step()
        dense = torch.where(pruner.masks["0"], model[0].weight.detach(), dense)
        pruner.step()
    torch.testing.assert_close(pruner.criterion.state["0"]["moved"], expected)


@pytest.mark.parametrize("given", ["by place", "by name"])
@pytest.mark.parametrize("optimiser", optimisers())
def test_gradients_that_a_closure_makes_are_those_of_its_step(optimiser, given):
    """Not those of the step before, which are in .grad when the step begins."""

    def pruned(closed):
        model = build()
        optimizer = optimisers()[optimiser](model.parameters())
        pruner = Pruner(model, replace(CONFIG, criterion="movement")).prepare(optimizer)

        for step in range(8):
            x, y = batch(step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = (model(x) - y).square().mean()
                loss.backward()
                return loss

            if closed:
                loss = optimizer.step(closure) if given == "by place" else optimizer.step(closure=closure)
                assert loss.requires_grad
            else:
                closure()
                optimizer.step()
            pruner.step()
        return model, pruner

    (ours, a), (theirs, b) = pruned(True), pruned(False)
    for fqn in ("0", "2"):
        assert torch.equal(a.criterion.state[fqn]["moved"], b.criterion.state[fqn]["moved"])
    assert a.masks.mask_hash() == b.masks.mask_hash()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(p, q)


def test_a_closure_that_is_called_often_is_observed_once_a_step_and_its_gradients_are_masked():
    model = build()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    pruner = Pruner(model, PruneConfig(sp.ConstantSchedule(0.5), "movement", end=100, every=1000)).prepare(optimizer)
    expected, calls = torch.zeros_like(model[0].weight), 0
    for step in range(3):
        x, y = batch(step)
        dense, first = pruner._dense("0", model[0]).clone(), calls

        def closure(x=x, y=y, dense=dense, first=first):
            nonlocal calls
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            if calls == first:
                expected.sub_(model[0].weight.grad * dense)
            calls += 1
            return loss

        optimizer.step(closure)
        assert not model[0].weight.grad[~pruner.masks["0"]].any()
        pruner.step()
    assert calls > 6
    torch.testing.assert_close(pruner.criterion.state["0"]["moved"], expected)


@pytest.mark.parametrize("given", [((False,), {}), ((True,), {}), ((), {"zero_grad": True}), ((0.5,), {})])
def test_an_optimisers_own_argument_is_no_closure(given):
    class Own(torch.optim.SGD):
        def step(self, zero_grad=False):
            self.got = zero_grad
            super().step()
            if zero_grad:
                self.zero_grad()

    def run(*args, **kwargs):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
        optimizer = Own(model.parameters(), lr=0.1)
        pruner = Pruner(model, PruneConfig(sp.ConstantSchedule(0.5), criterion="movement", end=100, every=2))
        pruner.prepare(optimizer)
        for _ in range(6):
            model.zero_grad()
            model(torch.randn(6, 12)).square().mean().backward()
            optimizer.step(*args, **kwargs)
            pruner.step()
        return model, optimizer.got

    (model, got), (expected, _) = run(*given[0], **given[1]), run()
    assert got == [*given[0], *given[1].values()][0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters()))
    assert sum(int((layer.weight == 0).sum()) for layer in (model[0], model[2])) == (12 * 16 + 16 * 8) // 2


@pytest.mark.parametrize("optimiser", ["fused", "plain", "sp.AdamW"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_movement_under_a_grad_scaler_is_that_without(optimiser, unscaled):
    """A fused optimiser is handed scaled gradients; one that overflows is skipped by every optimiser."""
    made = {
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "plain": lambda p: torch.optim.AdamW(p, lr=1e-2),
        "sp.AdamW": lambda p: sp.AdamW(p, lr=1e-2),
    }[optimiser]

    def moved(scale):
        model = build()
        optimizer = made(model.parameters())
        pruner = Pruner(model, PruneConfig(sp.CubicSchedule(0.5), criterion="movement", end=9)).prepare(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 0)
        for step, factor in enumerate((1.0, 3e38, 1.0)):
            if factor > 1 and not scale:
                continue
            x, y = batch(step)
            scaler.scale((model(x) - y).square().mean() * factor).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return [pruner.criterion.state[fqn]["moved"] for fqn in ("0", "2")]

    for with_scaler, without in zip(moved(2.0**16), moved(0)):
        assert torch.equal(with_scaler, without)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("optimiser", ["sp.AdamW", "AdamW"])
@pytest.mark.parametrize("stop", [2, 9, 20, 23])
def test_a_resume_is_bit_identical(criterion, optimiser, stop):
    config = PruneConfig(schedule=sp.CubicSchedule(0.2), criterion=criterion, begin=3, end=20, every=4)

    def start(seed):
        model = build(seed)
        optimizer = optimisers()[optimiser](model.parameters())
        return model, optimizer, Pruner(model, config).prepare(optimizer)

    model, optimizer, pruner = start(0)
    train(model, optimizer, pruner, stop)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    rest = train(model, optimizer, pruner, 26 - stop, stop)

    again, optimizer2, pruner2 = start(1)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    again.load_state_dict(states[0])
    optimizer2.load_state_dict(states[1])
    pruner2.load_state_dict(states[2])
    assert train(again, optimizer2, pruner2, 26 - stop, stop) == rest
    assert pruner2.masks.mask_hash() == pruner.masks.mask_hash() and pruner2.steps == 26
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_a_state_that_does_not_fit_is_refused():
    pruner = Pruner(build(), CONFIG)
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="version 1 expected"):
        pruner.load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match="criterion 'magnitude' expected"):
        pruner.load_state_dict({**state, "criterion_name": "movement"})
    with pytest.raises(ValueError, match="fit no layer"):
        pruner.load_state_dict({**state, "masks": {"0": torch.ones(2, 2, dtype=torch.bool)}})


def test_model_and_pruner_can_be_copied_and_pickled_on_the_way():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    config = PruneConfig(schedule=sp.CubicSchedule(0.1), criterion="movement", end=20, every=4)
    pruner = Pruner(model, config).prepare(optimizer)
    train(model, optimizer, pruner, 10)
    assert type(copy.deepcopy(model)) is type(pickle.loads(pickle.dumps(model))) is nn.Sequential
    for twin in (copy.deepcopy(pruner), pickle.loads(pickle.dumps(pruner))):
        assert twin.masks.mask_hash() == pruner.masks.mask_hash() and twin.model is not model
        with pytest.raises(RuntimeError, match="call prepare"):
            twin.step()
        other = torch.optim.SGD(twin.model.parameters(), lr=1e-2)
        twin.prepare(other)
        mine = copy.deepcopy(pruner)
        again = torch.optim.SGD(mine.model.parameters(), lr=1e-2)
        mine.prepare(again)
        assert train(twin.model, other, twin, 10, 10) == train(mine.model, again, mine, 10, 10)


def test_finalize_before_the_end_still_ends_at_the_density():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(model, CONFIG).prepare(optimizer)
    train(model, optimizer, pruner, 5)
    pruner.finalize()
    assert pruner.density == 0.1 and pruner.masks.kept == TOTAL - round(0.9 * TOTAL)
    assert sum(int((m.weight != 0).sum()) for m in (model[0], model[2])) == pruner.masks.kept


def test_masks_hold_while_healing_with_the_masks_handed_on():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruner = Pruner(model, CONFIG).prepare(optimizer)
    train(model, optimizer, pruner, 20)
    pruner.finalize()
    healer = sp.AdamW(model.parameters(), lr=1e-2)
    for step in range(5):
        x, y = batch(step)
        healer.zero_grad()
        (model(x) - y).square().mean().backward()
        healer.step()
    assert sum(int((m.weight != 0).sum()) for m in (model[0], model[2])) <= pruner.masks.kept
    assert all(not (m.weight[~pruner.masks[f]]).any() for f, m in (("0", model[0]), ("2", model[2])))


@pytest.mark.parametrize("other", ["sp.AdamW", "AdamW", "SGD"])
def test_zeros_stay_where_each_layer_has_an_optimiser_of_its_own(other):
    """One holds the zeros of its own weights itself; the pruner sees to those of the other."""
    model = build()
    first = sp.AdamW(model[0].parameters(), lr=1e-2, weight_decay=0.1)
    second = optimisers()[other](model[2].parameters())
    pruner = Pruner(model, CONFIG).prepare(first)
    for step in range(25):
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
        pruner.step()
        kept = {fqn: model.get_submodule(fqn).weight != 0 for fqn in ("0", "2")}
        assert all(not (kept[fqn] & ~mask).any() for fqn, mask in pruner.masks.items())
    assert pruner.frozen and sum(int(k.sum()) for k in kept.values()) <= pruner.masks.kept


@pytest.mark.parametrize("name", ["begin", "end", "every"])
@pytest.mark.parametrize("steps", [2.5, float("nan"), float("inf"), True, "3", None])
def test_steps_are_whole(name, steps):
    """With half a step in ``begin`` no step was its beginning, and nothing was pruned before the end."""
    with pytest.raises(ValueError, match=f"PruneConfig: {name} expected a whole number of steps, got .*; round it"):
        PruneConfig(**{name: steps})


def test_a_share_of_the_steps_that_is_whole_will_do():
    config = PruneConfig(begin=0.25 * 200, end=0.75 * 200, every=np.int64(5))
    assert config == PruneConfig(begin=50, end=150, every=5) == PruneConfig.from_json(config.to_json())


def test_misuse_says_what_to_do():
    with pytest.raises(ValueError, match="'movement' needs gradients; pass the optimiser"):
        Pruner(build(), PruneConfig(criterion="movement")).prepare()

    class Hungry(Criterion):
        name, needs_data = "hungry", True

    with pytest.raises(ValueError, match="'hungry' needs data"):
        Pruner(build(), PruneConfig(criterion=Hungry()))
    with pytest.raises(ValueError, match="schedule expected a Schedule"):
        PruneConfig(schedule=0.1)
    with pytest.raises(ValueError, match="distributed expected"):
        Pruner(build(), CONFIG, distributed="yes")
    model = build()
    pruner = Pruner(model, CONFIG).prepare()
    model[0] = nn.Identity()
    with pytest.raises(RuntimeError, match="0 of the model is no Linear any more"):
        pruner.step()


@pytest.mark.parametrize("criterion", [Movement, Fisher])
def test_a_criterion_that_is_given_twice_begins_twice_with_what_it_had(criterion):
    config = PruneConfig(sp.CubicSchedule(0.1), criterion(), begin=2, end=9, every=2)
    found = []
    for given in (config, config, replace(config, criterion=criterion())):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruner(model, given).prepare(optimizer)
        train(model, optimizer, pruner, 12)
        found.append(pruner.masks.mask_hash())
    assert len(set(found)) == 1 and not config.criterion.state


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_two_processes_agree_on_the_masks(mode, torchrun, tmp_path):
    torchrun(Path(__file__).with_name("two_processes.py"), mode, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    if mode == "replicated":
        assert results[0]["hash"] == results[1]["hash"]
        assert results[0]["total"] == TOTAL and results[0]["kept"] == TOTAL - round(0.9 * TOTAL)
        return
    scores = torch.cat([results[0]["dense"], results[1]["dense"]]).abs()
    masks = torch.cat([results[0]["mask"], results[1]["mask"]])
    kept = scores.numel() - round(0.9 * scores.numel())
    assert int(masks.sum()) == kept
    assert torch.equal(masks, sp.ops.magnitude_mask(scores, kept))
