"""``sparseprune prune --text`` and ``sparseprune export``: language models from the command line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import sparseprune as sp
from sparseprune.cli import main
from sparseprune.runner.language import read_text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
TEXT = " ".join(["the cat sees a bird", "a dog sees the old house", "the old dog", "a bird"] * 60)
SMALL = ["--context", "16", "--windows", "8", "--judged-windows", "4", "--new-tokens", "2"]


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A folder with a tiny causal model and its tokenizer; the tests stand beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    words = {word: i for i, word in enumerate(["[UNK]", *dict.fromkeys(TEXT.split())])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained("lm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained("lm")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def test_a_run_leaves_its_folder(model, capsys):
    pytest.importorskip("matplotlib")
    command = ["prune", "--model", "lm", "--text", "text.txt", "--criterion", "wanda", "--density", "0.6", *SMALL]
    assert main([*command, "--layout", "csr"]) == 0
    said = capsys.readouterr().out
    assert "perplexity" in said and "density 0.6" in said
    folder = model / "runs" / "language"
    assert {"run.json", "settings.json", "pruned.safetensors", "model", "tradeoff.png"} <= {
        p.name for p in folder.iterdir()
    }
    record = json.loads((folder / "run.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    layers = [m for m in again.modules() if isinstance(m, sp.SparseLinear)]
    assert len(layers) == record["sparse_layers"] == 14
    total = sum(m.in_features * m.out_features for m in layers)
    assert sum(m.nnz for m in layers) == total - round(0.4 * total) and record["pruned_parameters"] == total
    from sparseprune.language import perplexity, token_windows

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    held_out = token_windows(ids[int(len(ids) * 0.8) // 16 * 16 :], 16, 4)
    assert perplexity(again, held_out).value == pytest.approx(record["perplexity_as_it_runs"], rel=1e-4)
    dense = transformers.AutoModelForCausalLM.from_pretrained("lm")
    assert perplexity(dense, held_out).value == pytest.approx(record["dense"]["perplexity"], rel=1e-4)
    assert record["pruned"]["bytes"] == (folder / "pruned.safetensors").stat().st_size
    assert main(["report", "runs/language"]) == 0 and "density 0.6" in capsys.readouterr().out
    # Again: what was there is replaced, and an unfinished run says that it starts anew.
    (folder / "run.json").unlink()
    assert main([*command, "--criterion", "magnitude"]) == 0
    assert "an unfinished run is here" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_what_a_run_wrote_is_judged_and_pruned_again(model, capsys, mixed):
    """Its layers are sparse already: none was found to run sparse, or those alone that had stayed dense."""
    command = ["prune", "--model", "lm", "--text", "text.txt", "--criterion", "magnitude", *SMALL, "--layout", "csr"]
    assert main([*command, "--quiet"]) == 0
    folder = model / "runs" / "language"
    total = json.loads((folder / "run.json").read_text())["pruned_parameters"]
    if mixed:
        made = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
        sp.densify_(made)
        sp.sparsify_(made, layout="csr", filter_fn=lambda module, fqn: "mlp" in fqn)
        made.save_pretrained(folder / "model")
        sp.save(made, folder / "pruned.safetensors")
    text = ["--text", "text.txt", "--context", "16", "--windows", "4"]
    given = []
    sparsify = sp.nn.sparsify_
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparseprune.nn.sparsify_", lambda *a, **named: given.append(sparsify(*a, **named)) or given[-1])
        judge = ["eval", *text, "--new-tokens", "2", "--model"]
        assert main([*judge, "lm", "--checkpoint", str(folder / "pruned.safetensors")]) == 0
        assert main([*judge, str(folder / "model"), "--value-dtype", "int8"]) == 0
    assert [len(report.layers) for report in given] == [14, 14]
    said = capsys.readouterr().out
    assert said.count("sparse (") == 2
    for report in given:
        assert f"{len(report.converted)} sparse layers" in said
    assert main(["sensitivity", "--model", str(folder / "model"), *text, "--densities", "0.5"]) == 0
    assert "2 losses of 2 groups" in capsys.readouterr().out
    command[2], command[-1] = str(folder / "model"), "auto"
    assert main([*command, "--density", "0.3", "--name", "again", "--quiet"]) == 0
    record = json.loads((model / "runs" / "again" / "run.json").read_text())
    assert record["pruned_parameters"] == total and abs(record["density"] - 0.3) < 1e-3


def test_a_pattern_and_other_text_to_judge_on(model, capsys):
    (model / "other.txt").write_text(TEXT[len(TEXT) // 2 :])
    command = [
        "prune",
        "--model",
        "lm",
        "--text=text.txt",
        "--judged-on",
        "other.txt",
        "--granularity",
        "2:4",
        "--quiet",
    ]
    assert main([*command, "--criterion", "magnitude", "--name", "nm", *SMALL]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((model / "runs" / "nm" / "run.json").read_text())["density"] == 0.5


def test_a_density_that_the_pattern_does_not_keep_is_refused(model, capsys):
    command = ["prune", "--model", "lm", "--text", "text.txt", "--criterion", "magnitude", *SMALL]
    assert main([*command, "--granularity", "2:4", "--density", "0.9"]) == 2
    assert "density 0.9: granularity '2:4' keeps 0.5 of the weights; leave the density out" in capsys.readouterr().err
    assert not (model / "runs").exists()
    assert main([*command, "--granularity", "1:4"]) == 0
    assert "lm: prunes by its weights alone, is judged on 64 tokens" in capsys.readouterr().out
    record = json.loads((model / "runs" / "language" / "run.json").read_text())
    assert record["settings"]["density"] == record["density"] == 0.25


def test_a_model_without_so_many_positions_is_refused_before_it_is_pruned(model, capsys, monkeypatch):
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=20, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained("lm")
    command = ["prune", "--model", "lm", "--text", "text.txt", "--criterion", "magnitude", *SMALL]
    monkeypatch.setattr("sparseprune.runner.language.prune_", lambda *args, **settings: pytest.fail("it pruned"))
    assert main([*command, "--new-tokens", "5"]) == 2
    said = capsys.readouterr().err
    assert "expected at most 20 tokens, the model's positions, got 16 tokens and 5 new ones; take fewer" in said
    assert main([*command, "--context", "24"]) == 2
    assert "expected at most 20 tokens, the model's positions, got 24 tokens" in capsys.readouterr().err
    evaluated = ["eval", "--model", "lm", "--text", "text.txt", "--context", "24"]
    assert main(evaluated) == 2
    assert "perplexity: expected at most 20 tokens" in capsys.readouterr().err


def test_eval_takes_a_model_whose_weights_no_linear_holds(model, capsys):
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    gpt2 = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        gpt2.transformer.h[0].mlp.c_fc.weight[0, 0] = 0.0  # one by chance prunes nothing
    gpt2.save_pretrained("lm")
    command = ["eval", "--model", "lm", "--text", "text.txt", "--context", "16", "--windows", "2", "--new-tokens", "2"]
    assert main(command) == 0 and "sparse" not in capsys.readouterr().out
    sp.prune_(gpt2, 0.5)
    sp.save(gpt2, "pruned.safetensors")
    gpt2.save_pretrained("lm")
    assert main([*command, "--value-dtype", "bfloat16"]) == 0 and "sparse (bfloat16)" in capsys.readouterr().out
    assert main([*command, "--checkpoint", "pruned.safetensors"]) == 0 and "pruned: " in capsys.readouterr().out


def test_what_was_pruned_is_kept_where_the_speed_cannot_be_measured(model, capsys, monkeypatch):
    def failed(*args, **settings):
        raise ValueError("no cache")

    monkeypatch.setattr("sparseprune.runner.language.tokens_per_second", failed)
    assert main(["prune", "--model", "lm", "--text", "text.txt", "--criterion", "magnitude", *SMALL]) == 2
    assert "no cache" in capsys.readouterr().err
    folder = model / "runs" / "language"
    assert (folder / "pruned.safetensors").is_file() and (folder / "model" / "config.json").is_file()
    assert not (folder / "run.json").exists()


def test_a_folder_of_datasets(model):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["the cat", "a dog"]}).save_to_disk("rows")
    assert read_text("rows") == "the cat\na dog"
    datasets.Dataset.from_dict({"words": ["the cat"]}).save_to_disk("others")
    with pytest.raises(ValueError, match=r"column 'text', got words"):
        read_text("others")


def test_mistakes_are_one_line(model, capsys):
    (model / "empty.txt").write_text(" ")
    for arguments, match in (
        (["prune", "--model", "lm", "--text", "none.txt"], "no such file"),
        (["prune", "--model", "lm", "--text", "empty.txt"], "expected text, got none"),
        (["prune", "--model", "lm", "--text", "text.txt", "--context", "9999"], "do not fill one window"),
        (["prune", "--text", "text.txt"], "--model"),
        (["prune", "--model", "lm", "--text", "text.txt", "--device", "nowhere"], "device expected auto, cpu, cuda"),
        (["export", "lm", "lm"], "expected another folder than the source"),
        (["export", "none", "there"], "no such file or folder"),
        (["export", "lm", "no/such/folder/m.onnx"], "there is no folder"),
        (["export", "lm", "there", "--dense", "--value-dtype", "int8"], "expected none with --dense, got int8"),
        (["export", "lm", "m.onnx", "--value-dtype", "bfloat16"], "expected none with .onnx, got bfloat16"),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert match in said and said.count("\n") == 1, said


def test_export_for_transformers(model, capsys):
    dense = transformers.AutoModelForCausalLM.from_pretrained("lm")
    sp.prune_(dense, 0.8)
    sp.sparsify_(dense, layout="csr")
    dense.save_pretrained("sparse")
    transformers.AutoTokenizer.from_pretrained("lm").save_pretrained("sparse")
    assert main(["export", "sparse", "plain", "--dense"]) == 0 and "0 layers run sparse" in capsys.readouterr().out
    plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
    assert "quantization_config" not in (model / "plain" / "config.json").read_text()
    assert transformers.AutoTokenizer.from_pretrained("plain").vocab_size == plain.config.vocab_size
    assert main(["export", "sparse", "small", "--value-dtype", "int8"]) == 0 and "14 layers" in capsys.readouterr().out
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        small = transformers.AutoModelForCausalLM.from_pretrained("small")
        torch.testing.assert_close(small(ids).logits, dense(ids).logits, rtol=0.1, atol=0.1)
    assert (model / "small" / "model.safetensors").stat().st_size < (
        model / "sparse" / "model.safetensors"
    ).stat().st_size


def test_export_takes_the_model_of_the_run_that_is_there(model, capsys):
    """Not one that a run before it in the same folder left behind."""
    command = ["prune", "--model", "lm", "--text", "text.txt", "--criterion", "magnitude", *SMALL]
    assert main([*command, "--name", "same"]) == 0
    folder = model / "runs" / "same"
    record = (folder / "run.json").read_text()
    (folder / "run.json").unlink()
    assert main(["export", "runs/same", "there"]) == 2
    said = capsys.readouterr().err
    assert "got one that is not finished" in said and "or name runs/same/model" in said
    assert not (model / "there").exists() and main(["export", "runs/same/model", "there"]) == 0
    (folder / "run.json").write_text(record)
    assert main(["export", "runs/same", "again"]) == 0

    settings = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    classifier = transformers.BertForSequenceClassification(settings)
    settings.architectures = ["BertForSequenceClassification"]
    settings.save_pretrained(folder)
    sp.save(classifier, folder / "pruned.safetensors")
    (folder / "run.json").write_text(json.dumps({"name": "same"}))
    assert main(["export", "runs/same", "classifier"]) == 0
    assert "BertForSequenceClassification" in (model / "classifier" / "config.json").read_text()


def test_export_takes_all_files_of_the_tokenizer(model, capsys):
    tokenizer = transformers.AutoTokenizer.from_pretrained("lm")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "tool": "none"}
    tokenizer.save_pretrained("lm")
    (model / "lm" / "source.spm").write_bytes(b"\0words")
    assert main(["export", "lm", "there"]) == 0
    assert (model / "there" / "source.spm").read_bytes() == b"\0words"
    again = transformers.AutoTokenizer.from_pretrained("there")
    assert again.chat_template == tokenizer.chat_template
    capsys.readouterr()


def test_an_export_into_the_folder_of_another_has_its_own_tokenizer(model, capsys):
    other = json.loads((model / "lm" / "tokenizer.json").read_text())
    words = other["model"]["vocab"]
    other["model"]["vocab"] = {word: len(words) - 1 - i if i else 0 for word, i in words.items()}
    shutil.copytree("lm", "other")
    (model / "other" / "tokenizer.json").write_text(json.dumps(other))
    assert main(["export", "lm", "there"]) == main(["export", "other", "there"]) == 0
    assert (model / "there" / "tokenizer.json").read_bytes() == (model / "other" / "tokenizer.json").read_bytes()
    for name in ("settings.json", "history.json"):  # of whoever made the folder, but for a run's own
        (model / "other" / name).write_text("{}")
    assert main(["export", "other", "first"]) == 0 and (model / "first" / "settings.json").exists()
    (model / "other" / "run.json").write_text("{}")
    assert main(["export", "other", "second"]) == 0
    assert not {"run.json", "settings.json", "history.json"} & {path.name for path in (model / "second").iterdir()}
    assert (model / "second" / "tokenizer.json").exists()
    capsys.readouterr()


def test_dense_is_refused_where_only_sparseprune_reads_what_is_left(model, capsys):
    settings = transformers.BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16
    )
    cut = transformers.BertForSequenceClassification(settings)
    sp.prune_(cut, 0.5, granularity=sp.Heads(), scope="layer")
    sp.shrink_(cut)
    cut.save_pretrained("cut")
    assert main(["export", "cut", "plain", "--dense"]) == 2
    assert "which only sparseprune reads; leave --dense out" in capsys.readouterr().err
    assert not (model / "plain").exists()
    assert main(["export", "cut", "ours"]) == 0


def test_export_to_onnx(model, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    made = transformers.AutoModelForCausalLM.from_pretrained("lm")
    sp.prune_(made, 0.5)
    sp.sparsify_(made, layout="csr")
    made.bfloat16().save_pretrained("sparse")
    made.float()
    assert main(["export", "sparse", "model.onnx"]) == 0
    assert "ONNX Runtime answers as torch" in (said := capsys.readouterr().out) and "multiplies zeros like any" in said
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    session = onnxruntime.InferenceSession(str(model / "model.onnx"))
    (got,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), made(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("criterion", ["movement", "soft_movement", "uncertainty", "fisher"])
def test_criteria_that_want_gradients_are_no_choice(criterion, capsys):
    assert main(["prune", "--model", "lm", "--text", "text.txt", "--criterion", criterion]) == 2
    assert f"invalid choice: '{criterion}'" in capsys.readouterr().err


BROKEN = {
    "nan": "NaN", "number": "3", "list": "[]", "null": "null", "string": '"bert"', "cut": '{"model_type": "llama",',
    "kind": '{"model_type": ["llama"], "architectures": ["LlamaForCausalLM"]}',
    "width": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}',
    "heads": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_attention_heads": 0}',
    "names": '{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "id2label": 3}',
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_configuration_that_is_none_is_one_line(name, model, capsys):
    (model / "rows.tsv").write_text("a bird\tup\na dog\tdown\nthe cat\tup\nthe dog\tdown\n")
    made = transformers.AutoModelForCausalLM.from_pretrained("lm")
    sp.prune_(made, sparsity=0.5)
    (model / "ours").mkdir()
    sp.save(made, model / "ours" / "pruned.safetensors")
    for folder in ("lm", "ours"):
        (model / folder / "config.json").write_text(BROKEN[name])
        rows = [part for split in ("train", "valid", "test") for part in (f"--{split}", "rows.tsv")]
        for command in (
            ["prune", "--model", folder, "--text", "text.txt"], ["prune", "--model", folder, *rows],
            ["prune", "--model", folder, "--teacher", folder, *rows], ["eval", "--model", folder, "--text", "text.txt"],
            ["sensitivity", "--model", folder, "--text", "text.txt"], ["export", folder, "out"],
        ):  # fmt: skip
            assert main(command) == 2, command
            said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparseprune")]
            assert len(said) == 1 and "error: " in said[0] and folder in said[0], command


def test_a_file_where_a_model_is_expected_is_named_at_once(model, capsys):
    (model / "rows.tsv").write_text("a bird\tup\na dog\tdown\n")
    rows = [part for split in ("train", "valid", "test") for part in (f"--{split}", "rows.tsv")]
    (model / "config.json").write_text("NaN")
    for command in (["eval", "--text", "text.txt"], ["prune", *rows], ["prune", "--text", "text.txt"]):
        assert main([*command, "--model", "config.json"]) == 2
        assert "expected a folder with config.json or a name on the hub, got the file" in capsys.readouterr().err
