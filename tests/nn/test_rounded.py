"""Dense Linears that answer few rows from a copy in bfloat16: when, how exactly, and that nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparseprune as sp
from sparseprune import _native, checkpoint
from sparseprune.checkpoint import CheckpointError
from sparseprune.nn import RoundedLinear, SparseLinear
from sparseprune.nn.fusion import FusedRMSNorm

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")


def tied(monkeypatch, gain=2.0):
    """A decoder with a tied head, pruned; the timings of rounding are given."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("sparseprune.nn.sparsify._rounded_ratio", lambda weight, bias, rows: gain if rows < 4 else 0.9)
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


def test_the_copy_follows_the_weight(close):
    layer = RoundedLinear.from_linear(nn.Linear(16, 8).eval(), 1)
    x = torch.randn(1, 16)

    @torch.no_grad()
    def check(layer):
        close(layer(x), F.linear(x, layer.weight.bfloat16().float(), layer.bias))

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
        assert twin._copy is None and twin.rows == 1
        check(twin)
    layer.double().float()  # may come back to the same address
    assert layer._copy is None
    check(layer)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    with torch.no_grad():
        assert half(x.bfloat16()).dtype == torch.bfloat16


def test_sparsify_rounds_the_head_only_when_asked_and_densify_undoes_it(monkeypatch):
    model = tied(monkeypatch)
    with pytest.raises(ValueError, match="dense_values expected one of"):
        sp.sparsify_(model, dense_values="int8")
    plain = sp.sparsify_(copy.deepcopy(model), layout="csr", tokens=(1, 2, 4, 128))
    assert plain.rounded == []
    head, embedding = model.lm_head, model.get_input_embeddings().weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        before = model(ids).logits
        report = sp.sparsify_(model, layout="csr", tokens=(1, 2, 4, 128), dense_values="bfloat16")
        assert [(r.name, r.layout, r.ratio) for r in report.rounded] == [("lm_head", "bfloat16", 2.0)]
        assert isinstance(model.lm_head, RoundedLinear) and model.lm_head.rows == 2
        assert model.lm_head.weight is embedding is model.get_output_embeddings().weight
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids[:, :1]).logits, before[:, :1], rtol=2e-2, atol=2e-2)
        assert "bfloat16, 2.00 times dense: lm_head" in str(report)
        sp.densify_(model)
        assert type(model.lm_head) is nn.Linear and model.lm_head.weight is head.weight
        assert torch.equal(model(ids).logits, before)


def test_what_is_slower_watched_or_not_called_for_stays_with_a_reason(monkeypatch):
    slow = sp.sparsify_(tied(monkeypatch, gain=1.0), layout="csr", tokens=1, dense_values="bfloat16")
    assert [(r.layout, r.reason) for r in slow.rounded] == [("dense", "bfloat16 runs 1.00 at 1 tokens")]
    watched = tied(monkeypatch)
    watched.lm_head.register_forward_hook(lambda *_: None)
    report = sp.sparsify_(watched, layout="csr", tokens=1, dense_values="bfloat16")
    assert report.rounded[0].reason == "a hook observes the module" and type(watched.lm_head) is nn.Linear
    report = sp.sparsify_(tied(monkeypatch), layout="csr", tokens=128, dense_values="bfloat16")
    assert report.rounded[0].reason == "no call of up to 8 rows among tokens=(128,)"


def test_the_ratio_is_measured(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    monkeypatch.setattr("sparseprune.nn.sparsify._IN_TURN", 1 << 18)
    from sparseprune.nn.sparsify import _rounded_ratio

    assert 0.05 < _rounded_ratio(torch.randn(64, 256), None, 1) < 50


def test_a_checkpoint_brings_it_back(tmp_path, monkeypatch):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    empty = copy.deepcopy(model)
    sp.sparsify_(model, layout="csr", tokens=(1, 128), dense_values="bfloat16")
    sp.save(model, path)
    sp.load(empty, path)
    assert isinstance(empty.lm_head, RoundedLinear) and empty.lm_head.rows == 1
    assert empty.lm_head.weight is empty.get_input_embeddings().weight
    ids = torch.arange(5)[None]
    with torch.no_grad():
        assert torch.equal(model(ids[:, :1]).logits, empty(ids[:, :1]).logits)


def test_a_checkpoint_with_wrong_rows_is_refused(tmp_path, monkeypatch):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    sp.sparsify_(model, layout="csr", tokens=1, dense_values="bfloat16")
    model.lm_head.rows = -3
    sp.save(model, path)
    with pytest.raises(CheckpointError, match="rounded expected rows of a dense Linear in the file"):
        sp.load(tied(monkeypatch), path)


def test_a_checkpoint_that_rounds_a_sparse_layer_is_refused(tmp_path, monkeypatch):
    model, path = tied(monkeypatch), tmp_path / "model.safetensors"
    sp.sparsify_(model, layout="csr", tokens=1)
    state = checkpoint._state_of(model)
    (sparse, *_) = state.sparse
    monkeypatch.setattr(checkpoint, "_state_of", lambda model: replace(state, rounded={sparse: 1}))
    sp.save(model, path)
    with pytest.raises(CheckpointError, match=f"rounded expected rows of a dense Linear in the file, got '{sparse}'"):
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
