"""Other libraries' own saving: transformers writes our form, by whatever way it is reached; others refuse."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune.nn import saving
from sparseprune.nn.saving import _WRITERS, guard_saving

transformers = pytest.importorskip("transformers")
REFUSED = r"expected dense layers, got \d+ SparseLinear.*densify_\(model\) first, or sparseprune\.save"
IDS = torch.arange(12).view(2, 6)


def dense() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertForMaskedLM(config).eval()


def sparse() -> nn.Module:
    model = dense()
    sp.prune_(model, sparsity=0.8)
    sp.sparsify_(model, layout="csr")
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    return (model(IDS).logits if hasattr(model, "cls") else model(IDS).last_hidden_state).clone()


def test_a_sparse_model_is_written_in_a_form_that_is_read_back(tmp_path):
    model = sparse()
    ways = {
        "itself": model, "copied": copy.deepcopy(model), "pickled": pickle.loads(pickle.dumps(model)),
        "compiled": torch.compile(model), "part": model.bert,
    }  # fmt: skip
    for name, saved in ways.items():
        saved.save_pretrained(tmp_path / name)
        again = type(getattr(saved, "_orig_mod", saved)).from_pretrained(tmp_path / name)
        assert any(isinstance(m, sp.SparseLinear) for m in again.modules())
        torch.testing.assert_close(outputs(again), outputs(model.bert if name == "part" else model))
    state, buffer = model.state_dict(), io.BytesIO()
    torch.save(model, buffer)
    copy.deepcopy(model).load_state_dict(state)
    sp.save(model, tmp_path / "a.safetensors")
    sp.load(dense(), tmp_path / "a.safetensors").save_pretrained(tmp_path / "b")  # a layer that was put there by load
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path / "b")), outputs(model))
    sp.densify_(model)
    model.save_pretrained(tmp_path / "c")
    assert "quantization_config" not in (tmp_path / "c" / "config.json").read_text()
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "c").eval()), outputs(model))
    dense().save_pretrained(tmp_path / "d")


def test_models_around_a_sparse_one_are_written_so_too(tmp_path):
    model = dense()
    sp.prune_(model, sparsity=0.8)
    sp.sparsify_(model.bert.encoder, layout="csr")
    model.save_pretrained(tmp_path / "a")
    assert isinstance(type(model).from_pretrained(tmp_path / "a").bert.encoder.layer[0].output.dense, sp.SparseLinear)
    other = dense()
    other.cls.predictions.transform.dense = sp.SparseLinear.from_linear(other.cls.predictions.transform.dense)
    other.save_pretrained(tmp_path / "b")
    again = type(other).from_pretrained(tmp_path / "b")
    assert isinstance(again.cls.predictions.transform.dense, sp.SparseLinear)
    torch.testing.assert_close(outputs(again), outputs(other))


def test_a_library_that_was_not_taught_is_refused_until_the_model_is_dense(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "OWN_FORMS", {})
    model = sparse()
    for refused in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.compile(model), model.bert):
        with pytest.raises(RuntimeError, match=f"save_pretrained: {REFUSED}"):
            refused.save_pretrained(tmp_path / "a")
        with pytest.raises(RuntimeError, match=f"push_to_hub: {REFUSED}"):
            refused.push_to_hub("nobody/nothing")
    assert not (tmp_path / "a").exists()
    sp.densify_(model)
    model.save_pretrained(tmp_path / "c")


def test_a_trainer_saves_a_sparse_model(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    model = sparse()
    transformers.Trainer(model=model, args=arguments).save_model()
    torch.testing.assert_close(outputs(type(model).from_pretrained(tmp_path)), outputs(model))


def test_a_model_unpickled_in_a_fresh_process_is_written_so_too(tmp_path):
    torch.save(sparse(), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"model.save_pretrained({str(tmp_path / 'saved')!r})\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(outputs(again), outputs(sparse()))


def test_adapters_alone_may_be_saved(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["word_embeddings"], r=2)
    model = peft.get_peft_model(sparse(), config)
    with torch.no_grad():
        model.base_model.model.bert.embeddings.word_embeddings.lora_embedding_B["default"].fill_(0.5)
    model.save_pretrained(tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(sparse(), tmp_path / "peft").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model.eval()(IDS).logits)
    with pytest.raises(ValueError, match=r"expected the tensors that BertForMaskedLM has.*lora_embedding"):
        model.get_base_model().save_pretrained(tmp_path / "base")
    own = sparse()
    own.add_adapter(config)
    own.save_pretrained(tmp_path / "own")


def test_modules_of_sentence_transformers_itself_are_refused(tmp_path):
    """What it writes through transformers is read back; its own modules it would not know again."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = sentence_transformers.sentence_transformer.modules
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    dense().bert.save_pretrained(tmp_path / "start")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "start")
    layers = [modules.Transformer(str(tmp_path / "start")), modules.Pooling(16), modules.Dense(16, 8)]
    model = sentence_transformers.SentenceTransformer(modules=layers, device="cpu")
    sp.prune_(model, sparsity=0.8)
    sp.sparsify_(model[2], layout="csr")
    for save in (model.save, model.save_pretrained):
        with pytest.raises(RuntimeError, match=REFUSED):
            save(str(tmp_path / "saved"))
    sp.densify_(model[2])
    sp.sparsify_(model[0], layout="csr")
    for name, save in (("a", model.save), ("b", model.save_pretrained)):
        save(str(tmp_path / name))
        again = sentence_transformers.SentenceTransformer(str(tmp_path / name), device="cpu")
        found, expected = (torch.tensor(m.encode(["a b", "c"])) for m in (again, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_models_of_the_hub_are_refused_but_where_their_class_writes_them_itself(tmp_path):
    """Their reading passes over names that it does not know, and leaves what it lacks at random."""
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.inner = nn.Linear(width, width)

    class Own(Net):
        def _save_pretrained(self, save_directory) -> None:
            sp.save(self, save_directory / "pruned.safetensors")

    for kind in (Net, Own):
        model = kind(width=16)
        sp.prune_(model, sparsity=0.8)
        expected = model.inner.weight.detach().clone()
        model.save_pretrained(tmp_path / kind.__name__)
        before = {file.name: file.read_bytes() for file in (tmp_path / kind.__name__).iterdir()}
        sp.sparsify_(model, layout="csr")
        if kind is Own:
            model.save_pretrained(tmp_path / "Own")
            again = sp.load(Own(16), tmp_path / "Own" / "pruned.safetensors")
            assert torch.equal(again.inner.weight, expected)
            continue
        for save, what in ((model.save_pretrained, tmp_path / "Net"), (model.push_to_hub, "nobody/nothing")):
            with pytest.raises(RuntimeError, match=REFUSED):
                save(what)
        assert {file.name: file.read_bytes() for file in (tmp_path / "Net").iterdir()} == before
        sp.densify_(model)
        model.save_pretrained(tmp_path / "Net")
        assert torch.equal(Net.from_pretrained(tmp_path / "Net").inner.weight, expected)


def test_a_model_of_transformers_takes_our_form_whatever_else_its_class_has(tmp_path):
    """One of the hub's mixin too, or with a method of its writer's name, went by unguarded."""
    hub, kind = pytest.importorskip("huggingface_hub"), transformers.BertForMaskedLM

    class Both(kind, hub.PyTorchModelHubMixin):  # type: ignore[misc, valid-type]
        pass

    class Named(kind):  # type: ignore[misc, valid-type]
        def _save_pretrained(self, save_directory) -> None:
            raise AssertionError("transformers calls no such method")

    for other in (Both, Named):
        model = other(dense().config).eval()
        sp.prune_(model, sparsity=0.8)
        sp.sparsify_(model, layout="csr")
        model.save_pretrained(tmp_path / other.__name__)
        again = kind.from_pretrained(tmp_path / other.__name__)
        assert any(isinstance(m, sp.SparseLinear) for m in again.modules())
        torch.testing.assert_close(outputs(again), outputs(model))


@pytest.mark.parametrize("name", _WRITERS)
def test_the_guarded_methods_are_there_and_guarded_once(name):
    module = pytest.importorskip(name)
    class_name, methods = _WRITERS[name]
    guard_saving(sp.SparseLinear)
    before = [getattr(getattr(module, class_name), method) for method in methods]
    guard_saving(sp.SparseLinear)
    assert before == [getattr(getattr(module, class_name), method) for method in methods]
    assert all(method.__wrapped__.__name__ == method.__name__ for method in before)
