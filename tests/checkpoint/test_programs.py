"""A stack that ran as one program does so again after it was saved and loaded."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn

import sparseprune as sp
from sparseprune import _native
from sparseprune.checkpoint import CheckpointError
from sparseprune.nn.stacks import stack_of

pytestmark = pytest.mark.skipif(_native.C is None, reason="needs the compiled core")


def encoder(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    return nn.Sequential(nn.Linear(8, 32), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()


@pytest.fixture
def pruned() -> nn.Module:
    model = encoder().requires_grad_(False)
    sp.prune_(model, 0.7)
    sp.sparsify_(model, layout="csr", tokens=16, engine="program")
    assert stack_of(model[1]) is not None
    return model


@pytest.mark.parametrize("keep", ["canonical", "packed"])
def test_a_loaded_model_runs_its_programs(pruned, tmp_path, keep):
    sp.save(pruned, tmp_path / "m.safetensors")
    again = sp.load(encoder(1).requires_grad_(False), tmp_path / "m.safetensors", keep=keep)
    stack, x = stack_of(again[1]), torch.randn(3, 5, 8)
    assert stack is not None and stack.why_not(again[0](x)) is None
    assert torch.equal(again(x), pruned(x))
    assert torch.equal(copy.deepcopy(again)(x), pruned(x))
    sp.densify_(again)
    assert stack_of(again[1]) is None


def test_layers_stay_layers(pruned, tmp_path):
    sp.densify_(pruned)
    sp.sparsify_(pruned, layout="csr", tokens=16, engine="layers")
    sp.save(pruned, tmp_path / "m.safetensors")
    assert stack_of(sp.load(encoder(1), tmp_path / "m.safetensors")[1]) is None
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert "programs" not in json.loads(file.metadata()["structure"])


def test_training_goes_through_the_layers(pruned, tmp_path):
    sp.save(pruned, tmp_path / "m.safetensors")
    again = sp.load(encoder(1), tmp_path / "m.safetensors").train()
    again(torch.randn(2, 4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in again.parameters())


def test_a_name_that_is_no_stack_is_told(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("sparseprune.checkpoint.state.stacks_in_use", lambda model: ["1", "0"])
    sp.save(pruned, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="'0' ran as one program"):
        again = sp.load(encoder(1), tmp_path / "m.safetensors")
    assert stack_of(again[1]) is not None and stack_of(again[0]) is None


def test_names_are_checked(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr("sparseprune.checkpoint.state.stacks_in_use", lambda model: [3])
    sp.save(pruned, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="programs expected names of modules, got 3"):
        sp.load(encoder(1), tmp_path / "m.safetensors")


@pytest.mark.parametrize("wrong", ["0", 3, ["1"], {}, None])
def test_layered_prompts_are_checked(pruned, tmp_path, monkeypatch, wrong):
    monkeypatch.setattr("sparseprune.checkpoint.state.layered_prompts", lambda model: ["1", wrong])
    sp.save(pruned, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="layered_prompts expected names among programs, got "):
        sp.load(encoder(1), tmp_path / "m.safetensors")


@pytest.mark.parametrize("layered", [True, False])
def test_prompts_that_ran_layer_by_layer_do_so_again(tmp_path, layered):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=40
    )
    model, empty = (transformers.LlamaForCausalLM(config).eval().requires_grad_(False) for _ in range(2))
    sp.prune_(model, 0.7)
    sp.sparsify_(model, layout="csr", tokens=1, engine="program")
    if layered:
        stack_of(model.model).by_layers = "measured"
    sp.save(model, tmp_path / "m.safetensors")
    model.save_pretrained(tmp_path / "folder")
    base = transformers.AutoModel.from_pretrained(tmp_path / "folder")
    base.save_pretrained(tmp_path / "base")
    loaded = [sp.load(empty, tmp_path / "m.safetensors"), sp.load(tmp_path / "folder"), base]
    loaded.append(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    expected = "prompts run layer by layer: they did so when the model was saved" if layered else None
    for again in loaded:
        assert stack_of(getattr(again, "model", again)).by_layers == expected
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        assert ("layered_prompts" in json.loads(file.metadata()["structure"])) == layered


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_folders_of_transformers(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        made = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))
        fqn = "bert.encoder"
    else:
        made = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=40, num_key_value_heads=2, max_position_embeddings=32, **sizes)
        )
        fqn = "model"
    model = made.eval().requires_grad_(False)
    sp.prune_(model, 0.7)
    sp.sparsify_(model, layout="csr", tokens=1, engine="program")
    assert stack_of(model.get_submodule(fqn)) is not None
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (2, 6))

    def answers(model):
        if kind == "bert":
            return model(input_ids=ids).logits
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = [type(model).from_pretrained(tmp_path), sp.load(tmp_path), sp.load(tmp_path, keep="packed")]
    for again in loaded:
        assert stack_of(again.get_submodule(fqn)) is not None
        with torch.no_grad():
            assert torch.equal(answers(again), answers(model))
    without = transformers.AutoModel.from_pretrained(tmp_path)
    assert stack_of(without.get_submodule(fqn.partition(".")[2])) is not None
    without.save_pretrained(tmp_path / "base")
    assert stack_of(type(model).from_pretrained(tmp_path / "base").get_submodule(fqn)) is not None
