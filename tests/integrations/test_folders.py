"""Sparse folders of transformers: written by save_pretrained, read by from_pretrained, pipelines and others."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sparseprune as sp
from sparseprune.checkpoint import CheckpointError
from sparseprune.nn.filters import prunable_linears
from sparseprune.pruning import Block, Heads, Neurons

transformers = pytest.importorskip("transformers")
LAYOUTS = {
    "csr": ("element", {}), "bsr": (Block(4, 1), {"blocksize": (4, 1)}), "nm": (sp.NM(2, 4), {"nm": (2, 4)}),
}  # fmt: skip


def sparse(model: nn.Module, sparsity: float = 0.8, layout: str = "csr", **options) -> nn.Module:
    granularity, own = LAYOUTS[layout]
    sp.prune_(model, None if layout == "nm" else sparsity, granularity=granularity)
    sp.sparsify_(model, layout=layout, engine="layers", **own, **options)
    return model


def sparse_layers(model: nn.Module) -> dict[str, str]:
    return {name: module.extra_repr() for name, module in model.named_modules() if isinstance(module, sp.SparseLinear)}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    sp.densify_(model)
    return dict(model.state_dict())


def check_same(model: nn.Module, other: nn.Module) -> None:
    assert type(model) is type(other) and sparse_layers(model) == sparse_layers(other)
    mine, others = weights(model), weights(other)
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "mixtral", "qwen"])
def test_from_pretrained_gives_back_what_save_pretrained_wrote(name, layout, make, answers, tmp_path):
    model = sparse(make(name), layout=layout) if name != "gpt2" else make(name)
    if name == "gpt2":
        sp.nn.expose_linears_(model)
        sparse(model, layout=layout)
    expected = answers(model)
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "is_quantized")
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    assert sparse_layers(again) and not again.training
    check_same(again, model)
    torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-5)
    check_same(sp.load(tmp_path), model)
    again.save_pretrained(tmp_path / "again")  # and so on
    check_same(type(model).from_pretrained(tmp_path / "again"), model)


def test_the_folder_is_smaller_and_holds_safetensors_only(make, tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path / "dense")
    sp.save(sparse(model), tmp_path / "ours.safetensors")
    model.save_pretrained(tmp_path / "sparse")
    assert sorted(os.listdir(tmp_path / "sparse")) == ["config.json", "model.safetensors"]
    held = load_file(tmp_path / "sparse" / "model.safetensors")
    pruned = set(prunable_linears(make("bert")))
    size = {n: sum(t.numel() * t.element_size() for k, t in held.items() if k.startswith(f"{n}.values::"))
            for n in pruned}  # fmt: skip
    for name, bytes_held in size.items():
        weight = model.get_submodule(name).weight
        kept = int((weight != 0).sum())
        assert 4 * kept < bytes_held < 4 * kept + weight.numel() // 8 + 400, name
    assert not any(name.startswith(f"{n}.weight") for name in held for n in pruned)
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "sparseprune" and set(config["layers"]["sparse"]) == pruned


def test_shards_device_map_dtype_and_the_disk(make, answers, tmp_path):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    kind = type(model)
    check_same(kind.from_pretrained(tmp_path), model)
    check_same(kind.from_pretrained(tmp_path, device_map="auto"), model)
    narrow = kind.from_pretrained(tmp_path, dtype=torch.bfloat16)
    layer = "bert.encoder.layer.0.attention.self.query"
    assert narrow.dtype is narrow.get_submodule(layer).values.dtype is torch.bfloat16
    assert torch.equal(narrow.get_submodule(layer).values, model.get_submodule(layer).values.bfloat16())
    assert kind.from_pretrained(tmp_path, dtype="auto").dtype is torch.float32
    parts = {"bert.embeddings": "cpu", "bert.encoder.layer.0": "cpu", "bert.encoder.layer.1": "disk",
             "bert.pooler": "cpu", "classifier": "cpu"}  # fmt: skip
    pytest.importorskip("accelerate")
    away = kind.from_pretrained(tmp_path, device_map=parts, offload_folder=str(tmp_path / "away"))
    second = away.bert.encoder.layer[1].attention.self.query
    assert isinstance(second, sp.SparseLinear) and second.values.is_meta
    torch.testing.assert_close(answers(away), answers(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected every sparse layer in memory, got 6 on the disk.*device_map='cpu'"):
        away.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "config.json").exists()


def test_some_weights_stay_wider_than_the_rest(make, tmp_path):
    model = sparse(make("t5"))
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    kinds = {name: half.get_submodule(name).values.dtype for name in sparse_layers(half)}
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wo"] is torch.float32
    assert kinds["encoder.block.0.layer.1.DenseReluDense.wi"] is torch.float16


def test_no_dense_model_is_made_while_it_loads(make, tmp_path, monkeypatch):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path)
    seen = []
    prepare = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["sparseprune"]._process_model_before_weight_loading

    def watched(self, model, **kwargs):
        prepare(self, model, **kwargs)
        seen.extend((name, tuple(p.shape), p.is_meta) for name, p in model.named_parameters())

    kind = transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["sparseprune"]
    monkeypatch.setattr(kind, "_process_model_before_weight_loading", watched)
    type(model).from_pretrained(tmp_path)
    assert all(meta for _, _, meta in seen)
    held = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: shape for name, shape, _ in seen} == held


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_kept_values_can_be_rounded_and_a_pruned_model_need_not_run_sparse(values, make, answers, tmp_path):
    from sparseprune.integrations.folder import save_pretrained

    model = make("bert")
    masks = sp.prune_(model, 0.8).masks
    save_pretrained(model, tmp_path, value_dtype=values)
    again = type(model).from_pretrained(tmp_path)
    assert not sparse_layers(again)
    for name in masks:
        weight, rounded = model.get_submodule(name).weight, again.get_submodule(name).weight
        assert torch.equal(rounded != 0, masks[name])
        if values == "bfloat16":
            assert torch.equal(rounded, weight.bfloat16().float())
        else:
            step = weight.abs().amax(1, keepdim=True) / 127
            assert bool(((rounded - weight).abs() <= step + 1e-7).all())
    size = (tmp_path / "model.safetensors").stat().st_size
    save_pretrained(model, tmp_path / "exact")
    assert size < (tmp_path / "exact" / "model.safetensors").stat().st_size
    check_same(type(model).from_pretrained(tmp_path / "exact"), model)


def test_home_is_one_place_for_writing_and_reading(make, tmp_path, monkeypatch):
    from sparseprune.integrations.folder import save_pretrained

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    model = sparse(make("bert"))
    save_pretrained(model, "~/saved")
    check_same(sp.load("~/saved"), model)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["home"]


def test_a_dense_folder_is_sparsified_as_it_loads(make, answers, tmp_path):
    from sparseprune.integrations.folder import save_pretrained
    from sparseprune.integrations.quantizer import SparsePruneConfig

    model = make("bert")
    sp.prune_(model, 0.8)
    model.save_pretrained(tmp_path)
    options = SparsePruneConfig(layout="csr", tokens=27)
    again = type(model).from_pretrained(tmp_path, quantization_config=options)
    assert set(sparse_layers(again)) == set(prunable_linears(model))
    torch.testing.assert_close(answers(again), answers(model), rtol=1e-5, atol=1e-5)
    rounded = SparsePruneConfig(layout="csr", tokens=27, value_dtype="int8", activations="int8")
    again = type(model).from_pretrained(tmp_path, quantization_config=rounded)
    assert all("value_dtype=int8, activations=int8" in told for told in sparse_layers(again).values())
    error = (answers(again) - answers(model)).abs().max()
    assert 0 < error < 0.1
    again.save_pretrained(tmp_path / "rounded")
    check_same(type(model).from_pretrained(tmp_path / "rounded"), again)
    save_pretrained(again, tmp_path / "narrow", value_dtype="int8")  # in the very steps that the products round to
    narrow = type(model).from_pretrained(tmp_path / "narrow")
    torch.testing.assert_close(answers(narrow), answers(again), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match=r"expected layers, or options of sparsify_.*got layuot"):
        SparsePruneConfig(layuot="csr")


def test_what_else_a_layer_may_hold(make, answers, tmp_path):
    """A low-rank term, an activation of its own, a mask, a rounded head, several token counts."""
    model = make("bert")
    sp.prune_(model, 0.8)
    first = model.bert.encoder.layer[0]
    query = first.attention.self.query
    generator = torch.Generator().manual_seed(2)
    factors = {"low_rank_a": torch.randn(3, 48, generator=generator), "low_rank_b": torch.randn(48, 3)}
    first.attention.self.query = sp.SparseLinear.from_linear(query, tokens=(8, 64), dense_from=999, **factors)
    model.bert.pooler.dense = sp.SparseLinear.from_linear(model.bert.pooler.dense, activation="relu")
    first.output.dense = sp.MaskedLinear.from_linear(first.output.dense)
    model.classifier = sp.nn.RoundedLinear.from_linear(model.classifier, 4, "int8")
    model.eval().save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    layers = again.bert.encoder.layer[0]
    assert sparse_layers(again) == sparse_layers(model)
    for name, value in factors.items():
        assert torch.equal(getattr(layers.attention.self.query, name), value)
    assert torch.equal(layers.output.dense.mask, first.output.dense.mask)
    assert isinstance(again.classifier, sp.nn.RoundedLinear) and again.classifier.rows == 4
    assert again.classifier.value_dtype == "int8"
    torch.testing.assert_close(answers(again), answers(model), rtol=1e-5, atol=1e-5)


def test_a_folder_of_a_model_with_a_head_serves_one_without_and_the_other_way_round(make, ids, tmp_path):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path / "head")
    body = transformers.AutoModel.from_pretrained(tmp_path / "head")
    assert len(sparse_layers(body)) == len(sparse_layers(model))
    with torch.no_grad():
        expected = model.bert(ids).last_hidden_state
        torch.testing.assert_close(body(ids).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    body.save_pretrained(tmp_path / "body")
    again = type(model).from_pretrained(tmp_path / "body", num_labels=3)
    check_same(again.bert, model.bert)


def test_two_threads_write_a_model_one_after_the_other(make):
    """What one tells transformers of the model was taken for the other's, and gone in the middle of it."""
    from sparseprune.integrations.quantizer import in_our_form

    model, seen = sparse(make("bert")), []

    def write():
        with in_our_form(model, "int8"):
            seen.append(model.config.quantization_config.stored_value_dtype)

    other = threading.Thread(target=write)
    with in_our_form(model, "bfloat16"), in_our_form(model, "int8"):  # as our save_pretrained, within transformers' own
        other.start()
        other.join(0.3)
        assert not seen and model.config.quantization_config.stored_value_dtype == "bfloat16"
    other.join(20)
    assert seen == ["int8"] and not hasattr(model.config, "quantization_config")


def test_one_part_of_a_model_of_several_is_taken_of_the_whole(tmp_path):
    """transformers reads a tower by itself under other names, and with a configuration that says nothing of layers."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 20, "bos_token_id": 1, "eos_token_id": 2, **sizes},
        vision_config={"image_size": 8, "patch_size": 4, **sizes}, projection_dim=8,
    )  # fmt: skip
    model = sparse(transformers.CLIPModel(config).eval())
    model.save_pretrained(tmp_path)
    tower, ids = transformers.CLIPTextModel, torch.tensor([[1, 5, 2]])
    with pytest.raises(ValueError, match="load the whole, and take the part of it"):
        tower.from_pretrained(tmp_path)
    told = transformers.CLIPTextConfig.from_pretrained(tmp_path)
    told.quantization_config = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    with pytest.raises(ValueError, match=r"got 6 that go by another one in this model \(encoder.*take the part"):
        tower.from_pretrained(tmp_path, config=told)
    part = transformers.CLIPModel.from_pretrained(tmp_path).text_model
    torch.testing.assert_close(part(ids)[0], model.text_model(ids)[0])


def test_a_densified_model_saves_as_any_other(make, answers, tmp_path):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path / "sparse")
    again = type(model).from_pretrained(tmp_path / "sparse")
    sp.densify_(again)
    again.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert set(load_file(tmp_path / "dense" / "model.safetensors")) == set(make("bert").state_dict())
    torch.testing.assert_close(
        answers(type(model).from_pretrained(tmp_path / "dense")), answers(model), rtol=1e-5, atol=1e-5
    )


def test_a_model_that_was_loaded_trains_copies_and_pickles(make, answers, tmp_path):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).train()
    before = answers(again.eval())
    optimiser = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss.backward()
    optimiser.step()
    after = answers(again)
    assert not torch.allclose(before, after)
    for other in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        torch.testing.assert_close(answers(other), after)
        other.save_pretrained(tmp_path / "trained")
        check_same(type(model).from_pretrained(tmp_path / "trained"), again)


def test_encoded_tensors_are_taken_by_load_state_dict(make, tmp_path):
    """As a Trainer does that resumes: strictly, into a sparse and into a dense model; parts that are torn apart are an
    error.
    """
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    other = sparse(make("bert"))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    other.load_state_dict(held)
    check_same(other, model)
    dense = make("bert")
    nn.init.zeros_(dense.bert.pooler.dense.weight)
    dense.load_state_dict(held)
    for name, value in weights(model).items():
        assert torch.equal(dense.state_dict()[name], value), name
    torn = {name: tensor for name, tensor in held.items() if not name.endswith("pooler.dense.values::spec")}
    with pytest.raises(ValueError, match=r"pooler.*expected its parts together"):
        make("bert").load_state_dict(torn, strict=False)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shrunken_models_reload_with_widths_of_their_own(name, scope, make, answers, tmp_path):
    model = make(name)
    if name == "gpt2":
        sp.nn.expose_linears_(model)
    sp.prune_(model, 0.5, granularity=Neurons(), scope=scope)
    sp.prune_(model, 0.25, granularity=Heads(), scope=scope)
    before = sum(p.numel() for p in model.parameters())
    sp.shrink_(model)
    assert sum(p.numel() for p in model.parameters()) < before
    expected = answers(model)
    model.save_pretrained(tmp_path / "shrunken")
    again = type(model).from_pretrained(tmp_path / "shrunken")
    torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-5)
    check_same(again, model)
    sp.prune_(again, 0.8)  # and sparse on top of it
    sp.sparsify_(again, layout="csr")
    again.save_pretrained(tmp_path / "sparse")
    check_same(type(model).from_pretrained(tmp_path / "sparse"), again)
    check_same(sp.load(tmp_path / "sparse"), again)


def test_load_builds_the_model_beside_a_checkpoint_of_ours(make, answers, tmp_path):
    for name in ("bert", "llama"):
        model = sparse(make(name))
        folder = tmp_path / name
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        sp.save(model, folder / "pruned.safetensors")
        for given in (folder, folder / "pruned.safetensors", str(folder)):
            check_same(sp.load(given), model)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        sp.load(tmp_path)
    with pytest.raises(CheckpointError, match="use load"):
        sp.load(make("bert"))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["os"]}')
    with pytest.raises(CheckpointError, match="expected the name of one transformers model"):
        sp.load(folder)


def test_loading_in_one_thread_leaves_modules_of_others_alone(make, tmp_path, monkeypatch):
    """Two loads that would leave in the order in which they entered, and a module that is made meanwhile."""
    model = sparse(make("bert"))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    sp.save(model, tmp_path / "pruned.safetensors")
    both, first_left = threading.Barrier(2), threading.Event()
    entered: list[int] = []
    made: list[nn.Linear] = []
    read = transformers.AutoConfig.from_pretrained

    def slow(*args, **kwargs):  # called while the model is built
        entered.append(threading.get_ident())
        if len(entered) == 1:
            other = threading.Thread(target=lambda: made.append(nn.Linear(4, 4)))
            other.start()
            other.join()
        with contextlib.suppress(threading.BrokenBarrierError):  # the second waits for the first
            both.wait(1)
        if threading.get_ident() != entered[0]:
            first_left.wait(20)
        return read(*args, **kwargs)

    def load(_):
        found = sp.load(tmp_path)
        first_left.set()
        return found

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(load, range(2)))
    for again in found:
        check_same(again, model)
    for linear in (*made, nn.Linear(4, 4)):
        assert linear.weight.device.type == "cpu" and 0 < float(linear.weight.detach().abs().max()) < 1


def test_the_weights_of_a_sparse_folder_are_not_taken_for_a_dense_file(make, tmp_path):
    """As such their report left every sparse layer out, and what was called dense held their encodings."""
    sparse(make("bert")).save_pretrained(tmp_path)
    file, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    ways = (
        lambda: sp.checkpoint.describe(file), lambda: sp.checkpoint.convert(file, other),
        lambda: sp.checkpoint.convert(file, other, dense=True), lambda: sp.load(make("bert"), file),
    )  # fmt: skip
    for way in ways:
        with pytest.raises(CheckpointError, match=r"got weights of a folder that save_pretrained wrote"):
            way()
    assert not other.exists()


def test_load_beside_a_checkpoint_reads_how_to_generate_and_the_dtype(make, tmp_path):
    model = make("llama").bfloat16()
    model.generation_config.eos_token_id, model.generation_config.max_new_tokens = [2, 7], 5
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    sp.save(sparse(model), tmp_path / "pruned.safetensors")
    again = sp.load(tmp_path)
    assert again.generation_config.eos_token_id == [2, 7] and again.generation_config.max_new_tokens == 5
    assert again.dtype is torch.bfloat16 and again.model.rotary_emb.inv_freq.dtype is torch.float32
    check_same(again, model)
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        sp.load(tmp_path)


def test_a_folder_that_is_damaged_is_refused(make, tmp_path, caplog):
    logging.getLogger("transformers").addHandler(caplog.handler)
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path)
    kind, file = type(model), tmp_path / "model.safetensors"
    whole, config = load_file(file), json.loads((tmp_path / "config.json").read_text())
    name = "bert.pooler.dense.values"

    def refused(match: str, **changes) -> None:
        held = {**whole, **{key.replace("__", "::"): value for key, value in changes.items()}}
        save_file({k: v for k, v in held.items() if v is not None}, file, {"format": "pt"})
        with pytest.raises((ValueError, RuntimeError)) as error:
            kind.from_pretrained(tmp_path)
        assert re.search(match, str(error.value) + caplog.text)
        with pytest.raises(CheckpointError) as ours:
            sp.load(tmp_path)
        assert re.search(match, str(ours.value)) and name in str(ours.value)
        caplog.clear()

    refused(
        r"index expected \d+ (positions|entries), got", **{f"{name}__index": torch.zeros_like(whole[f"{name}::index"])}
    )
    refused("expected its parts together", **{f"{name}__spec": None})
    refused("values of 1 more sparse layers",
            **{key.replace("::", "__"): None for key in whole if key.startswith(name)})  # fmt: skip
    refused("spec expected JSON", **{f"{name}__spec": torch.zeros(3, dtype=torch.uint8)})
    save_file(whole, file, {"format": "pt"})
    kind.from_pretrained(tmp_path)
    for key, value, match in (
        ("version", 2, "'sparseprune' of version 1, got"),
        ("code", "import os", "options of sparsify_"),
    ):
        changed = copy.deepcopy(config)
        changed["quantization_config"][key] = value
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=match):
            kind.from_pretrained(tmp_path)
    layers = config["quantization_config"]["layers"]
    for key, value in (
        ("sparse", {"bert.pooler.dense": {"layout": "csr"}}), ("counts", {"bert": {"__class__": 3}}),
        ("shapes", {"bert.pooler.dense.weight": [1 << 40, 48]}), ("linears", {"bert.pooler.dense": [5, 5]}),
    ):  # fmt: skip
        changed = copy.deepcopy(config)
        changed["quantization_config"]["layers"] = {**layers, key: value}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="quantization_config"):
            kind.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", [*LAYOUTS, None])
def test_a_state_dict_that_is_handed_over_is_what_is_written(layout, make, answers, tmp_path):
    from sparseprune.integrations.folder import save_pretrained

    model = make("bert")
    sp.prune_(model, None if layout == "nm" else 0.8, granularity=LAYOUTS[layout or "csr"][0])
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    if layout:
        for each in (model, other):
            sp.sparsify_(each, layout=layout, engine="layers", **LAYOUTS[layout][1])
    state = other.state_dict()
    if layout:
        model.save_pretrained(tmp_path / "by name", state_dict=state)
        model.save_pretrained(tmp_path / "by place", True, state)
    save_pretrained(model, tmp_path / "ours", state_dict=state)
    model.save_pretrained(tmp_path / "own", state_dict=model.state_dict())
    for folder in tmp_path.iterdir():
        again = sp.load(folder)
        expected = answers(model if folder.name == "own" else other)
        torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(answers(model), answers(other), atol=1e-3)


def test_a_state_dict_that_is_not_that_of_the_sparse_model_is_refused(make, tmp_path):
    dense = make("bert")
    model = sparse(copy.deepcopy(dense))
    with pytest.raises(ValueError, match=r"state_dict, bert.*expected col_indices, crow_indices, values, got none"):
        model.save_pretrained(tmp_path, state_dict=dense.state_dict())
    state = model.state_dict()
    state["bert.pooler.dense.values"] = state["bert.pooler.dense.values"][1:]
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense: csr.*model\.load_state_dict\(state_dict\) first"):
        model.save_pretrained(tmp_path, state_dict=state)
    assert not (tmp_path / "model.safetensors").exists()
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("options", [{}, {"quantization_config": {"quant_method": "sparseprune", "tokens": 8}}])
def test_a_configuration_that_does_not_tell_of_sparse_weights_is_refused(options, make, answers, tmp_path):
    """As that of a loaded model: transformers passes over the encoded weights, and their layers stay random."""
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    kind, config = type(model), sp.load(tmp_path).config
    with pytest.raises(ValueError, match=r"expected the configuration of the folder.*leave config out"):
        kind.from_pretrained(tmp_path, config=config, **options)
    config.quantization_config = transformers.AutoConfig.from_pretrained(tmp_path).quantization_config
    torch.testing.assert_close(answers(kind.from_pretrained(tmp_path, config=config)), answers(model))


def test_dense_weights_beside_the_configuration_of_a_sparse_model_are_named(make, tmp_path):
    sparse(make("bert")).save_pretrained(tmp_path / "sparse")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "sparse")
    fresh = transformers.AutoModelForSequenceClassification.from_config(config)
    fresh.save_pretrained(tmp_path / "fresh")
    with pytest.raises(CheckpointError, match=r"got dense weights of 13 .*remove quantization_config from it"):
        sp.load(tmp_path / "fresh")
    told = json.loads((tmp_path / "fresh" / "config.json").read_text())
    del told["quantization_config"]
    (tmp_path / "fresh" / "config.json").write_text(json.dumps(told))
    check_same(sp.load(tmp_path / "fresh"), fresh)


def test_values_in_a_folder_that_is_not_ours_are_left_to_transformers(make, tmp_path):
    model = make("bert")
    model.save_pretrained(tmp_path)
    state, name = load_file(tmp_path / "model.safetensors"), "bert.pooler.dense"
    state[f"{name}.values"] = state.pop(f"{name}.weight")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    _, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert set(found["missing_keys"]) == {f"{name}.weight"} and set(found["unexpected_keys"]) == {f"{name}.values"}


def test_a_model_that_its_configuration_cannot_build_is_refused(make, tmp_path):
    model = sparse(make("bert"))
    model.bert.extra = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"expected the tensors that BertForSequenceClassification has.*extra"):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_model_that_takes_more_than_its_configuration_is_refused(make, tmp_path):
    class Sized(transformers.BertForSequenceClassification):
        def __init__(self, config, size):
            super().__init__(config)
            self.size = size

    with pytest.raises(ValueError, match=r"expected Sized to be built from its configuration alone.*size.*Use sparsep"):
        sparse(Sized(make("bert").config, 3)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_tied_head_that_runs_sparse_is_saved_once_untied(make, answers, tmp_path):
    model = make("llama")
    sp.prune_(model, 0.3)
    sp.sparsify_(model, layout="csr", engine="layers", filter_fn=lambda module, fqn: True)
    assert isinstance(model.lm_head, sp.SparseLinear)
    with pytest.raises(ValueError, match=r"weight of their own, got.*lm_head\.weight.*tie_word_embeddings = False"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    check_same(again, model)
    torch.testing.assert_close(answers(again), answers(model), rtol=1e-5, atol=1e-5)


def test_pipelines_read_the_folder(make, tokenizer, tmp_path):
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    ask = transformers.pipeline("text-classification", model=str(tmp_path / "m"), device="cpu")
    assert len(sparse_layers(ask.model)) == len(sparse_layers(model))
    found = ask("the cat sees a bird", top_k=None)
    inputs = tokenizer("the cat sees a bird", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits.softmax(-1)[0]
    got = torch.tensor([next(f["score"] for f in found if f["label"] == f"LABEL_{i}") for i in range(3)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_sentence_transformers_write_and_read_the_folder(make, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    base = make("bert").bert
    base.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    reader = Transformer(str(tmp_path / "bert"), max_seq_length=16)
    model = sentence_transformers.SentenceTransformer(modules=[reader, Pooling(48)], device="cpu")
    sparse(model)
    texts = ["the cat sees a bird", "a dog", "the old house"]
    expected = model.encode(texts)
    model.save(str(tmp_path / "sparse"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "sparse"), device="cpu")
    assert len(sparse_layers(again)) == len(sparse_layers(model)) == 13
    torch.testing.assert_close(torch.tensor(again.encode(texts)), torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ["import sparseprune, transformers", "import transformers, sparseprune", "torch"])
def test_from_pretrained_in_a_fresh_process(order, make, tmp_path):
    """After either order of imports; or without sparseprune, by the entry point that torch calls."""
    model = sparse(make("bert"))
    model.save_pretrained(tmp_path / "m")
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "1" if order == "torch" else "0"}
    if order == "torch":
        order = "import torch, transformers"
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        points = project["entry-points"]["torch.backends"]
        info = tmp_path / "path" / "sparseprune_points-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sparseprune-points\nVersion: 0\n")
        lines = ["[torch.backends]", *(f"{name} = {target}" for name, target in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        env["PYTHONPATH"] = str(tmp_path / "path")
    code = f"{order}\nm = transformers.AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'm')!r})\n"
    code += "print(sum(type(x).__name__ == 'SparseLinear' for x in m.modules()))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.stdout.strip() == str(len(sparse_layers(model))), run.stderr


def test_metadata_names_the_format_that_transformers_expects(make, tmp_path):
    sparse(make("bert")).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_what_dequantised_a_model_as_it_loaded_is_not_asked_to_save_it(make, tmp_path):
    """As transformers leaves it at a model that was read from a GGUF file."""
    from transformers import GgufConfig

    from sparseprune.integrations.quantizer import SparsePruneConfig, SparsePruneQuantizer

    model = sparse(make("llama"))
    other = type(
        "Other", (SparsePruneQuantizer.__base__,), {"is_serializable": lambda self: False, "is_trainable": False}
    )
    model.hf_quantizer = other(GgufConfig(dequantize=True), pre_quantized=False)
    model.save_pretrained(tmp_path)
    assert type(model.hf_quantizer) is other and not isinstance(
        model.hf_quantizer.quantization_config, SparsePruneConfig
    )
    check_same(type(model).from_pretrained(tmp_path), model)
    model.hf_quantizer.quantization_config.dequantize = False  # as it stands where a file was read in floating point
    model.save_pretrained(tmp_path)
    model.bytes = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(RuntimeError, match="got a model quantised by"):
        model.save_pretrained(tmp_path / "other")


def test_a_transformers_that_reads_weights_otherwise_is_left_alone():
    from sparseprune.integrations.quantizer import _reading_of

    class Other:
        @staticmethod
        def _load_pretrained_model(model, files):
            raise AssertionError

    assert _reading_of(Other) is None and _reading_of(nn.Module) is None
    assert _reading_of(transformers.PreTrainedModel) is not None
