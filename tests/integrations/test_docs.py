"""The programs of docs/huggingface.md, as they stand on the page, in its order; each result is looked at."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import sparseprune as sp

transformers = pytest.importorskip("transformers")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "huggingface.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def program(start: str) -> str:
    """The one program that has this in it."""
    (found,) = [text for text in PROGRAMS if start in text]
    return found


def run(start: str, **names) -> dict:
    exec(compile(program(start), PAGE.name, "exec"), names)
    return names


def sparse_layers(model) -> int:
    return sum(isinstance(module, sp.SparseLinear) for module in model.modules())


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    return tmp_path


@pytest.fixture
def always_sparse(monkeypatch):
    """Whatever this machine finds faster: the pages are about what is done with sparse layers."""
    plain = sp.sparsify_
    monkeypatch.setattr(sp, "sparsify_", lambda model, **o: plain(model, **{**o, "layout": "csr", "engine": "layers"}))


def rows(count: int = 24) -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 13, (count, 7), generator=draw)
    return [{"input_ids": i, "labels": int((i == 7).any())} for i in ids]


def test_all_programs_are_run_here():
    assert len(PROGRAMS) == 12


def test_a_folder_that_transformers_reads(make, answers, tokenizer, always_sparse):
    make("bert").save_pretrained("my-classifier")
    names = run('save_pretrained("sparse") ')
    assert sparse_layers(names["model"]) == 13
    pruned = make("bert")
    sp.prune_(pruned, 0.9)
    torch.testing.assert_close(answers(names["model"]), answers(pruned), rtol=1e-4, atol=1e-5)
    tokenizer.save_pretrained("sparse")
    assert sparse_layers(names["pipeline"]("text-classification", model="sparse").model) == 13


def test_rounded_values_and_a_dense_folder(make, answers):
    model = make("bert")
    sp.prune_(model, 0.9)
    model.save_pretrained("pruned")
    names = run("SparsePruneConfig(tokens=1024)", model=model)
    torch.testing.assert_close(answers(names["model"]), answers(model), rtol=1e-4, atol=1e-5)
    small = transformers.AutoModelForSequenceClassification.from_pretrained("smaller")
    torch.testing.assert_close(answers(small), answers(model), rtol=2e-2, atol=2e-2)


def test_the_trainers(make, always_sparse):
    pytest.importorskip("accelerate")
    names = run("callbacks=[pruning]", model=make("bert"), train_data=rows())
    assert sparse_layers(names["trainer"].model) == 13 and names["pruning"].density == 0.1
    assert (Path("run") / "checkpoint-100" / "sparseprune.ckpt").is_file()
    model = make("bert")
    names = run("distillation=Distillation", model=model, train_data=rows())
    kept = [(m.weight != 0).float().mean() for n, m in model.named_modules() if n.endswith("dense")]
    assert max(kept) < 0.5 and names["trainer"].pruning.density == 0.1


def test_lora(make, answers, ids):
    pytest.importorskip("peft")
    seen = {}

    def train(model):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        seen["answers"] = answers(model.eval())
        return model

    names = run("merge_and_unload", model=make("llama"), train=train)
    assert sparse_layers(names["model"]) == 14
    torch.testing.assert_close(answers(names["model"]), seen["answers"], rtol=1e-4, atol=1e-4)


def test_sentence_transformers(make, tokenizer, always_sparse):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.models import Pooling, Transformer

    make("bert").bert.save_pretrained("bert")
    tokenizer.save_pretrained("bert")
    model = sentence_transformers.SentenceTransformer(modules=[Transformer("bert"), Pooling(48)], device="cpu")
    model.save("my-embedder")
    names = run("sparse-embedder")
    assert sparse_layers(names["model"]) == 13 and names["model"].encode(["the cat"]).shape == (1, 48)


def test_other_shapes(make):
    from sparseprune.nn.matrices import Experts, PatchLinear

    for model in (make("mixtral"), make("gpt2")):
        run("unpack_(model)", model=model)
        linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        zeros = sum(int((m.weight == 0).sum()) for m in linears)
        assert zeros == round(0.8 * sum(m.weight.numel() for m in linears))
        assert not any(type(m).__name__ in ("Conv1D", "MixtralExperts") for m in model.modules())
    assert isinstance(make("mixtral").model.layers[0].mlp.experts, torch.nn.Module) and Experts and PatchLinear


def test_data_as_it_is(make, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = ["the cat sees a bird", "a dog", "the old house", "bird"] * 12
    made = datasets.Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0] * 12})
    names = run("dataset[", model=make("bert"), dataset={"train": made, "validation": made}, tokenizer=tokenizer)
    assert len(names["pruner"].history.steps) == 4 and names["pruner"].density == pytest.approx(0.1, abs=1e-2)
    assert names["evaluate"](names["model"], made, tokenizer=tokenizer)["accuracy"] > 0.2
    model, dense = make("bert"), make("bert")
    run("data=texts", model=model, texts=texts, tokenizer=tokenizer)
    ours, theirs = (dict(m.named_modules())["bert.encoder.layer.0.output.dense"].weight for m in (model, dense))
    assert int((ours == 0).sum()) == round(0.5 * ours.numel()) and torch.equal(ours, theirs * (ours != 0))


def test_experts_while_they_train(make, ids):
    batches = [{"input_ids": ids, "labels": ids}]
    for name, kind in (("mixtral", "MixtralExperts"), ("gpt2", "Conv1D")):
        model = make(name)
        held = [m for m in model.modules() if type(m).__name__ == kind]
        names = run("pruner.fit(batches)", mixture=model, batches=batches)
        assert names["model"] is model and names["pruner"].density == pytest.approx(0.1, abs=1e-2)
        weights = [p for m in held for p in m.parameters() if p.dim() > 1]
        zeros, total = sum(int((p == 0).sum()) for p in weights), sum(p.numel() for p in weights)
        assert len(held) >= 2 and zeros > 0.8 * total


def test_structure(make, answers):
    model = make("llama")
    before = sum(p.numel() for p in model.parameters())
    run("shrink_(model)", model=model)
    again = transformers.AutoModelForCausalLM.from_pretrained("shrunken")
    assert sum(p.numel() for p in again.parameters()) < before
    torch.testing.assert_close(answers(again), answers(model), rtol=1e-4, atol=1e-5)


def test_lm_eval(make, tokenizer, in_folder):
    """A task of its own, from files: nothing is fetched."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    tokenizer.bos_token, tokenizer.eos_token = "[CLS]", "[SEP]"  # what a text is read after
    model = make("llama")
    sp.prune_(model, 0.5)
    dense = make("llama")
    dense.load_state_dict(model.state_dict())
    sp.sparsify_(model, layout="csr", engine="layers")
    model.save_pretrained("sparse-lm")
    (in_folder / "rows.jsonl").write_text('{"text": "the cat sees a bird"}\n{"text": "the old house"}\n')
    task = {
        "task": "words", "dataset_path": "json", "output_type": "loglikelihood_rolling", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(in_folder / "rows.jsonl")}}, "doc_to_text": "",
        "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    names = run("lm_eval.simple_evaluate", tokenizer=tokenizer, tasks=[task])
    assert sparse_layers(names["model"].model) == 14
    found = names["results"]["results"]["words"]["word_perplexity,none"]
    other = names["lm_eval"].simple_evaluate(
        model=names["HFLM"](pretrained=dense, tokenizer=tokenizer, batch_size=4), tasks=[task]
    )
    assert found == pytest.approx(other["results"]["words"]["word_perplexity,none"], rel=1e-4)
