"""Healing under the rounding of int8 kernels: sparsify_ gives what healing saw, by every criterion and trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune import _native
from sparseprune.data import RowLoader
from sparseprune.nn.simulated import SimulatedLinear, simulated
from sparseprune.pruning import criterion_names
from sparseprune.runner.rounding import forms_table
from sparseprune.training import DistillConfig, evaluate

INT8 = {"value_dtype": "int8", "activations": "int8"}
QUADS = {"layout": "bsr", "blocksize": (1, 4)}
needs_core = pytest.mark.skipif(_native.C is None, reason="the compiled core is not built")


def pruned_layers(module, name):
    return name != "4"


def model_and_data(columns: int = 200):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 256), nn.ReLU(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(256, columns)
    return model, RowLoader(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long(), 32, shuffle=True)


def fit(granularity, checkpoint=None, stop=None, kind=sp.DistillPruner, columns=200, **more):
    model, loader = model_and_data(columns)
    config = kind.config_type(steps=20, ce=1.0, granularity=granularity, **{**INT8, **more})
    pruner = kind(model, config, filter_fn=pruned_layers)

    def callback(record):
        if stop is not None and record["step"] + 1 == stop:
            raise KeyboardInterrupt

    pruner.fit(loader, loader, checkpoint=checkpoint, checkpoint_every=1, callback=callback)
    return pruner, loader


def healed_evaluation(pruner):
    """What the trainer saw of the state that it kept."""
    (event,) = [e for e in pruner.history.events if e["event"].startswith("best state")]
    step = int(event["event"].rpartition(" ")[2])
    return next(e for e in pruner.history.evaluations if e["step"] == step and e["phase"] == "heal")


@needs_core
@pytest.mark.parametrize("heal", ["auto", "dense"])
@pytest.mark.parametrize(
    "granularity, layout",
    [(sp.Block(1, 4), QUADS), ("element", {"layout": "csr"}), (sp.Block(16, 1), {"layout": "bsr"})],
)
def test_sparsify_gives_what_healing_saw(granularity, layout, heal):
    pruner, loader = fit(granularity, heal=heal)
    seen = healed_evaluation(pruner)
    model = pruner.finalize()
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [nn.Linear] * 3
    exact = evaluate(model, loader)["loss"]
    x = torch.randn(64, 200)
    with simulated(model, pruner.masks), torch.no_grad():
        expected = model(x)
    sparse = copy.deepcopy(model).requires_grad_(False)
    sp.sparsify_(sparse, filter_fn=pruned_layers, **layout, **INT8)
    assert sparse[0].activations == sparse[2].activations == "int8"
    torch.testing.assert_close(sparse(x), expected, rtol=1e-5, atol=1e-6)
    found = evaluate(sparse, loader)["loss"]
    least = 2e-7  # what float32 tells apart at such a loss
    assert abs(found - seen["loss"]) < max(0.1 * abs(exact - seen["loss"]), least)


@needs_core
@pytest.mark.parametrize("heal", ["auto", "dense"])
def test_a_run_that_rounds_goes_on_to_the_bit(heal, tmp_path):
    whole, _ = fit(sp.Block(1, 4), heal=heal)
    for stop in (9, 17):  # before and after the masks are hard
        with pytest.raises(KeyboardInterrupt):
            fit(sp.Block(1, 4), tmp_path / f"{stop}.pt", stop, heal=heal)
        again, _ = fit(sp.Block(1, 4), tmp_path / f"{stop}.pt", heal=heal)
        for a, b in zip(whole.finalize().parameters(), again.finalize().parameters()):
            assert torch.equal(a, b)


@needs_core
def test_rounding_changes_what_healing_learns():
    rounded, _ = fit(sp.Block(1, 4))
    plain, _ = fit(sp.Block(1, 4), value_dtype="float32", activations="float32")
    assert all(torch.equal(rounded.masks[n], plain.masks[n]) for n in plain.masks)  # nothing rounds before
    assert not torch.equal(rounded.model[0].weight, plain.model[0].weight)


def test_what_no_int8_kernel_takes_is_named_and_heals_exact():
    pruner, _ = fit("element", columns=202)
    (event,) = [e for e in pruner.history.events if e["event"].startswith("rounding")]
    assert list(event["left"]) == ["0"] and "multiple of 4" in event["left"]["0"]


def quads(masks, density):
    """Whole blocks of four, as many as asked."""
    kept = total = 0
    for name, mask in masks.items():
        blocks = mask.view(mask.shape[0], -1, 4)
        assert torch.equal(blocks.any(2), blocks.all(2)), name
        kept, total = kept + int(mask.sum()), total + mask.numel()
    return kept == 4 * (total // 4 - round((1 - density) * (total // 4)))


@pytest.mark.parametrize("method", ["scores", "magnitude", "movement"])
def test_blocks_of_four_by_every_method_of_the_trainer(method):
    pruner, _ = fit(sp.Block(1, 4), method=method)
    assert quads(pruner.masks, 0.1)
    assert healed_evaluation(pruner)["loss"] > 0


def test_blocks_of_four_with_an_adversary():
    pruner, _ = fit(sp.Block(1, 4), kind=sp.GANPruner)
    assert quads(pruner.masks, 0.1) and pruner.config.rounds


@pytest.mark.parametrize("criterion", criterion_names())
def test_blocks_of_four_by_every_criterion(criterion):
    """Gradually in the user's own loop, rounded from the end of the schedule to finalize."""
    model, loader = model_and_data()
    data = [batch[0] for batch in loader] if criterion in ("wanda", "sparsegpt", "admm") else None
    config = sp.PruneConfig(
        schedule=sp.CubicSchedule(0.2), end=4, every=2, criterion=criterion, granularity=sp.Block(1, 4), **INT8
    )
    pruner = sp.Pruner(model, config, filter_fn=pruned_layers, data=data)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner.prepare(optimiser)
    names = list(model.state_dict())
    for step, (x, y) in enumerate(loader):
        assert isinstance(model[0], SimulatedLinear) == pruner.frozen == (step >= 4)
        nn.functional.cross_entropy(model(x), y).backward()
        optimiser.step()
        pruner.step()
        optimiser.zero_grad()
    assert list(model.state_dict()) == names and quads(pruner.masks, 0.2)
    state = pruner.state_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        rounded = twin(x)
    done = pruner.finalize()
    assert not [m for m in done.modules() if isinstance(m, SimulatedLinear)]
    with torch.no_grad():
        assert not torch.equal(done(x), rounded)
        for name, mask in pruner.masks.items():
            assert not done.get_submodule(name).weight[~mask].any()
    again = sp.Pruner(done, config, filter_fn=pruned_layers, data=data)
    again.load_state_dict(state)  # a resume behind the end rounds at once
    assert isinstance(done[0], SimulatedLinear)
    with torch.no_grad():
        assert torch.equal(done(x), rounded)


def test_a_state_from_before_the_masks_were_final_ends_the_rounding():
    model, loader = model_and_data()
    config = sp.PruneConfig(schedule=sp.CubicSchedule(0.2), end=3, every=1, granularity=sp.Block(1, 4), **INT8)
    pruner = sp.Pruner(model, config, filter_fn=pruned_layers)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner.prepare(optimiser)
    pruner.step()
    weights, state = copy.deepcopy(model.state_dict()), pruner.state_dict()
    x = next(iter(loader))[0]
    with torch.no_grad():
        before = model(x)
    pruner.step()
    pruner.step()
    assert pruner.frozen and isinstance(model[0], SimulatedLinear)
    model.load_state_dict(weights)
    pruner.load_state_dict(state)
    assert not pruner.frozen and type(model[0]) is nn.Linear
    with torch.no_grad():
        assert torch.equal(model(x), before)
    pruner.step()
    pruner.step()
    assert pruner.frozen and isinstance(model[0], SimulatedLinear)


def fragile():
    """A model whose second Linear rounding ruins: beside a weight of 1,000 that meets zeros, all others vanish."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        model[0].weight[5], model[0].bias[5] = 0, -1  # so that what comes behind the ReLU is 0
        model[2].weight[:, 5] = 1000
        model[4].weight.mul_(30)  # a model that is sure of what it says
    x = torch.randn(128, 32)
    return model, RowLoader(x, model(x).argmax(1), 32)


def test_layers_that_rounding_ruins_are_found_and_named():
    model, loader = fragile()
    before = copy.deepcopy(model.state_dict())
    report = sp.choose_exact_layers(model, loader, tolerance=0.02)
    assert report.exact == ["2"] and report.loss <= 1.02 * report.exact_loss < report.rounded_loss
    assert next(iter(report.alone)) == "2" and set(report.alone) == {"0", "2", "4"}
    assert "stays exact: 2: rounded alone it changes the loss by +" in str(report)
    assert all(type(m) is not SimulatedLinear for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    lenient = sp.choose_exact_layers(model, loader, tolerance=1e6)
    assert lenient.exact == [] and lenient.alone == {} and lenient.loss == lenient.rounded_loss


def test_what_cannot_be_rounded_is_exact_with_its_reason():
    model = nn.Sequential(nn.Linear(30, 32), nn.ReLU(), nn.Linear(32, 4))
    loader = RowLoader(torch.randn(64, 30), torch.arange(64) % 4, 32)
    report = sp.choose_exact_layers(model, loader, tolerance=1.0)
    assert report.exact == ["0"] and "multiple of 4" in report.why("0") and "stays exact: 0: " in str(report)
    sp.sparsify_(model, layout="csr", filter_fn=lambda m, n: True, exact_layers=report.exact, **INT8)
    assert model[0].activations == "float32" and model[2].activations == "int8"


@needs_core
def test_the_measured_loss_is_that_of_the_sparse_model():
    model, loader = fragile()
    report = sp.choose_exact_layers(model, loader, tolerance=0.02)
    sparse = copy.deepcopy(model).requires_grad_(False)
    sp.sparsify_(sparse, layout="csr", filter_fn=lambda m, n: True, exact_layers=report.exact, **INT8)
    assert evaluate(sparse, loader)["loss"] == pytest.approx(report.loss, rel=1e-4)


@needs_core
@pytest.mark.parametrize("pruned", [True, False])
def test_layers_that_hide_from_linear_are_rounded_where_sparsify_rounds_them(pruned):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(160, 4))
    model.eval().requires_grad_(False)
    if pruned:
        sp.prune_(model, 0.5, filter_fn=lambda m, n: "layers" in n)
    x = torch.randn(64, 5, 32)
    loader = RowLoader(x, model(x), 32)
    report = sp.choose_exact_layers(model, loader, nn.MSELoss, tolerance=0.0)
    attention = ("q_proj", "k_proj", "v_proj", "out_proj") if pruned else ()
    inside = ["linear1", "linear2", *(f"self_attn.{name}" for name in attention)]
    assert set(report.alone) == {"2", *(f"0.layers.{i}.{name}" for i in (0, 1) for name in inside)}
    assert type(model[0].layers[0].self_attn) is nn.MultiheadAttention
    sp.sparsify_(model, layout="csr", engine="layers", filter_fn=lambda m, n: True, **INT8)
    assert evaluate(model, loader, nn.MSELoss)["loss"] == pytest.approx(report.rounded_loss, rel=0.05)


@pytest.mark.parametrize("make", [iter, lambda data: (batch for batch in data)], ids=["iterator", "generator"])
def test_data_that_can_be_read_once_is_refused(make):
    model, loader = fragile()
    with pytest.raises(ValueError, match=r"read again and again.*which can be read only once; pass list"):
        sp.choose_exact_layers(model, make(list(loader)), tolerance=0.02)
    assert sp.choose_exact_layers(model, list(loader), tolerance=0.02).exact == ["2"]


def test_a_dense_model_that_is_never_right_has_a_table_of_forms_too():
    row = {"valid": {"loss": 1.0, "accuracy": 0.5}, "test": {"loss": 1.0, "accuracy": 0.5}, "latency_ms": 2.0}
    wrong = {**row, "test": {"loss": 9.0, "accuracy": 0.0}, "latency_ms": 4.0}
    lines = forms_table({"forms": {"dense int8": row, "sparse float32": row}, "dense": wrong, "pruned": row})
    cells = {line[:14].strip(): line[14:].split() for line in lines}
    assert cells["dense float32"][-3:] == ["-", "4.00", "1.00"] and cells["sparse int8"][-3:] == ["-", "2.00", "2.00"]
    lines = forms_table({"forms": {"dense int8": row, "sparse float32": wrong}, "dense": row, "pruned": row})
    assert lines[4].split()[-3:] == ["0.0%", "4.00", "0.50"]


def test_errors():
    with pytest.raises(ValueError, match="'int8' with value_dtype='int8', got 'int8' with 'float32'"):
        DistillConfig(activations="int8")
    with pytest.raises(ValueError, match="value_dtype expected one of"):
        sp.PruneConfig(value_dtype="int4")
    model, loader = fragile()
    with pytest.raises(ValueError, match="expected names of Linears, got '1'"):
        sp.choose_exact_layers(model, loader, layers=["0", "1"])
    with pytest.raises(ValueError, match="tolerance expected >= 0"):
        sp.choose_exact_layers(model, loader, tolerance=-0.1)
