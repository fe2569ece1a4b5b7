"""Int8 weights with activations in 8 bits, as a user meets them: layers, sparsify_, files, whole encoders."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from stack_models import body, make, programs, stack, tokens
from torch import nn

import sparseprune as sp
from sparseprune import _native, bench, ops, reference
from sparseprune.nn.sparsify.measure import int8_layouts
from sparseprune.packing import Kind
from sparseprune.reference.int8 import round_tokens

INT8 = {"value_dtype": "int8", "activations": "int8"}
pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")


def pruned(rows: int = 48, columns: int = 64, sparsity: float = 0.5) -> nn.Linear:
    linear = nn.Linear(columns, rows)
    sp.prune_(nn.Sequential(linear), sparsity, granularity=sp.Block(1, 4))
    return linear


def expected_of(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """From the definition, not from the packed form: both sides on their grids."""
    w = linear.weight.detach()
    pairs = w.view(w.shape[0], -1, 2)
    reach = torch.where(pairs.prod(2) > 0, pairs.sum(2).abs(), 0).amax(1).maximum(w.abs().amax(1))
    scale = (reach / 127).unsqueeze(1)
    whole, of_token = round_tokens(x)
    return F.linear((whole * of_token).double(), ((w / scale).round() * scale).double(), linear.bias.double()).float()


@pytest.mark.parametrize("layout", [{"layout": "bsr", "blocksize": (1, 4)}, {"layout": "csr"}])
def test_layer(layout, close):
    linear = pruned()
    layer = sp.SparseLinear.from_linear(linear, **layout, **INT8).eval().requires_grad_(False)
    x = torch.randn(3, 7, 64)
    close(layer(x), expected_of(linear, x))
    error = (layer(x) - linear(x)).abs().mean() / linear(x).abs().mean()
    assert 0 < error < 0.03
    assert "activations=int8" in repr(layer) and layer.activations == "int8"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    assert torch.equal(layer.to_linear().weight, linear.weight)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7])
def test_few_rows_read_bits_and_get_what_many_get(sparsity):
    linear = nn.Linear(260, 50)
    sp.prune_(nn.Sequential(linear), sparsity)
    both, many = (
        sp.SparseLinear.from_linear(linear, tokens=tokens, **INT8).eval().requires_grad_(False)
        for tokens in ((1, 128), 128)
    )
    kinds = [both._packed(both._forms.for_rows(rows)).plan.kind for rows in (1, 128)]
    assert kinds == [Kind.BITMASK8, Kind.QUADS]
    x = torch.randn(128, 260)
    assert torch.equal(both(x), many(x))
    for rows in (1, 3, 11):
        assert torch.equal(both(x[:rows]), many(x[:rows]))
    few = torch.rand(50, 260) < 0.01  # a column in a hundred: quads read less
    with torch.no_grad():
        linear.weight.mul_(few)
    sparse = sp.SparseLinear.from_linear(linear, tokens=1, **INT8).eval().requires_grad_(False)
    assert sparse._packed(sparse._forms.for_rows(1)).plan.kind == Kind.QUADS


def test_layer_follows_its_values_and_trains_exactly(close):
    linear = pruned()
    layer = sp.SparseLinear.from_linear(linear, layout="bsr", blocksize=(1, 4), **INT8)
    x = torch.randn(5, 64)
    close(layer(x), linear(x))  # a gradient is wanted: in float32
    with torch.no_grad():
        before = layer.eval()(x)
        layer.values.mul_(2)
        twice = layer(x)
    close(twice - linear.bias, 2 * (before - linear.bias))


def test_the_reference_gives_the_same_bits():
    layer = sp.SparseLinear.from_linear(pruned(), layout="bsr", blocksize=(1, 4), **INT8).eval().requires_grad_(False)
    x = torch.randn(5, 64)
    packed = ops.pack(layer.to_layout(), **INT8)
    again = reference.packed_linear(
        x, packed.values, packed.index, packed.offsets, packed.scale, layer.bias, None, packed.plan, "none"
    )
    assert torch.equal(again, layer(x))


def test_errors():
    linear = pruned()
    for wrong, message in (
        ({"activations": "int8"}, "value_dtype='int8', got 'float32'"),
        ({"activations": "int4"}, "activations expected"),
        ({**INT8, "dense_from": 8}, "dense_from"),
    ):
        with pytest.raises(ValueError, match=message):
            sp.SparseLinear.from_linear(linear, **wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        sp.SparseLinear.from_linear(nn.Linear(6, 4), **INT8)
    with pytest.raises(ValueError, match="'int8' with value_dtype='int8'"):
        sp.sparsify_(nn.Sequential(linear), activations="int8")


def test_saved_and_loaded(tmp_path):
    model = nn.Sequential(pruned(), nn.ReLU(), nn.Linear(48, 4))
    dense = copy.deepcopy(model)
    sp.sparsify_(model, layout="bsr", blocksize=(1, 4), filter_fn=lambda m, n: n == "0", **INT8)
    model.eval().requires_grad_(False)
    sp.save(model, tmp_path / "m.safetensors")
    loaded = sp.load(dense, tmp_path / "m.safetensors").eval()
    x = torch.randn(9, 64)
    assert loaded[0].activations == "int8" and loaded[0].value_dtype == "int8"
    assert torch.equal(loaded.requires_grad_(False)(x), model(x))


def test_what_auto_may_choose_from():
    quads, scattered = pruned(64, 64, 0.5).weight != 0, torch.rand(64, 64) < 0.2
    fitting = {"csr": {"layout": "csr"}}
    assert list(int8_layouts(quads, fitting)) == ["int8", "int8 bsr1x4"]
    assert list(int8_layouts(scattered, fitting)) == ["int8", "int8 csr"]
    assert list(int8_layouts(torch.ones(64, 64, dtype=torch.bool), {})) == ["int8"]
    assert int8_layouts(torch.ones(64, 62, dtype=torch.bool), fitting) == {}


def test_auto_takes_what_is_measured(monkeypatch):
    """Every way is timed, and int8 only where it is allowed."""
    seen: list[list[str]] = []

    def choose(candidates, tokens, **options):
        seen.append(list(candidates))
        best = list(candidates)[-1]
        for setup in candidates.values():
            setup(tokens[0])()  # each of them runs
        times = {name: dict.fromkeys(tokens, 2.0) for name in candidates}
        return bench.Choice(best, 2.0, "as told", times, times)

    monkeypatch.setattr(bench, "choose_fastest", choose)
    model = nn.Sequential(pruned(), nn.ReLU(), nn.Linear(48, 32))
    report = sp.sparsify_(copy.deepcopy(model), tokens=16, filter_fn=lambda m, n: True, **INT8)
    assert seen == [["dense", "csr", "int8", "int8 bsr1x4"], ["dense", "int8"]]
    assert [layer.layout for layer in report.layers] == ["int8 bsr1x4", "int8"]
    seen.clear()
    sp.sparsify_(copy.deepcopy(model), tokens=16, filter_fn=lambda m, n: True, value_dtype="int8")
    assert seen == [["dense", "csr"]]


@pytest.mark.parametrize("name", ["bert", "modernbert", "torch prenorm"])
@torch.no_grad()
def test_whole_encoders(name):
    if name in ("bert", "modernbert"):
        pytest.importorskip("transformers")
    model = make(name, ffn=52)
    sp.prune_(model, 0.5, granularity=sp.Block(1, 4), filter_fn=lambda m, n: True)
    exact = copy.deepcopy(model)
    report = sp.sparsify_(model, layout="csr", filter_fn=lambda m, n: True, engine="program", **INT8)
    assert [s.engine for s in report.stacks] == ["program"], report.stacks
    ids = tokens(3, 13)
    with programs(model) as notes:
        found = body(model, name)(ids)
    assert notes == [None]
    steps = [type(step).__name__ for step in stack(model).ready().built.program.steps]
    # One for queries, keys and values together, one each for the attention's output and the two of the feed-forward.
    assert steps.count("Round") == 4 * steps.count("Attention")
    truth = body(exact, name)(ids)
    assert 0 < (found - truth).abs().max() < 0.1 * truth.abs().max()


def test_a_file_of_int8_values_is_rounded_once(tmp_path):
    model = nn.Sequential(pruned(64, 128, 0.6), nn.ReLU(), nn.Linear(64, 4))
    dense = copy.deepcopy(model)
    sp.sparsify_(model, layout="bsr", blocksize=(1, 4), filter_fn=lambda m, n: n == "0", **INT8)
    sp.save(model, tmp_path / "m.safetensors", value_dtype="int8")
    loaded = sp.load(dense, tmp_path / "m.safetensors").eval().requires_grad_(False)
    packed = loaded[0]._packed(loaded[0]._forms.largest)
    assert (packed.to_dense() - loaded[0].dense()).abs().max() < 1e-6  # what the file holds lies on the kernel's steps
    assert (packed.to_dense() - model[0].dense()).abs().max() <= packed.scale[0].max() * 1.01


def test_a_file_holds_what_inference_computes(tmp_path):
    """Each layer in its own dtype: int8 in the kernel's steps, zeros where these are zero, and exact ones untouched."""
    model = nn.Sequential(pruned(64, 128, 0.6), nn.ReLU(), pruned(64, 64, 0.6), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        model[0].weight[3, (model[0].weight[3] != 0).nonzero()[0]] = 1e-5  # kept, and less than half a step
    dense = copy.deepcopy(model)
    how = {"layout": "bsr", "blocksize": (1, 4), "filter_fn": lambda m, n: n in ("0", "2")}
    sp.sparsify_(model, exact_layers=["2"], **how, **INT8)
    model.eval().requires_grad_(False)
    sp.save(model, tmp_path / "m.safetensors", value_dtype="inference")
    sp.save(model, tmp_path / "whole.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    loaded = sp.load(dense, tmp_path / "m.safetensors").eval().requires_grad_(False)
    assert loaded[0].activations == "int8" and loaded[2].value_dtype == "float32"
    assert torch.equal(loaded[2].dense(), model[2].dense())
    x = torch.randn(9, 128)
    torch.testing.assert_close(loaded[0](x), model[0](x), rtol=1e-6, atol=1e-6)
    packed = model[0]._packed(model[0]._forms.largest).to_dense()
    assert torch.equal(loaded[0].dense() == 0, packed == 0) and (packed == 0).sum() > (model[0].dense() == 0).sum()
    with pytest.raises(ValueError, match="float32, bfloat16, int8, inference"):
        sp.save(model, tmp_path / "m.safetensors", value_dtype="own")
