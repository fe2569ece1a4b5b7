"""What changes under a Pruner between its steps: the model, other pruners, the optimiser's wrapper, the state it goes
on from, the precision that the user's loop computes in.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn.simulated import SimulatedLinear
from sparseprune.pruning import PruneConfig, Pruner

CONFIG = PruneConfig(density=0.5, end=4, every=1)


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def train(model, optimizer, *pruners, steps=6):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        model(torch.randn(4, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        for pruner in pruners:
            pruner.step()
        optimizer.zero_grad()


def final_state(**options):
    """Of a pruner whose masks are final."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, CONFIG, **options).prepare(optimizer)
    train(model, optimizer, pruner)
    assert pruner.frozen
    return model, pruner.state_dict()


@pytest.mark.parametrize(
    ("config", "saved_by", "match"),
    [
        (replace(CONFIG, granularity=sp.NM(2, 4)), {}, r"NM\(n=2, m=4\) in 0\) expected.*with Element\(\) there"),
        (PruneConfig(density=0.1, end=4), {}, r"final density \(0\.1\) expected.*masks are final at 0\.5"),
        (CONFIG, {"filter_fn": lambda module, fqn: fqn == "0"}, r"\(Element\(\) in 2\) expected.*with none there"),
    ],
)
def test_final_masks_of_another_run_are_refused(config, saved_by, match):
    """They were held as they were: the run ended at the other density, in other layers, with the report of its own."""
    model, state = final_state(**saved_by)
    pruner = Pruner(model, config)
    with pytest.raises(ValueError, match=match):
        pruner.load_state_dict(state)
    assert not pruner.frozen and pruner.steps == 0
    model, state = final_state()
    Pruner(model, replace(CONFIG, every=2)).load_state_dict(state)  # how it got there is free
    del state["granularities"]  # saved before they were noted
    Pruner(model, CONFIG).load_state_dict(state)


def test_masks_that_still_move_may_go_on_otherwise():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = Pruner(model, CONFIG).prepare(optimizer)
    train(model, optimizer, first, steps=2)
    second = Pruner(model, PruneConfig(density=0.25, end=5, granularity=sp.NM(1, 4)))
    second.load_state_dict(first.state_dict())
    train(model, optimizer, second.prepare(optimizer), steps=4)
    assert second.finalize()[0].weight.view(16, 4, 4).count_nonzero(-1).max() == 1


def test_one_pruner_that_ends_leaves_the_others_rounding():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = replace(CONFIG, value_dtype="int8")
    pruners = [Pruner(model, config, lambda module, fqn, own=own: fqn == own).prepare(optimizer) for own in "02"]
    plain = Pruner(model, CONFIG, lambda module, fqn: fqn == "4").prepare(optimizer)
    train(model, optimizer, *pruners, plain)
    plain.finalize()
    pruners[0].finalize()
    assert type(model[0]) is nn.Linear and type(model[2]) is SimulatedLinear
    pruners[1].finalize()
    assert type(model[2]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "0 has changed since.*a parametrization.*finalize"),
        (lambda m: torch.nn.utils.prune.identity(m[2], "weight"), "2 has changed since.*weight_mask.*finalize"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight[:8])), r"expected \[16, 16\].*got \[8, 16\]"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_weight_that_masks_no_longer_reach_is_said(change, match):
    """Masks were written into a tensor that is computed anew at each call: the layer stayed dense, and was reported."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = Pruner(model, CONFIG).prepare(optimizer)
    train(model, optimizer, pruner, steps=2)
    change(model)
    with pytest.raises(RuntimeError, match=match):
        pruner.step()


def test_steps_in_which_accelerate_only_gathers_gradients_do_not_count():
    """The schedule ran as many times too fast as batches were gathered."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, cpu=True)
    try:
        model = build()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
        pruner = Pruner(model, replace(CONFIG, criterion="movement")).prepare(optimizer)
        seen = []
        for _ in range(12):
            with accelerator.accumulate(model):
                accelerator.backward(model(torch.randn(4, 16)).square().mean())
                optimizer.step()
                seen.append(pruner.step())
                optimizer.zero_grad()
    finally:
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
    schedule = CONFIG.schedule
    assert seen == [1.0 if i < 2 else schedule.density((i + 1) // 3 / 4) for i in range(12)]
    assert pruner.steps == 4 and pruner.frozen


def mixed(linear, fqn):
    return linear.weight @ torch.randn(16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("criterion", ["wanda", mixed])
def test_masks_are_chosen_in_the_models_own_precision(criterion):
    """autocast around the loop rounded what was measured."""
    found = []
    for enabled in (False, True):
        model = build()
        data = [torch.randn(64, 16, generator=torch.Generator().manual_seed(2))]
        pruner = Pruner(model, PruneConfig(density=0.47, end=4, every=1, criterion=criterion), data=data)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            pruner.step()
            found.append(pruner.masks)
            found.append(copy.deepcopy(pruner.finalize()).state_dict())
    assert found[0] == found[2]
    assert all(torch.equal(found[1][name], value) for name, value in found[3].items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, sp.AdamW])
@pytest.mark.parametrize("criterion", ["movement", "magnitude"])
def test_a_pruner_that_was_left_lets_go_of_the_optimiser(kind, criterion):
    """The masks of a run that was given up went on holding gradients, and sp.AdamW the weights, of the next one."""
    found = []
    for left in (False, True):
        model = build()
        optimizer = kind(model.parameters(), lr=0.05)
        begin = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if left:
            other = Pruner(model, replace(CONFIG, criterion=criterion)).prepare(optimizer)
            train(model, optimizer, other)
            model.load_state_dict(begin[0])
            optimizer.load_state_dict(begin[1])
        config = PruneConfig(density=0.25, begin=2, end=8, every=1, criterion=criterion)
        pruner = Pruner(model, config).prepare(optimizer)
        train(model, optimizer, pruner, steps=10)
        found.append(pruner.finalize().state_dict())
        assert not optimizer._optimizer_step_pre_hooks
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_pruner_that_was_left_while_it_rounds_hands_plain_linears_on():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    config = replace(CONFIG, value_dtype="int8")
    train(model, optimizer, Pruner(model, config).prepare(optimizer))
    assert type(model[0]) is SimulatedLinear
    pruner = Pruner(model, config).prepare(optimizer)
    assert type(model[0]) is type(model[2]) is nn.Linear
    train(model, optimizer, pruner)
    pruner.prepare(optimizer)  # once more, for its own rounding
    assert type(model[0]) is SimulatedLinear


def test_pruners_of_other_layers_keep_the_optimiser():
    model = build()
    optimizer = sp.AdamW(model.parameters(), lr=0.05)
    pruners = [
        Pruner(model, replace(CONFIG, criterion="movement"), lambda module, fqn, own=own: fqn == own) for own in "024"
    ]
    for pruner in pruners:
        train(model, optimizer, *(p for p in pruners if p.steps), steps=1)
        train(model, optimizer, pruner.prepare(optimizer), steps=1)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer.masks()) == 3
    train(model, optimizer, *pruners, steps=6)
    assert all(pruner.finalize() is model for pruner in pruners)
