"""The whole path in small, and what bad input leaves behind: nothing."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparseprune import CubicSchedule, Neurons, load, prune_, sparsify_
from sparseprune.cli import main
from sparseprune.data import load_set
from sparseprune.gan import GANConfig
from sparseprune.nn import prunable_linears
from sparseprune.runner import RunConfig, run, run_demo, run_prune, summary
from sparseprune.runner.dense import fine_tune
from sparseprune.runner.display import Display
from sparseprune.runner.sources import open_source
from sparseprune.runner.text_encoder import TextEncoder
from sparseprune.training import DistillConfig

TINY = {
    "hidden": 32, "ffn": 64, "layers": 1, "heads": 2, "dense_epochs": 1, "train_limit": 320, "other_limit": 60,
    "latency_batch": 8, "batch_size": 32,
}  # fmt: skip


def tiny(**settings):
    pruning = settings.pop("pruning", GANConfig(epochs=2.0))
    return RunConfig(pruning=pruning, **{**TINY, **settings})


def test_one_run_leaves_a_record_a_checkpoint_and_plots(tmp_path, capsys):
    result = run(tiny(), out=tmp_path, name="a")
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["density"] == pytest.approx(0.1, abs=1e-3)
    layers = {fqn: result.model.get_submodule(fqn) for fqn in record["layers"]}
    kept = {fqn: record["layers"][fqn] * m.in_features * m.out_features for fqn, m in layers.items()}
    assert sum(kept.values()) == pytest.approx(record["density"] * record["prunable_parameters"])
    assert all(kept[fqn] == pytest.approx(int((m.weight != 0).sum())) for fqn, m in layers.items())
    for which in ("dense", "pruned"):
        for split in ("train", "valid", "test"):
            assert set(record[which][split]) == {"loss", "accuracy"}
        assert record[which]["latency_ms"] > 0
    assert record["pruned"]["parameters"] < record["dense"]["parameters"]
    assert record["pruned"]["bytes"] < record["dense"]["bytes"]
    assert record["sparse_against_masked"] < 1e-4
    assert {"seed", "config", "versions", "cpu", "data_hash", "mask_hash", "speedup"} <= set(record)
    assert RunConfig.from_dict(record["config"]) == tiny()
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert {
        "curves.png",
        "layers.png",
        "tradeoff.png",
        "history.json",
        "vocabulary.json",
        "pruned.safetensors",
    } <= files
    assert not any("ckpt" in name or "partial" in name for name in files)
    shown = capsys.readouterr().out
    assert "Epoch 1" in shown and "U 0.1" in shown and "sparsity" in shown and "D accuracy" in shown
    assert summary(record) == result.table and "test accuracy" in result.table
    settings = json.loads((tmp_path / "a" / "encoder.json").read_text())
    settings.pop("labels")
    again = load(TextEncoder(**settings), tmp_path / "a" / "pruned.safetensors").eval()
    ids = torch.tensor([[5, 6, 7, 0]])
    torch.testing.assert_close(again(ids), result.model(ids))


def test_the_picture_calls_no_slower_model_faster():
    pytest.importorskip("matplotlib")
    from sparseprune.runner.plots import _tradeoff

    side = {"latency_ms": 2.0, "test": {"accuracy": 0.5}, "bytes": 8}
    record = {"dense": side, "pruned": side, "latency_batch": [1, 2], "speedup": 0.8, "accuracy_kept": 1.0}
    assert _tradeoff(record).axes[0].get_title() == "0.80 times as fast, 100.0% of the accuracy kept"


def test_a_run_that_time_ends_says_so_and_how_its_layers_run(tmp_path, monkeypatch, capsys):
    ticks = itertools.count()
    monkeypatch.setattr("sparseprune.training.clock.time", SimpleNamespace(monotonic=lambda: next(ticks) / 20))
    pruning = DistillConfig(epochs=200.0, max_seconds=2.0)
    result = run(tiny(pruning=pruning, layout="csr", robustness=0), out=tmp_path, name="a")
    said = capsys.readouterr().out
    steps = len(json.loads((tmp_path / "a" / "history.json").read_text())["steps"])
    assert result.record["stopped"] == f"stopped by --max-seconds after {steps} of 2000 steps"
    assert said.count(result.record["stopped"]) == 2 and "accuracy suffers" in said
    layers = len(result.record["layers"])
    assert f"{layers} of {layers} layers sparse; " in said and "latency, 8 x " in said
    assert main(["report", str(tmp_path / "a")]) == 0
    report = capsys.readouterr().out
    assert "layout='csr' was asked for" in report and "stack of 1 layers" in report and result.table in report
    damaged = {**result.record, "layouts": {"layers": 3}}
    with pytest.raises(ValueError, match="expected what SparsifyReport"):
        summary(damaged)


def test_of_equally_accurate_dense_epochs_the_one_of_the_lowest_loss_is_kept(tmp_path, monkeypatch, capsys):
    figures = [(0.9, 0.1), (1.0, 0.65), (1.0, 0.04), (1.0, 0.5)]
    states = []

    def evaluate(model, loader):
        states.append(copy.deepcopy(model.state_dict()))
        return dict(zip(("accuracy", "loss"), figures[len(states) - 1]))

    monkeypatch.setattr("sparseprune.runner.dense.evaluate", evaluate)
    config = tiny(dense_epochs=4)
    source = open_source(config)
    model = source.make()
    fine_tune(model, source, config, tmp_path, Display())
    assert "dense: epoch 3 of 4 kept (validation accuracy 1.0000, loss 0.0400)" in capsys.readouterr().out
    assert all(torch.equal(value, states[2][name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, states[3][name]) for name, value in model.state_dict().items())


def test_a_dense_training_that_is_not_finite_ends_the_run(tmp_path, capsys):
    files = [str(path) for path in files_of(tmp_path, ".tsv")]
    command = ["prune", "--model", "encoder", "--lr", "1e30", "--out", str(tmp_path / "runs"), "--quiet"]
    given = [text for pair in zip(("--train", "--valid", "--test"), files) for text in pair]
    assert main([*command, *given, "--dense-epochs", "3", "--epochs", "1"]) == 1
    said = capsys.readouterr().err
    assert "dense training: expected a finite loss, got nan at" in said and "now 1e+30" in said
    assert not (tmp_path / "runs" / "prune" / "run.json").exists()


def test_low_rank_terms_are_counted_saved_and_measured(tmp_path, monkeypatch):
    from sparseprune.training import gates

    fitted = gates.Gates.compensate

    def forced(self, fits):
        """One layer, whatever the validation data say of a net that has learned next to nothing."""
        name = "layers.0.ffn.expand"
        if name not in fits:  # the layers come one stage after the other
            return
        mask = self.masks[name].clone()
        mask.view(-1)[mask.view(-1).nonzero().flatten()[:96]] = False
        weight = self.weights[name].detach() * mask
        found = replace(
            fits[name], mask=mask, weight=weight, bias_shift=None, chosen="rank 1", rank=1,
            low_rank_a=torch.randn(1, 32) / 10, low_rank_b=torch.randn(64, 1) / 10,
        )  # fmt: skip
        fitted(self, {name: found})

    monkeypatch.setattr(gates.Gates, "compensate", forced)
    pruning = DistillConfig(epochs=2.0, compensation="best")
    record = run(tiny(pruning=pruning), out=tmp_path, name="a", quiet=True).record
    assert record["ranks"] == {"layers.0.ffn.expand": 1}
    total = record["prunable_parameters"]
    assert record["density"] == (total - round(0.9 * total)) / total
    assert record["sparse_against_masked"] < 1e-4
    assert record["pruned"]["parameters"] < record["dense"]["parameters"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_masks(tmp_path):
    one = tiny(layout="dense", train_limit=160)
    hashes = [run(one, out=tmp_path, name=name, quiet=True).record["mask_hash"] for name in ("a", "b")]
    pruning = GANConfig(epochs=2.0, seed=1)
    other = run(tiny(layout="dense", train_limit=160, seed=1, pruning=pruning), out=tmp_path, name="c", quiet=True)
    assert hashes[0] == hashes[1] != other.record["mask_hash"]


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = run(tiny(dense_epochs=2, layout="dense"), out=tmp_path, name="whole", quiet=True).record
    from sparseprune.training import DistillPruner

    fit = DistillPruner.fit

    def killed(self, *args, **kwargs):
        def stop(record):
            if record["step"] == 12:
                raise KeyboardInterrupt

        return fit(self, *args, **{**kwargs, "callback": stop, "checkpoint_every": 5})

    with monkeypatch.context() as patch:
        patch.setattr(DistillPruner, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny(dense_epochs=2, layout="dense"), out=tmp_path, name="cut", quiet=True)
    assert (tmp_path / "cut" / "training.ckpt").exists() and not (tmp_path / "cut" / "run.json").exists()
    resumed = run(tiny(dense_epochs=2, layout="dense"), out=tmp_path, name="cut", quiet=True).record
    assert resumed["mask_hash"] == whole["mask_hash"]
    assert resumed["pruned"]["test"] == whole["pruned"]["test"]


def test_neurons_really_shrink(tmp_path):
    pruning = DistillConfig(schedule=CubicSchedule(0.5), granularity={"*.ffn.*": Neurons()}, epochs=2.0)
    result = run(tiny(pruning=pruning, layout="dense"), out=tmp_path, name="n", quiet=True)
    assert result.model.layers[0].ffn.expand.weight.shape == (32, 32)
    assert result.record["pruned"]["parameters"] < result.record["dense"]["parameters"]
    # What the table calls kept is what the model holds: the biases of neurons that were cut are gone too.
    held = sum(
        int(p.count_nonzero()) if "ffn" in name and p.dim() == 2 else p.numel()
        for name, p in result.model.named_parameters()
    )
    assert result.record["pruned"]["parameters"] == held


def files_of(tmp_path, suffix=".tsv"):
    data = load_set("crosswoz_zh").head(90, 30)
    for name, split in data.splits.items():
        rows = [f"{text[0]}\t{data.label_names[label]}" for text, label in zip(split.texts, split.labels)]
        (tmp_path / f"{name}{suffix}").write_text("\n".join(rows), encoding="utf-8")
    return [tmp_path / f"{name}{suffix}" for name in ("train", "valid", "test")]


def test_own_files_and_a_transformers_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "model"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({c for p in files_of(tmp_path) for c in p.read_text("utf-8")}),
    ]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(w for w in words if not w.isspace()), encoding="utf-8")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = transformers.BertConfig(vocab_size=len(words), max_position_embeddings=64, num_labels=6, **size)
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    result = run_prune(
        str(folder), *files_of(tmp_path), out=tmp_path / "runs", name="bert", dense_epochs=1, epochs=2.0, batch_size=16,
        max_length=48, lr=1e-3, quiet=True,
    )  # fmt: skip
    assert result.record["density"] == pytest.approx(0.1, abs=1e-3)
    assert "bert.encoder.layer.0.attention.self.query" in result.record["layers"]
    assert "classifier" not in result.record["layers"]
    assert {"config.json", "tokenizer.json", "settings.json"} <= {p.name for p in result.folder.iterdir()}
    rebuilt = transformers.BertForSequenceClassification(transformers.AutoConfig.from_pretrained(result.folder))
    load(rebuilt, result.folder / "pruned.safetensors")


def test_a_classifier_that_runs_sparse_is_pruned_as_its_linears(tmp_path):
    """A SparseLinear cannot be: a sparse folder lost weights in those layers alone that had stayed dense."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=6, num_labels=6, **size))
    prune_(model, 0.5)
    sparsify_(model, layout="csr", filter_fn=lambda module, fqn: "attention" in fqn)
    model.save_pretrained(folder)
    train, valid, test = map(str, files_of(tmp_path))
    config = RunConfig(model=str(folder), teacher=str(folder), data=None, train=train, valid=valid, test=test)
    assert len(prunable_linears(open_source(config).make())) == 7  # the pooler among them


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda p: run_demo(out=p, density=0.0), ValueError, r"density expected in \(0, 1\]"),
        (lambda p: run_demo(out=p, density=float("nan")), ValueError, r"density expected in \(0, 1\]"),
        (lambda p: run_demo(out=p, data="imdb"), ValueError, "data expected one of"),
        (lambda p: run_demo(out=p, layout="coo"), ValueError, "layout expected one of"),
        (lambda p: run_demo(out=p, name="../x"), ValueError, "plain folder name"),
        (lambda p: run_demo(out=p, granularity="rows"), ValueError, "granularity"),
        (
            lambda p: run_prune("encoder", p / "no.tsv", p / "no.tsv", p / "no.tsv", out=p),
            FileNotFoundError,
            "no such file",
        ),
        (
            lambda p: run_prune("no-model-of-ours", *files_of(p, ".t.tsv"), out=p),
            ValueError,
            "loaded.*without a network give a folder with config.json",
        ),
        (lambda p: run_prune(str(p / "no-model"), *files_of(p, ".t.tsv"), out=p), FileNotFoundError, "no folder"),
        (
            lambda p: run_prune("m", *files_of(p, ".t.tsv"), out=p, teacher="t", dense_epochs=2),
            ValueError,
            "dense_epochs: expected none with the teacher t, .* got 2",
        ),
        (lambda p: run_demo(out=p, layout="dense", value_dtype="int8"), ValueError, "expected no rounding, got .*int8"),
        (lambda p: run_demo(out=p, layout="nm"), ValueError, r"layout 'nm' expected a granularity N:M .*Element\(\)"),
        (lambda p: run_demo(out=p, granularity="2:4", compensation="low_rank"), ValueError, "use \"survivors\""),
        (lambda p: RunConfig.from_json('{"densty": 1}'), ValueError, "unknown key 'densty'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, call, error, said):
    with pytest.raises(error, match=said) as caught:
        call(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_the_demo_keeps_its_accuracy(tmp_path):
    record = run_demo(out=tmp_path, quiet=True).record
    assert record["density"] == pytest.approx(0.1, abs=1e-4)
    assert record["accuracy_kept"] >= 0.97
