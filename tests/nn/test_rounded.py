"""Dense Linears that answer few rows from a copy in bfloat16: when, how exactly, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune import _native, checkpoint
from sparseprune.checkpoint import CheckpointError
from sparseprune.nn import RoundedLinear, SparseLinear
from sparseprune.nn.fusion import FusedRMSNorm
from sparseprune.nn.sparsify import rounding, sparsify, timing

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")


def tied(monkeypatch, gain=2.0):
    """A decoder with a tied head, pruned; the timings of rounding are given."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(rounding, "rounded_ratio", lambda weight, bias, rows, dtype: gain if rows < 4 else 0.9)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=99, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    sp.prune_(model, 0.5)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_few_rows_read_the_copy_and_the_rest_the_weight(bias, close):
    linear = nn.Linear(37, 11, bias).eval()
    layer = RoundedLinear.from_linear(linear, 3)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert list(layer.state_dict()) == list(linear.state_dict())
    near = F.linear(torch.eye(37), linear.weight.bfloat16().float(), linear.bias)
    with torch.no_grad():
        for rows in range(1, 4):
            x = torch.randn(rows, 1, 37)
            close(layer(x), F.linear(x, linear.weight.bfloat16().float(), linear.bias))
        x = torch.randn(4, 37)
        assert torch.equal(layer(x), linear(x))
        assert layer(torch.randn(0, 37)).shape == (0, 11)
        one = torch.eye(37)[:1]
        close(layer(one), near[:1])
        assert not torch.equal(layer(one), linear(one))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(one), linear(one))
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(one), linear(one))
    layer(one).sum().backward()
    assert torch.equal(linear.weight.grad, one.expand(11, -1))
    with torch.no_grad():
        assert torch.equal(layer.train()(one), linear(one))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer.eval()(torch.randn(1, 38))
    with pytest.raises(ValueError, match="rows expected at least 1, got 0"):
        RoundedLinear.from_linear(linear, 0)
    with pytest.raises(ValueError, match="value_dtype expected one of"):
        RoundedLinear.from_linear(linear, 1, "int4")


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8"])
def test_the_copy_follows_the_weight(value_dtype, close):
    layer = RoundedLinear.from_linear(nn.Linear(16, 8).eval(), 1, value_dtype)
    x = torch.randn(1, 16)

    @torch.no_grad()
    def check(layer):
        held = layer.weight.bfloat16().float()
        if value_dtype == "int8":
            step = layer.weight.abs().amax(1, keepdim=True) / 127
            held = (layer.weight / step).round() * step
        close(layer(x), F.linear(x, held, layer.bias))

    check(layer)
    with torch.no_grad():
        layer.weight.mul_(2)
    check(layer)
    layer.weight.data.mul_(2)
    layer.repack()
    check(layer)
    layer.load_state_dict({"weight": torch.randn(8, 16), "bias": torch.randn(8)}, assign=True)
    check(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin._copy.made is None and twin.rows == 1
        check(twin)
    layer.double().float()  # may come back to the same address
    assert layer._copy.made is None
    check(layer)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_sparsify_rounds_the_head_only_when_asked_and_densify_undoes_it(monkeypatch):
    model = tied(monkeypatch)
    with pytest.raises(ValueError, match="dense_value_dtype expected one of"):
        sp.sparsify_(model, dense_value_dtype="int4")
    plain = sp.sparsify_(copy.deepcopy(model), layout="csr", tokens=(1, 2, 4, 128))
    assert plain.rounded == []
    head, embedding = model.lm_head, model.get_input_embeddings().weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = sp.sparsify_(model, layout="csr", tokens=(1, 2, 4, 128), dense_value_dtype="bfloat16")
        assert [(r.name, r.layout, r.ratio) for r in report.rounded] == [("lm_head", "bfloat16", 2.0)]
        assert isinstance(model.lm_head, RoundedLinear) and model.lm_head.rows == 2
        assert model.lm_head.weight is embedding is model.get_output_embeddings().weight
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids[:, :1]).logits, before[:, :1], rtol=2e-2, atol=2e-2)
        assert "bfloat16, 2.00 times dense: lm_head" in str(report)
        sp.densify_(model)
        assert type(model.lm_head) is nn.Linear and model.lm_head.weight is head.weight
        assert torch.equal(model(ids).logits, before)


def test_the_head_in_int8(monkeypatch):
    model = tied(monkeypatch)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = sp.sparsify_(model, layout="csr", tokens=(1, 128), dense_value_dtype="int8")
        assert [(r.name, r.layout) for r in report.rounded] == [("lm_head", "int8")]
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        found = model(ids[:, :1]).logits
        assert not torch.allclose(found, before[:, :1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, before[:, :1], rtol=2e-2, atol=2e-2)
        sp.densify_(model)
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8"])
def test_layers_that_are_to_stay_exact_do(value_dtype, monkeypatch):
    monkeypatch.setattr(rounding, "rounded_ratio", lambda *_: 2.0)
    monkeypatch.setattr(sparsify, "measure", lambda *_: ("dense", {}, 1.0, "slower", ""))
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    sp.prune_(model, 0.5)
    x = torch.randn(1, 16)
    with torch.no_grad():
        expected = model[1](x)
    options = {"tokens": 1, "filter_fn": lambda module, name: name != "2", "dense_value_dtype": value_dtype}
    report = sp.sparsify_(model, exact_layers=["1"], **options)
    assert [type(layer) for layer in model] == [RoundedLinear, nn.Linear, RoundedLinear]
    assert [r.layout for r in report.rounded] == [value_dtype, "dense", value_dtype]
    assert report.rounded[1].reason == "exact_layers keeps it in float32"
    with torch.no_grad():
        assert torch.equal(model[1](x), expected)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8"])
def test_a_row_with_nan_is_nan_and_no_other(value_dtype, close):
    linear = nn.Linear(16, 8).eval()
    with torch.no_grad():
        linear.weight[3, 5] = float("nan")
        linear.weight[6] = 0
        x = torch.randn(2, 16)
        expected = linear(x)
        layer = RoundedLinear.from_linear(linear, 2, value_dtype)
        found = layer(x)
    assert expected[:, 3].isnan().all()
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2, equal_nan=True)
    assert not torch.equal(found[:, 0], expected[:, 0])  # it is the copy that answered


def test_a_layer_under_two_names_has_one_copy_behind_a_file(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.ModuleDict({"one": nn.Linear(16, 8), "other": nn.Linear(8, 16)})
        model["two"] = model["one"]
        return model.eval()

    model = make()
    model["one"] = model["two"] = RoundedLinear.from_linear(model["one"], 2, "int8")
    sp.save(model, tmp_path / "a")
    found = sp.load(make(), tmp_path / "a")
    assert found["one"] is found["two"] and isinstance(found["one"], RoundedLinear)


def test_what_is_slower_watched_or_not_called_for_stays_with_a_reason(monkeypatch):
    slow = sp.sparsify_(tied(monkeypatch, gain=1.0), layout="csr", tokens=1, dense_value_dtype="bfloat16")
    assert [(r.layout, r.reason) for r in slow.rounded] == [("dense", "bfloat16 runs 1.00 at 1 tokens")]
    watched = tied(monkeypatch)
    watched.lm_head.register_forward_hook(lambda *_: None)
    report = sp.sparsify_(watched, layout="csr", tokens=1, dense_value_dtype="bfloat16")
    assert report.rounded[0].reason == "a hook observes the module" and type(watched.lm_head) is nn.Linear
    report = sp.sparsify_(tied(monkeypatch), layout="csr", tokens=128, dense_value_dtype="bfloat16")
    assert report.rounded[0].reason == "no call of up to 8 rows among tokens=(128,)"


def test_layers_that_are_alike_are_timed_once_and_chosen_alike(monkeypatch):
    asked = []

    def ratio(weight, bias, rows, dtype):
        asked.append((tuple(weight.shape), bias is None, weight.requires_grad, rows))
        return 2.0 if len(asked) % 2 else 0.5

    monkeypatch.setattr(rounding, "rounded_ratio", ratio)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8).requires_grad_(False)]
    model = nn.Sequential(*layers, nn.Linear(8, 4)).eval()
    choices = rounding.round_(model, (1, 4), "int8")
    assert [choice.layout for choice in choices] == ["int8"] * 5
    assert [m.rows for m in model] == [1] * 5 and len(set(asked)) == len(asked) == 8


def test_the_ratio_is_measured(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    monkeypatch.setattr(timing, "_IN_TURN", 1 << 18)

    assert 0.05 < rounding.rounded_ratio(torch.randn(64, 256), None, 1) < 50


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8"])
def test_a_checkpoint_brings_it_back(value_dtype, tmp_path, monkeypatch, close):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    empty = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", tokens=(1, 128), dense_value_dtype=value_dtype)
    sp.save(model, path)
    sp.load(empty, path)
    assert isinstance(empty.lm_head, RoundedLinear) and empty.lm_head.rows == 1
    assert empty.lm_head.value_dtype == value_dtype
    assert empty.lm_head.weight is empty.get_input_embeddings().weight
    ids, x = torch.arange(5)[None], torch.randn(1, 64)
    with torch.no_grad():
        assert torch.equal(model.lm_head(x), empty.lm_head(x))
        close(model(ids[:, :1]).logits, empty(ids[:, :1]).logits)


def test_a_checkpoint_with_wrong_rows_is_refused(tmp_path, monkeypatch):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    sp.sparsify_(model, layout="csr", tokens=1, dense_value_dtype="bfloat16")
    model.lm_head.rows = -3
    sp.save(model, path)
    with pytest.raises(CheckpointError, match=r"rounded expected \[rows, value_dtype\] .*got 'lm_head': \[-3"):
        sp.load(tied(monkeypatch), path)


def test_a_checkpoint_that_rounds_a_sparse_layer_is_refused(tmp_path, monkeypatch):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    sp.sparsify_(model, layout="csr", tokens=1)
    state = checkpoint.gather(model)
    (sparse, *_) = state.structure.sparse
    state.structure.rounded = {sparse: [1, "int8"]}
    monkeypatch.setattr(checkpoint, "gather", lambda model, value_dtype: state)
    sp.save(model, path)
    with pytest.raises(CheckpointError, match=f"rounded expected .* of a dense Linear in the file.*got '{sparse}'"):
        sp.load(tied(monkeypatch), path)


def test_without_the_core_each_layer_takes_another_way(monkeypatch, close):
    linear = nn.Linear(16, 8).eval()
    sp.prune_(nn.Sequential(linear), 0.5)
    norm = nn.RMSNorm(16, eps=1e-6).eval()
    layers = [
        (SparseLinear.from_linear(linear).eval(), linear),
        (RoundedLinear.from_linear(linear, 4), linear),
        (FusedRMSNorm(norm, 1e-6), norm),
    ]
    monkeypatch.setattr(_native, "C", None)
    x = torch.randn(2, 16)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # said once: the reference runs
        for layer, plain in layers:
            close(layer(x), plain(x))


def test_an_adapter_that_is_merged_is_in_the_copy(close):
    """peft writes through ``.data`` to a frozen weight, whose version does not tell."""
    peft = pytest.importorskip("peft")
    layer = RoundedLinear.from_linear(nn.Linear(37, 11), 3)
    model, x = nn.ModuleDict({"head": layer}).eval().requires_grad_(False), torch.randn(2, 37)
    with torch.no_grad():
        before = layer(x)
        model.forward = layer.forward
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
        merged = adapted.merge_and_unload()["head"]
        assert merged is layer and not torch.allclose(layer(x), before, atol=1e-2)
        close(layer(x), F.linear(x, layer.weight.bfloat16().float(), layer.bias))
