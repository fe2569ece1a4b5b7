from __future__ import annotations

import copy
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.pruning import (
    Criterion,
    MaskSet,
    criteria,
    criterion_names,
    make_criterion,
    prune_,
    register_criterion,
)
from sparseprune.runner.text_encoder import TextEncoder


def two():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.ReLU(), nn.Linear(7, 11))


def zeros(model):
    return {f: int((m.weight == 0).sum()) for f, m in model.named_modules() if isinstance(m, nn.Linear)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_the_count_is_exact_and_the_report_agrees(sparsity):
    model = two()
    report = sp.prune_(model, sparsity)
    total = 13 * 7 + 7 * 11
    assert report.total == total and report.kept == total - round(sparsity * total)
    assert sum(zeros(model).values()) == total - report.kept
    assert {r.name: r.total - r.kept for r in report.layers} == zeros(model)
    assert report.density == report.masks.density == pytest.approx(report.kept / total)
    assert report.sparsity == 1 - report.density
    data = json.loads(json.dumps(report.to_dict()))
    assert data["kept"] == report.kept and data["mask_hash"] == report.masks.mask_hash()
    text = str(report)
    assert f"{report.kept:,} of {report.total:,}" in text and ("nothing left" in text) == any(
        r.kept == 0 for r in report.layers
    )


def test_survivors_biases_modules_and_names_are_untouched():
    model = two()
    before, modules = copy.deepcopy(model), list(model.modules())
    report = prune_(model, 0.6, granularity=sp.Block(1, 1), scope="layer")
    assert list(model.modules()) == modules and list(model.state_dict()) == list(before.state_dict())
    for fqn, mask in report.masks.items():
        assert torch.equal(model.get_submodule(fqn).weight, before.get_submodule(fqn).weight * mask)
        assert torch.equal(model.get_submodule(fqn).bias, before.get_submodule(fqn).bias)
    twin = pickle.loads(pickle.dumps(model))
    assert zeros(twin) == zeros(copy.deepcopy(model)) == zeros(model)


def test_dtypes_and_mixtures_of_them():
    for dtypes in ((torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float64,) * 2, (torch.float32, torch.bfloat16)):
        model = two()
        model[0].to(dtypes[0])
        model[2].to(dtypes[1])
        report = prune_(model, 0.75)
        assert report.kept == report.total - round(0.75 * report.total)


def test_a_linear_is_its_own_model():
    linear = nn.Linear(128, 10)
    report = prune_(linear, 0.9)
    assert int((linear.weight != 0).sum()) == 128 and report.layers[0].name == ""
    assert "(the model)" in str(report)


def test_the_default_leaves_the_head_and_says_so():
    model = TextEncoder(30, 3, hidden=8, ffn=16, layers=1, heads=2)
    report = prune_(model, 0.5)
    assert report.skipped == {"classifier": "a head"} and "left dense: classifier: a head" in str(report)
    assert "classifier" not in report.masks
    report = prune_(model, 0.5, filter_fn=lambda module, fqn: fqn == "classifier")
    assert list(report.masks) == ["classifier"]


def test_tied_embeddings_are_not_touched():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.out = nn.Linear(6, 11, bias=False)
            self.out.weight = self.tokens.weight

    model = Tied()
    prune_(model, 0.9)
    assert zeros(model) == {"body": 32, "out": 0} and model.out.weight is model.tokens.weight


def test_nm_needs_no_sparsity():
    model = nn.Sequential(nn.Linear(8, 4))
    assert prune_(model, granularity=sp.NM(2, 4)).density == 0.5
    assert prune_(model, 0.75, granularity=sp.NM(1, 4)).density == 0.25


def test_random_is_a_control_of_its_own():
    a, b, c = two(), two(), two()
    first = prune_(a, 0.5, "random").masks
    assert first.mask_hash() == prune_(b, 0.5, "random").masks.mask_hash()
    assert first.mask_hash() != prune_(c, 0.5, "random", criterion_options={"seed": 1}).masks.mask_hash()


def test_a_function_is_a_criterion():
    model = two()
    smallest = copy.deepcopy(model)
    prune_(model, 0.5, lambda linear, fqn: -linear.weight.abs(), scope="layer")
    kept, gone = smallest[0].weight[model[0].weight != 0], smallest[0].weight[model[0].weight == 0]
    assert kept.abs().max() <= gone.abs().min()


def test_gradient_criteria_take_the_gradients_that_are_there():
    model = two()
    with pytest.raises(ValueError, match="'movement' needs gradients, got none on layers 0, 2; call backward"):
        prune_(model, 0.5, "movement")
    with pytest.raises(ValueError, match="movement: no gradient seen for 0, 2; expected a step that reached"):
        prune_(model, 0.5, make_criterion("movement"))
    assert sum(zeros(model).values()) == 0
    model(torch.randn(5, 13)).square().sum().backward()
    expected = {f: -(m.weight.grad * m.weight).detach() for f, m in (("0", model[0]), ("2", model[2]))}
    report = prune_(model, 0.5, "movement", scope="layer")
    for fqn, scores in expected.items():
        assert scores[report.masks[fqn]].min() >= scores[~report.masks[fqn]].max()


@pytest.mark.parametrize("criterion", ["movement", "uncertainty", "instance"])
def test_gradients_of_weights_that_hide_are_found(criterion):
    """The packed attention of torch and GPT-2's Conv1D: their gradients lie in the parameters that hold them."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.conv = nn.MultiheadAttention(16, 4, batch_first=True), conv1d(24, 16)

        def forward(self, x):
            return self.conv(self.attention(x, x, x, need_weights=False)[0].contiguous())

    model = Both()
    model(torch.randn(2, 3, 16)).pow(2).sum().backward()
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    report = sp.prune_(model, 0.5, criterion=make_criterion("movement") if criterion == "instance" else criterion)
    assert report.total == 4 * 256 + 16 * 24 and report.kept == report.total // 2
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    if criterion != "uncertainty":
        moved = -gradients["attention.in_proj_weight"] * twin.attention.in_proj_weight
        kept = torch.cat([report.masks[f"attention.{part}_proj"] for part in "qkv"])
        assert moved[kept].mean() > moved[~kept].mean()
        moved, kept = -(gradients["conv.weight"] * twin.conv.weight).T, report.masks["conv"]
        assert moved[kept].mean() > moved[~kept].mean()


def test_a_registered_criterion_without_gradients_says_so(monkeypatch):
    class Own(Criterion):
        name = "own"
        needs_gradients = True

        def __init__(self):
            self.seen = {}

        def observe(self, weights, gradients):
            self.seen.update(gradients)

        def scores(self, context):
            return {fqn: w.abs() * self.seen[fqn].abs() for fqn, w in context.weights.items()}

    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    register_criterion("own", Own)
    model = two()
    with pytest.raises(ValueError, match="criterion 'own' needs gradients, got none on layers 0, 2; call backward"):
        prune_(model, 0.8, "own")
    model(torch.randn(5, 13)).square().sum().backward()
    seen = Own()
    seen.observe({}, {fqn: model.get_submodule(fqn).weight.grad.clone() for fqn in ("0", "2")})
    model[2].weight.grad = None
    with pytest.raises(ValueError, match="needs gradients, got none on layers 2; call backward"):
        prune_(model, 0.8, "own")
    model.zero_grad()
    assert prune_(model, 0.8, seen).kept == 168 - round(0.8 * 168)  # has observed by itself, and needs no more


def test_a_class_is_no_criterion():
    with pytest.raises(ValueError, match=r"got a class, Magnitude; pass Magnitude\(\)"):
        prune_(two(), 0.5, criteria.Magnitude)


def test_criteria_by_name():
    assert {"fisher", "magnitude", "movement", "random", "soft_movement", "uncertainty"} <= set(criterion_names())
    with pytest.raises(ValueError, match=r"expected one of .*magnitude.*, got 'magnitud'; did you mean 'magnitude'\?"):
        prune_(two(), 0.5, "magnitud")
    with pytest.raises(ValueError, match=r"unknown option 'sead'; known: seed"):
        make_criterion("random", {"sead": 1})
    with pytest.raises(ValueError, match="options go with a name"):
        make_criterion(lambda linear, fqn: linear.weight, {"seed": 1})
    with pytest.raises(ValueError, match="expected a name"):
        make_criterion(3)
    with pytest.raises(ValueError, match="is taken"):
        register_criterion("magnitude", dict)
    for options in ({"learning_rate": 0}, {"pull": -1}):
        with pytest.raises(ValueError, match="soft_movement"):
            make_criterion("soft_movement", options)
    with pytest.raises(ValueError, match="beta1"):
        make_criterion("uncertainty", {"beta1": 1})


def test_a_criterion_that_needs_data_says_so_and_may_update_survivors():
    class Doubling(Criterion):
        name, needs_data = "doubling", True

        def masks(self, context):
            chosen = context.plan.masks({f: w.abs() for f, w in context.weights.items()}, context.sparsity)
            for linear in context.layers.values():
                linear.weight.mul_(context.data)
            return chosen

    with pytest.raises(ValueError, match="criterion 'doubling' needs data"):
        prune_(two(), 0.5, Doubling())
    model, plain = two(), two()
    prune_(model, 0.5, Doubling(), data=torch.tensor(2.0))
    prune_(plain, 0.5)
    assert torch.equal(model[0].weight, 2 * plain[0].weight)

    class Wrong(Criterion):
        def masks(self, context):
            return {}

    with pytest.raises(ValueError, match=r"mask of '0' expected shape \[7, 13\], got none"):
        prune_(two(), 0.5, Wrong())


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan"), None, "half", True])
def test_a_bad_sparsity_changes_nothing(sparsity):
    model = two()
    with pytest.raises(ValueError, match="sparsity expected in"):
        prune_(model, sparsity)
    assert sum(zeros(model).values()) == 0


@pytest.mark.parametrize("sparsity", [np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_a_sparsity_is_any_number(sparsity):
    assert prune_(two(), sparsity).kept == 84


def test_weights_that_are_nan_name_their_layer():
    model = two()
    model[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of 2 hold NaN"):
        prune_(model, 0.5)


@pytest.mark.parametrize("result", [lambda w: None, lambda w: w[0], lambda w: w.to(torch.complex64), lambda w: 3.0])
def test_a_function_that_returns_no_scores_names_the_layer(result):
    model = two()
    with pytest.raises(ValueError, match=r"scores of '0' expected a real tensor \[7, 13\], got .*; return one score"):
        prune_(model, 0.5, lambda linear, fqn: result(linear.weight.detach()))
    assert sum(zeros(model).values()) == 0


@pytest.mark.parametrize("criterion", ["admm", "sparsegpt", "wanda"])
def test_modes_that_would_stop_or_change_the_work_are_refused_before_it(criterion):
    model, data = two(), torch.randn(64, 13)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"got torch.inference_mode; call it outside"):
        prune_(model, 0.5, criterion, data=data)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype), pytest.raises(ValueError, match=r"got torch.autocast .*call it out"):
            prune_(model, 0.5, criterion, data=data)
    assert sum(zeros(model).values()) == 0
    with torch.no_grad():
        assert prune_(model, 0.5, criterion, data=data).density == 0.5


def test_magnitude_needs_no_mode_but_weights_that_can_be_written():
    model = two()
    with torch.inference_mode(), torch.autocast("cpu"):
        assert prune_(model, 0.5).density == 0.5
        born = two()
    with pytest.raises(ValueError, match="'0' expected to be writable, got an inference tensor; build or load"):
        prune_(born, 0.5)
    with torch.inference_mode():
        assert prune_(born, 0.5).density == 0.5


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_odd_weights_are_counted_exactly(sparsity, dtype):
    """Transposed, strided, frozen, shared, empty, of one weight."""
    torch.manual_seed(0)
    shared = nn.Linear(9, 9)
    model = nn.ModuleDict({
        "transposed": nn.Linear(5, 7), "strided": nn.Linear(6, 4), "frozen": nn.Linear(3, 8).requires_grad_(False),
        "shared": shared, "again": shared, "single": nn.Linear(1, 1), "hollow": nn.Linear(3, 2),
    }).to(dtype)  # fmt: skip
    model["transposed"].weight = nn.Parameter(torch.randn(5, 7).to(dtype).t())
    model["strided"].weight = nn.Parameter(torch.randn(4, 12).to(dtype)[:, ::2])
    model["hollow"].weight, model["hollow"].out_features = nn.Parameter(torch.zeros(0, 3, dtype=dtype)), 0
    total = 35 + 24 + 24 + 81 + 1
    report = prune_(model, sparsity)
    assert report.total == total and report.kept == total - round(sparsity * total)
    assert [row.name for row in report.layers] == ["transposed", "strided", "frozen", "shared", "single", "hollow"]
    found = sum(int(model[row.name].weight.count_nonzero()) for row in report.layers)
    assert found == report.kept - report.zeros and not model["transposed"].weight.is_contiguous()


def test_mask_sets_and_reports_can_be_compared():
    masks = prune_(two(), 0.7).masks
    assert masks == MaskSet(dict(reversed(list(masks.items())))) and masks != {**masks} and masks != None  # noqa: E711
    assert masks != MaskSet({**masks, "0": ~masks["0"]}) and masks != MaskSet({"0": masks["0"]})
    assert prune_(two(), 0.7) == prune_(two(), 0.7) != prune_(two(), 0.6)


def test_files_that_hold_no_masks_are_named(tmp_path):
    path = tmp_path / "masks.safetensors"
    prune_(two(), 0.7).masks.save(path)
    for text in (path.read_bytes()[:-3], b"hello", b""):
        (tmp_path / "other").write_bytes(text)
        with pytest.raises(ValueError, match=r"other expected to be a file that MaskSet\.save wrote"):
            MaskSet.load(tmp_path / "other")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        MaskSet.load(tmp_path)


def test_mask_sets(tmp_path):
    model = two()
    masks = prune_(model, 0.7).masks
    assert masks.mask_hash() == MaskSet(dict(reversed(list(masks.items())))).mask_hash()
    assert masks.mask_hash() == MaskSet.from_model(model).mask_hash()
    assert masks.mask_hash() != MaskSet({**masks, "0": ~masks["0"]}).mask_hash()
    assert masks.mask_hash() != MaskSet({"0": masks["0"], "3": masks["2"]}).mask_hash()
    masks.save(tmp_path / "masks.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]
    loaded = MaskSet.load(tmp_path / "masks.safetensors")
    assert loaded.mask_hash() == masks.mask_hash() and list(loaded) == list(masks)
    fresh = two()
    loaded.apply_(fresh)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters()))
    assert (tmp_path / "masks.safetensors").stat().st_size < 168 / 8 + 400
    with pytest.raises(ValueError, match="expected shape"):
        loaded.apply_(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="expected to be a Linear"):
        loaded.apply_(nn.Sequential(nn.Linear(13, 7)))
    with pytest.raises(ValueError, match=r"expected bool \[N, K\]"):
        MaskSet({"a": torch.ones(2, 2)})
    from safetensors.torch import save_file

    save_file({"0": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no mask file of version 1"):
        MaskSet.load(tmp_path / "other.safetensors")
    header = {"format": "sparseprune-masks", "version": "1", "shapes": json.dumps({"0": [7, 13]})}
    save_file({"0": torch.zeros(3, dtype=torch.uint8)}, tmp_path / "short.safetensors", metadata=header)
    with pytest.raises(ValueError, match="'0' expected 12 bytes"):
        MaskSet.load(tmp_path / "short.safetensors")
    save_file({"0": torch.full((12,), 255, dtype=torch.uint8)}, tmp_path / "long.safetensors", metadata=header)
    with pytest.raises(ValueError, match="behind its last weight"):  # 91 weights leave five bits
        MaskSet.load(tmp_path / "long.safetensors")


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (7, 13), (0, 4)])
def test_mask_sets_hold_bits_and_give_what_they_were_given(shape):
    generator = torch.Generator().manual_seed(0)
    wide = torch.rand(shape[0], 2 * shape[1], generator=generator) < 0.4
    given = {"b": wide[:, ::2], "a": ~wide[:, 1::2]}
    masks = MaskSet(given)
    assert list(masks) == ["b", "a"] and all(torch.equal(masks[fqn], mask) for fqn, mask in given.items())
    assert masks.kept == sum(int(mask.sum()) for mask in given.values()) and masks.total == 2 * shape[0] * shape[1]
    assert masks.shape("b") == shape and masks.kept_of("b") == int(given["b"].sum())
    masks["a"].logical_not_()  # what a look-up gives is the caller's own
    assert torch.equal(masks["a"], given["a"])
    held = sum(packed.bits.nbytes for packed in masks._masks.values())
    assert held == 2 * -(-shape[0] * shape[1] // 8)
    joined = MaskSet.joined([MaskSet({"a": given["a"]}), MaskSet({"b": given["b"]})])
    assert list(joined) == ["a", "b"] and joined.mask_hash() == masks.mask_hash() == MaskSet(masks).mask_hash()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_below_a_threshold_the_weights_decide_how_many_go(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 5)).to(dtype)
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    report = sp.prune_below_(model, 0.1)
    limit = torch.tensor(0.1, dtype=dtype)
    for i, old, row in zip((0, 2), before, report.layers):
        kept = old.abs() >= limit
        assert torch.equal(model[i].weight, torch.where(kept, old, 0)) and torch.equal(report.masks[str(i)], kept)
        assert row.kept == int(kept.sum()) and 0 < row.kept < row.total
    assert "|w| < 0.1" in str(report)


def test_below_a_threshold_of_zero_nothing_goes_and_one_above_all_is_told():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [p.detach().clone() for p in model.parameters()]
    assert sp.prune_below_(model, 0).density == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before))
    with pytest.warns(UserWarning, match=r"got nearly none.*a lower threshold"):
        assert sp.prune_below_(model, 9.0, filter_fn=lambda m, fqn: fqn == "0").kept == 0
    assert torch.equal(model[1].weight, before[2]) and not model[0].weight.any()


@pytest.mark.parametrize("threshold", [-0.1, float("nan"), float("inf"), "0.1", None, True])
def test_a_threshold_is_a_number(threshold):
    with pytest.raises(ValueError, match="threshold expected a number of at least 0"):
        sp.prune_below_(nn.Sequential(nn.Linear(8, 8)), threshold)


@pytest.mark.parametrize("threshold", [np.float32(0.1), np.int64(1), 1e39, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_threshold_is_any_number(threshold, dtype):
    """Of NumPy, too, and beyond what the weights' dtype holds."""
    linear = nn.Linear(8, 8).to(dtype)
    with torch.no_grad():
        linear.weight[0, 0], linear.weight[0, 1] = float("inf"), 2.0
    expected = linear.weight.detach().double()
    expected[expected.abs() < torch.tensor(float(threshold), dtype=torch.float64).to(dtype)] = 0
    report = sp.prune_below_(nn.Sequential(linear), threshold)
    assert torch.equal(linear.weight.double(), expected) and report.kept == int((expected != 0).sum())


def test_below_a_threshold_a_nan_changes_nothing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        model[1].weight[3, 3] = float("nan")
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"prune_below_: weight of '1'.*NaN"):
        sp.prune_below_(model, 0.1)
    assert torch.equal(model[0].weight, before)


def test_below_a_threshold_weights_of_inference_mode_are_named():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="prune_below_: weight of '0' expected to be writable"):
        sp.prune_below_(model, 0.1)


def test_mask_sets_reach_what_hides_in_other_weights():
    """They named q_proj of a packed attention, and neither found it again nor counted it."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = copy.deepcopy(model)
    report = sp.prune_(model, 0.6)
    masks = MaskSet.from_model(model)
    assert masks == report.masks and "self_attn.q_proj" in masks and masks.kept == report.kept
    report.masks.apply_(before)
    assert torch.equal(before.self_attn.in_proj_weight, model.self_attn.in_proj_weight)
    assert torch.equal(before.linear1.weight, model.linear1.weight)
