"""The floor under every layer: weights that are small as a whole cost a model no layer unless that is asked for."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.pruning import Mixture, PruneConfig, Pruner, prune_
from sparseprune.runner.text_encoder import TextEncoder


def with_faint_layer(scale=1e-3):
    """Three layers; the weights of the last, a pooler's say, are small beside all others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 10))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.normal_(std=0.2)
        model[4].weight.mul_(scale)
    return model


def silent(call):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97, 0.99, 0.9985, 1.0])
def test_by_default_no_layer_dies_and_the_count_stays_exact(sparsity):
    model = with_faint_layer()
    report = silent(lambda: prune_(model, sparsity))
    assert report.kept == report.total - round(sparsity * report.total)
    assert sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, nn.Linear)) == report.kept
    least = report.kept / report.total / 2
    for row in report.layers:
        assert row.kept >= math.floor(least * row.total)
        assert row.kept or sparsity == 1.0


def test_outputs_depend_on_the_inputs_after_pruning_to_a_tenth():
    model = with_faint_layer()
    x = torch.randn(64, 24)
    before = model(x).std(0).max()
    prune_(model, 0.9)
    assert model(x).std(0).max() > 0.02 * before


def test_the_bare_comparison_is_there_for_the_asking_and_warns():
    model = with_faint_layer()
    with pytest.warns(UserWarning, match=r"prune_: .*nearly none .* in 4 \(0 of 240\); .*Leave floor at its default"):
        report = prune_(model, 0.9, floor=0.0)
    assert [row.kept for row in report.layers][2] == 0
    with pytest.warns(UserWarning, match=r"nearly none .* in 4 \(1 of 240\)"):
        prune_(with_faint_layer(), 0.5, lambda m, fqn: rigged(m, fqn), floor=0.0)


def rigged(module, fqn):
    scores = module.weight.detach().abs()
    if fqn == "4":
        scores.view(-1)[0] = 1e9
    return scores


def test_where_the_units_do_not_go_round_the_warning_names_who_went_short():
    with pytest.warns(UserWarning, match=r"in (0|2|4) \(0 of \d+\), .*; .*Use a lower sparsity"):
        report = prune_(with_faint_layer(), 1 - 1.2 / 2160)
    assert report.kept == 1


@pytest.mark.parametrize("granularity", ["element", sp.Block(2, 2), Mixture(sp.Block(2, 2))])
def test_a_function_with_wild_scales_starves_no_layer(granularity):
    model = with_faint_layer(1.0)
    wild = {"0": 1e6, "2": 1.0, "4": 1e-6}
    report = silent(lambda: prune_(model, 0.9, lambda m, fqn: m.weight.abs() * wild[fqn], granularity))
    unit = 4 if granularity == sp.Block(2, 2) else 1
    assert report.kept == report.total - round(0.9 * report.total / unit) * unit
    assert all(row.kept >= 0.04 * row.total for row in report.layers)


@pytest.mark.parametrize("granularity", [sp.Heads(), sp.Neurons()])
def test_every_block_keeps_a_head_and_a_neuron_as_far_as_they_go_round(granularity):
    torch.manual_seed(0)
    model = TextEncoder(30, 3, hidden=16, ffn=32, layers=3, heads=4)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.startswith("layers.1"):
                module.weight.mul_(1e-3)
    report = silent(lambda: prune_(model, 0.75, granularity=granularity))
    assert all(row.kept for row in report.layers)
    with pytest.warns(UserWarning, match=r"layers\.\d"):
        prune_(model, 0.99, granularity=granularity)


def test_layers_that_are_left_out_or_empty_by_wish_are_no_warning():
    silent(lambda: prune_(with_faint_layer(), 0.9, scope="layer"))
    silent(lambda: prune_(with_faint_layer(), 0.9, densities={"4": 0.0, "*": 1.0}))
    hollow = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 2), nn.Linear(5, 5))
    hollow[0].weight, hollow[0].in_features = nn.Parameter(torch.zeros(5, 0)), 0
    hollow[1].weight, hollow[1].out_features = nn.Parameter(torch.zeros(0, 5)), 0
    assert [row.kept for row in silent(lambda: prune_(hollow, 0.5)).layers] == [0, 0, 13]
    with pytest.warns(UserWarning, match=r"1 \(0 of 1\)"):
        prune_(nn.Sequential(nn.Linear(20, 1), nn.Linear(1, 1)), 0.9, scope="layer")


def test_the_gradual_pruner_has_the_same_floor():
    model = with_faint_layer()
    pruner = Pruner(model, PruneConfig(schedule=sp.ConstantSchedule(0.1), end=2, every=1)).prepare()
    pruner.step()
    silent(pruner.finalize)
    assert pruner.masks.kept == 216 and pruner.masks.kept_of("4") == 12
    bare = Pruner(
        with_faint_layer(), PruneConfig(schedule=sp.ConstantSchedule(0.1), end=2, every=1, floor=0.0)
    ).prepare()
    with pytest.warns(UserWarning, match=r"Pruner: .* in 4 \(0 of 240\)"):
        bare.finalize()


@pytest.mark.parametrize("method", ["scores", "magnitude"])
def test_the_trainer_leaves_no_layer_empty(method):
    def run(**options):
        only = {"hidden": 0.0, "kd": 0.0, "ce": 1.0, **options}
        config = sp.DistillConfig(method=method, steps=6, schedule=sp.ConstantSchedule(0.1), **only)
        pruner = sp.DistillPruner(with_faint_layer(), config)
        batches = [(torch.randn(8, 24), torch.randint(0, 10, (8,))) for _ in range(3)]
        pruner.fit(batches)
        return pruner.masks

    masks = silent(run)
    assert sum(int(m.sum()) for m in masks.values()) == 216
    assert all(int(mask.sum()) >= math.floor(0.05 * mask.numel()) for mask in masks.values())
    with pytest.warns(UserWarning, match="DistillPruner: expected every layer to keep some weights"):
        run(floor=0.0)


def test_layers_pruned_before_keep_their_zeros_and_the_report_counts_them():
    model = with_faint_layer(1.0)
    for sparsity in (0.5, 0.8, 0.9):
        report = prune_(model, sparsity)
        assert report.zeros == 0 and report.kept == 2160 - round(sparsity * 2160)
        assert sum(int(m.weight.count_nonzero()) for m in model if isinstance(m, nn.Linear)) == report.kept
    back = prune_(model, 0.5)
    assert back.kept == 1080 and back.zeros == 1080 - 216 and back.to_dict()["zeros"] == 864
    assert "864 of the weights kept are zero all the same" in str(back)


def test_elements_on_top_of_a_pattern_stay_within_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    first = prune_(model, granularity=sp.NM(2, 4)).masks
    report = prune_(model, 0.7)
    assert report.kept == 384 - round(0.7 * 384) and report.zeros == 0
    assert all(not bool((report.masks[f] & ~first[f]).any()) for f in first)
