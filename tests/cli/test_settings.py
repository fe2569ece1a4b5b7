"""Settings: from the command line, from a run's settings.json, and from both; checked before any work."""

from __future__ import annotations

import json

import pytest

import sparseprune as sp
from sparseprune.cli import main, parser
from sparseprune.pruning.schedules import CubicSchedule
from sparseprune.runner import RunConfig, override
from sparseprune.training import DistillConfig


@pytest.fixture
def given(monkeypatch):
    """What a run would have been started with."""
    found = {}
    monkeypatch.setattr("sparseprune.runner.run", lambda config, **more: found.update(config=config, **more))
    return found


@pytest.fixture
def settings(tmp_path):
    """settings.json of a run on three files by another model than the built-in one."""
    config = RunConfig(
        pruning=DistillConfig(schedule=CubicSchedule(0.3), epochs=7.0),
        data=None, train="a.tsv", valid="b.tsv", test="c.tsv", model="m"
    )
    path = tmp_path / "run" / "settings.json"
    path.parent.mkdir()
    path.write_text(config.to_json())
    return path, config


def refused(capsys, argv, *words):
    assert main([str(part) for part in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and all(word in error for word in words), error


@pytest.mark.parametrize("command", ["prune", "demo"])
def test_a_settings_file_says_it_all(settings, given, capsys, command):
    path, config = settings
    assert main([command, "--config", str(path), "--name", "again"]) == 0
    assert given["config"] == config and given["name"] == "again" and capsys.readouterr().out == ""
    assert main([command, "--config", str(path.parent)]) == 0
    assert given["config"] == config


def test_options_besides_the_file_count_and_are_said(settings, given, capsys):
    path, _ = settings
    options = "--train other.tsv --density 0.2 --lr 0.01 --seed 3 --layers *.ffn.* --layers *.query --batch-size 8"
    assert main(["prune", "--config", str(path), *options.split()]) == 0
    new = given["config"]
    assert (new.train, new.valid, new.model, new.batch_size) == ("other.tsv", "b.tsv", "m", 8)
    assert (new.pruning.final_density, new.pruning.lr, new.dense_lr) == (pytest.approx(0.2), 0.01, 0.01)
    assert (new.pruning.seed, new.seed, new.prune_layers) == (3, 3, ("*.ffn.*", "*.query"))
    assert new.pruning.epochs == 7.0  # the file's, though the command has a default
    said = capsys.readouterr().out
    parts = ('train: "a.tsv" -> "other.tsv"', "batch_size: 64 -> 8", "seed: 0 -> 3", "pruning.schedule", "pruning.lr")
    for part in parts:
        assert part in said
    assert "valid" not in said


def test_a_set_takes_the_place_of_files_and_back(settings):
    _, config = settings
    assert override(config, {"data": "clinc10"})[0].data == "clinc10"
    demo = RunConfig()
    assert override(demo, {"train": "a", "valid": "b", "test": "c"})[0].data is None
    with pytest.raises(ValueError, match="all of train, valid and test"):
        override(demo, {"train": "a"})
    assert override(config, {"granularity": "16x1"})[0].pruning.schedule == CubicSchedule(0.3)
    assert override(config, {"granularity": "2:4"})[0].pruning.final_density == 0.5
    assert override(config, {})[1] == []


def test_what_is_missing_without_a_file(capsys):
    refused(capsys, ["prune", "--model", "encoder", "--train", "a.tsv"], "--valid, --test", "--config")


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not valid JSON"), ("[" * 100_000, "settings.json"), ("[]", "expected an object"), ("", "not valid JSON"),
     ('{"train_limit": 0}', "train_limit expected >= 1"), ('{"seed": -1}', "seed expected from 0"),
     ('{"max_length": -5}', "max_length expected >= 1"), ('{"dropout": 1.5}', "dropout expected in [0, 1)")],
)  # fmt: skip
def test_a_file_that_holds_no_settings(tmp_path, capsys, text, said):
    path = tmp_path / "settings.json"
    path.write_text(text)
    refused(capsys, ["demo", "--config", path, "--out", tmp_path / "out"], "settings.json", said)
    refused(capsys, ["demo", "--config", tmp_path / "none.json"], "none.json: no such file")


def test_n_of_m_brings_its_density(given, capsys):
    assert main(["demo", "--granularity", "2:4"]) == 0
    assert given["config"].pruning.final_density == 0.5
    assert main(["demo", "--granularity", "2:4", "--density", "0.5"]) == 0
    assert main(["demo", "--granularity", "16x1"]) == 0
    assert given["config"].pruning.final_density == 0.1
    refused(capsys, ["demo", "--granularity", "2:4", "--density", "0.1"], "density 0.1", "keeps 0.5")


@pytest.mark.parametrize(
    ("model", "options", "lr"),
    [("encoder", [], 1e-3), ("encoder", ["--lr", "0.02"], 0.02), ("m", [], 3e-5), ("m", ["--lr", "4e-4"], 4e-4)],
)
def test_the_learning_rate_is_the_one_given(given, model, options, lr):
    assert main(["prune", "--model", model, "--train", "a", "--valid", "b", "--test", "c", *options]) == 0
    assert given["config"].pruning.lr == given["config"].dense_lr == lr


@pytest.mark.parametrize(
    "line",
    ["prune --max-length -5", "prune --max-length 0", "prune --batch-size 0", "prune --dense-epochs -1", "prune --lr 0",
     "prune --lr nan", "demo --epochs 0", "demo --epochs inf", "demo --max-seconds -1", "demo --seed -1",
     "demo --seed 4294967296", "demo --density 1e-999", "eval --windows -1", "eval --windows 0", "eval --context 1",
     "eval --new-tokens 0", "sensitivity --sparsity 1", "sensitivity --windows 0", "sensitivity --densities 0.5 0",
     "sensitivity --context x", "bench --rounds 0", "bench --threads 0", "bench --min-time nan"],
)  # fmt: skip
def test_numbers_out_of_their_range(line, capsys):
    option, value = line.split()[1], line.split()[-1]
    refused(capsys, line.split(), f"argument {option}: expected a ", f"got '{value}'")


def test_outputs_are_tried_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sparseprune.cli.shared.language_model", lambda arguments: pytest.fail("the work has begun"))
    (tmp_path / "a.txt").write_text("text")
    argv = ["sensitivity", "--model", "m", "--text", tmp_path / "a.txt", "--out"]
    refused(capsys, [*argv, tmp_path / "none" / "a.json"], "there is no folder", "none", "make it first")
    refused(capsys, [*argv, tmp_path], "got the folder")
    refused(capsys, [*argv, tmp_path / "a.png"], "expected a .json file")
    refused(capsys, [*argv, "/proc/self/a.json"], "cannot write in /proc/self")
    import torch
    from torch import nn

    sp.save(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a.safetensors")
    monkeypatch.setattr("sparseprune.checkpoint.convert", lambda *a, **k: pytest.fail("the work has begun"))
    refused(capsys, ["convert", tmp_path / "a.safetensors", tmp_path / "none" / "b"], "there is no folder")
    refused(capsys, ["convert", tmp_path / "none", tmp_path / "b"], "no such file")
    monkeypatch.setattr("sparseprune.bench.command._run", lambda *a: pytest.fail("the work has begun"))
    for option in ("--json", "--plots"):
        argv = ["bench", "--allow-reference", option]
        refused(capsys, [*argv, tmp_path / "a.txt" / "b"], option, "is a file")
    refused(capsys, ["demo", "--out", tmp_path / "a.txt"], "is a file; expected a folder")
    assert torch.get_num_threads() > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [("[]", "it is a list, not an object"), ("3", "it is a int"), ("{}", "dense is missing"), ("", "got no JSON"),
     ('{"dense": 1}', "dense is a int"), ('{"dense": {"train": {"loss": "x"}}}', "dense.train.loss is a str"),
     ("[" * 100_000, "got no JSON")],
)  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_report_on_another_file(tmp_path, capsys, text, said, more):
    path = tmp_path / "run.json"
    path.write_text(text)
    refused(capsys, ["report", path, *more], "run.json: expected the run.json of a run", said)


def test_a_report_on_a_folder_without_a_run(tmp_path, capsys):
    refused(capsys, ["report", tmp_path], "no run.json")
    (tmp_path / "settings.json").write_text("{}")
    refused(capsys, ["report", tmp_path], "not finished")


def test_every_number_has_a_range():
    """An option that takes a number refuses one that is not finite."""
    from argparse import _SubParsersAction
    from pathlib import Path

    from sparseprune.bench.command import parser as bench

    commands = next(a.choices for a in parser()._actions if isinstance(a, _SubParsersAction))
    for name, command in {**commands, "bench": bench()}.items():
        for action in command._actions:
            assert action.type not in (int, float), (name, action.dest)
            if action.type not in (None, Path):
                assert callable(action.type)


def test_settings_go_there_and_back():
    config = RunConfig(labels=None, seed=5)
    assert RunConfig.from_dict(json.loads(config.to_json())) == config


def test_every_method_can_be_asked_for():
    from argparse import _SubParsersAction

    from sparseprune.runner.config import METHODS
    from sparseprune.training.config import METHODS as TRAINING

    commands = next(a for a in parser()._actions if isinstance(a, _SubParsersAction)).choices
    asked = [a for command in commands.values() for a in command._actions if "--method" in a.option_strings]
    assert asked and all(sorted(a.choices) == sorted(METHODS) for a in asked)
    assert all(DistillConfig(method=name).scored == (name != "magnitude") for name in TRAINING)


def test_dense_epochs_are_refused_where_a_teacher_saves_them(settings, given, capsys):
    path, _ = settings
    refused(capsys, ["prune", "--config", path, "--teacher", "t", "--dense-epochs", "2"], "dense_epochs", "teacher t")
    assert main(["prune", "--config", str(path), "--teacher", "t", "--dense-epochs", "0"]) == 0


def test_a_teacher_alone_says_which_model(monkeypatch):
    asked = []
    monkeypatch.setattr("sparseprune.runner.run_prune", lambda *args, **settings: asked.append((args[0], settings)))
    files = ["--train", "a.tsv", "--valid", "b.tsv", "--test", "c.tsv"]
    assert main(["prune", "--teacher", "tuned", *files]) == 0
    assert main(["prune", "--teacher", "tuned", "--model", "tuned", *files]) == 0
    assert [(model, settings["teacher"]) for model, settings in asked] == [("tuned", "tuned")] * 2


@pytest.mark.parametrize("model", ["bare", "encoder"])
def test_a_model_that_nobody_would_read_beside_a_teacher_is_refused(model, settings, tmp_path, capsys):
    files = [part for name in ("train", "valid", "test") for part in (f"--{name}", tmp_path / "rows.tsv")]
    (tmp_path / "rows.tsv").write_text("up\tgood\ndown\tbad\n")
    command = ["prune", "--teacher", "tuned", "--model", model, *files, "--out", tmp_path / "runs"]
    refused(capsys, command, "teacher")
    refused(capsys, ["prune", "--config", settings[0], "--teacher", "tuned", "--model", model], "teacher")
    assert not (tmp_path / "runs").exists()


def test_a_teacher_beside_settings_is_the_model_too(settings):
    from sparseprune.runner.config import override

    config, changed = override(settings[1], {"teacher": "tuned"})
    assert config.model == config.teacher == "tuned" and len(changed) == 2
    assert override(settings[1], {"model": "bare", "teacher": "tuned"})[0].model == "bare"  # and refused by the run
