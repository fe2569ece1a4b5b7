"""Models from a folder: whole, or refused."""

from __future__ import annotations

import pytest
import torch

import sparseprune as sp
from sparseprune.integrations.transformers import language_model

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=32, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_that_lacks_weights_is_refused(folder):
    model, _ = language_model(str(folder))
    sp.prune_(model, sparsity=0.8)
    sp.save(model, folder / "pruned.safetensors")
    language_model(str(folder))
    (folder / "pruned.safetensors").rename(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected every weight.*and \d+ more; a checkpoint by sparseprune\.save"):
        language_model(str(folder))


@pytest.mark.slow
def test_a_run_on_a_bare_encoder_exports_a_classifier(make, tokenizer, tmp_path, monkeypatch):
    """The source's configuration names the encoder; the run's folder and what export makes of it, the classifier."""
    from sparseprune.cli import main
    from sparseprune.runner import run_prune

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    make("bert").bert.save_pretrained("body")
    tokenizer.save_pretrained("body")
    rows = [f"the {animal} sees a house\t{animal}\n" for animal in ("cat", "dog") for _ in range(16)]
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.tsv").write_text("".join(rows))
    run = run_prune(
        "body", "train.tsv", "valid.tsv", "test.tsv", epochs=1, dense_epochs=1, robustness=0, quiet=True,
        data_check="off", layout="csr",
    )  # fmt: skip
    assert main(["export", str(run.folder), "served"]) == 0
    served = transformers.pipeline("text-classification", model="served")
    assert isinstance(served.model, transformers.BertForSequenceClassification)
    batch = served.tokenizer("the cat sees a house", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(served.model(**batch).logits, run.model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert served("the cat sees a house")[0]["label"] in ("cat", "dog")
