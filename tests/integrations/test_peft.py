"""LoRA on a sparsified base: training, merging, saving; nothing of an adapter is lost without a word."""

from __future__ import annotations

import copy

import pytest
import torch

import sparseprune as sp

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LABELS = torch.tensor([0, 2, 1])


def config(**options) -> object:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["query", "value"], "task_type": "SEQ_CLS",
                              "init_lora_weights": False, **options})  # fmt: skip


def adapted(make, layout: str | None = "csr", **options):
    """(model with adapters on a pruned base, that base)."""
    base = make("bert")
    sp.prune_(base, 0.8)
    if layout:
        sp.sparsify_(base, layout=layout, fuse=False, engine="layers")
    torch.manual_seed(5)
    return peft.get_peft_model(base, config(**options)), base


def test_training_moves_the_adapters_as_on_a_dense_base_and_nothing_else(make, answers, ids):
    sparse, base = adapted(make)
    dense, _ = adapted(make, layout=None)
    kept = {n: m.values.clone() for n, m in base.named_modules() if isinstance(m, sp.SparseLinear)}
    assert len(kept) == 13 and not any(base.get_submodule(n).values.requires_grad for n in kept)
    torch.testing.assert_close(answers(sparse.eval()), answers(dense.eval()), rtol=1e-5, atol=1e-5)
    for model in (sparse, dense):
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            model(input_ids=ids, labels=LABELS).loss.backward()
            optimiser.step()
    others = dict(dense.named_parameters())
    moved = [(name, p) for name, p in sparse.named_parameters() if p.requires_grad]
    assert len(moved) == 10
    for name, parameter in moved:
        torch.testing.assert_close(parameter, others[name], rtol=1e-4, atol=1e-5)
    for name, values in kept.items():
        assert torch.equal(base.get_submodule(name).values, values)


def test_merging_is_exact_and_keeps_the_mask(make, answers, tmp_path):
    model, _base = adapted(make, lora_bias=True)
    expected = answers(model.eval())
    query = "bert.encoder.layer.0.attention.self.query"
    inside = model.get_submodule(f"base_model.model.{query}").get_base_layer()
    stored, bias = inside.col_indices.clone(), inside.bias.clone()
    model.merge_adapter()
    torch.testing.assert_close(answers(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert inside.low_rank_a is None and torch.equal(inside.bias, bias)
    merged = copy.deepcopy(model).merge_and_unload(safe_merge=True)
    layer = merged.get_submodule(query)
    assert type(layer) is sp.SparseLinear and torch.equal(layer.col_indices, stored)
    assert layer.low_rank_a.shape == (4, 48) and not torch.equal(layer.bias, bias)
    torch.testing.assert_close(answers(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(answers(type(merged).from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(6)
    twice = peft.get_peft_model(merged, config())  # a second adapter comes on top of the first one's term
    expected = answers(twice.eval())
    again = twice.merge_and_unload()
    assert again.get_submodule(query).low_rank_a.shape == (8, 48)
    torch.testing.assert_close(answers(again), expected, rtol=1e-4, atol=1e-5)


def test_adapters_are_saved_and_loaded_beside_a_sparse_folder(make, answers, tmp_path):
    model, _base = adapted(make)
    expected = answers(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    fresh = make("bert")
    sp.prune_(fresh, 0.8)
    sp.sparsify_(fresh, layout="csr", fuse=False, engine="layers")
    fresh.save_pretrained(tmp_path / "base")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(answers(again), expected, rtol=1e-5, atol=1e-5)
    own = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    own.add_adapter(config())
    assert type(own.bert.encoder.layer[0].attention.self.query).__name__ == "SparseLoraLinear"
    own.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "adapter_model.safetensors").is_file()


def test_wrappers_that_lost_their_adapter_are_named_where_a_model_is_saved(make, tmp_path):
    model = make("bert")
    sp.prune_(model, 0.8)
    sp.sparsify_(model, layout="csr", fuse=False, engine="layers")
    model.add_adapter(config())
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"got wrappers of peft, without an adapter.*query.*get_base_layer"):
        model.save_pretrained(tmp_path)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "SparseLoraLinear":
            model.set_submodule(name, module.get_base_layer())
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).classifier.weight.equal(model.classifier.weight)


def test_all_linear_means_the_sparse_layers_too(make):
    _model, base = adapted(make, target_modules="all-linear")
    wrapped = {n for n, m in base.named_modules() if type(m).__name__ == "SparseLoraLinear"}
    assert len(wrapped) == 13 and "classifier" not in wrapped


def test_adapters_are_neither_pruned_nor_converted(make):
    model, _base = adapted(make, layout=None)
    report = sp.prune_(model, 0.9)
    assert not [name for name in report.masks if "lora_" in name]
    sp.sparsify_(model, layout="csr")
    assert all(isinstance(m, torch.nn.Linear) for n, m in model.named_modules() if n.endswith("lora_A.default"))


def test_what_would_be_lost_is_refused(make):
    base = make("bert")
    sp.prune_(base, 0.8)
    query = base.bert.encoder.layer[0].attention.self
    query.query = sp.MaskedLinear.from_linear(query.query)
    model = peft.get_peft_model(base, config())
    with pytest.raises(ValueError, match="got a MaskedLinear, whose mask would cut"):
        model.merge_and_unload()
    variant, _ = adapted(make, use_dora=True)
    with pytest.raises(ValueError, match="expected plain LoRA, got a variant"):
        variant.merge_and_unload()


def test_what_was_fused_runs_apart_under_an_adapter(make, answers):
    fused = make("bert")
    sp.prune_(fused, 0.8)
    sp.sparsify_(fused, layout="csr", engine="layers")
    plain = copy.deepcopy(fused)
    sp.nn.unfuse_(plain)
    found = []
    for model in (fused, plain):
        torch.manual_seed(5)
        targets = ["intermediate.dense", "attention.output.dense"]
        found.append(answers(peft.get_peft_model(model, config(target_modules=targets)).eval()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    layer = next(m for m in fused.modules() if type(m).__name__ == "SparseLoraLinear")
    with pytest.raises(ValueError, match="expected a call with x alone"):
        layer(torch.zeros(1, layer.in_features), residual=torch.zeros(1, layer.out_features))


def test_a_program_gives_way_to_adapters(make, answers):
    """Layers that one native call ran are not what runs once adapters are in them."""
    base = make("bert")
    sp.prune_(base, 0.8)
    plain = copy.deepcopy(base)
    choice = sp.sparsify_(base, layout="csr", fuse=False, engine="program")
    assert choice.stacks[0].engine == "program"
    answers(base)
    found = []
    for model in (base, plain):
        torch.manual_seed(5)
        found.append(answers(peft.get_peft_model(model, config()).eval()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
