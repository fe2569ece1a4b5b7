"""Models that come wrapped by other packages: LoRA adapters of peft, sentence-transformers. Both are optional."""

from __future__ import annotations

import pytest
import torch

import sparseprune as sp
from sparseprune.nn.filters import prunable_linears

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 99, (4, 12), generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 2, 1, 2])
SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("layout", ["csr", "auto"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_model_with_lora_adapters(walk, sparsity, layout, tmp_path):
    """The base is pruned and runs sparse; the adapters stay dense and train."""
    peft = pytest.importorskip("peft")

    def make():
        base = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, num_labels=3, **SIZES))
        settings = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
        return peft.get_peft_model(base, settings)

    assert not [name for name in prunable_linears(make()) if "lora_" in name]
    walk(
        make, lambda model: model(input_ids=IDS).logits, lambda model: model(input_ids=IDS, labels=LABELS).loss
    ).go(sparsity, layout, tmp_path / "pruned.safetensors")


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_merged_adapter_ends_in_the_pruned_weights(sparsity, close):
    """Merged first, pruned then: the count is that of the merged model, and the outputs stay through sparsify_."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=99, num_labels=3, **SIZES))
    settings = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    model = peft.get_peft_model(base, settings).merge_and_unload().eval()
    report = sp.prune_(model, sparsity)
    assert report.kept == report.total - round(sparsity * report.total) and not report.skipped.keys() - {"classifier"}
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        sp.sparsify_(model, layout="csr", tokens=48)
        close(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("layout", ["csr", "auto"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_sentence_transformer_gives_the_same_embeddings(sparsity, layout, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "bird", "sees"]
    words += ["small", "old", "house"]
    place = tmp_path / "bert"
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizer(str(place / "vocab.txt")).save_pretrained(place)
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(place)

    def make():
        reader = Transformer(str(place), max_seq_length=16)
        return sentence_transformers.SentenceTransformer(modules=[reader, Pooling(48)], device="cpu")

    def embeddings(model):
        found = model.encode(["the cat sees a bird", "a small dog", "the old house"], convert_to_tensor=True)
        assert found.shape == (3, 48) and bool(found.isfinite().all())
        return found.clone()

    model = make()
    names = list(prunable_linears(model))
    report = sp.prune_(model, sparsity)
    assert report.kept == report.total - round(sparsity * report.total)
    assert all(bool(report.masks[name].any()) for name in names)
    expected = embeddings(model)
    assert not torch.allclose(expected, embeddings(make()), atol=1e-3)
    chosen = sp.sparsify_(model, layout=layout, tokens=48)
    assert layout == "auto" or {choice.name for choice in chosen.converted} == set(names)
    torch.testing.assert_close(embeddings(model), expected, rtol=1e-4, atol=1e-4)
    sp.save(model, tmp_path / "pruned.safetensors")
    fresh = sp.load(make(), tmp_path / "pruned.safetensors")
    torch.testing.assert_close(embeddings(fresh), expected, rtol=1e-4, atol=1e-4)
    sp.densify_(fresh)
    torch.testing.assert_close(embeddings(fresh), expected, rtol=1e-4, atol=1e-4)
    for name in names:
        assert torch.equal(fresh.get_submodule(name).weight != 0, report.masks[name]), name
