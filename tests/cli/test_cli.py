"""The command line as a user meets it: good input ends in files and a table, bad input in one line and a non-zero
exit.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparseprune as sp
from sparseprune import _native
from sparseprune.cli import main, parser
from sparseprune.doctor import Finding, render

TINY = ["--epochs", "0.1", "--quiet"]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")


@pytest.fixture
def files(tmp_path):
    """Three small TSV files with two labels."""
    words = {"up": ["good", "fine", "great"], "down": ["bad", "poor", "awful"]}
    paths = {}
    for split, count in (("train", 64), ("valid", 32), ("test", 32)):
        rows = [f"{words[label][i % 3]} thing {i}\t{label}" for i in range(count // 2) for label in words]
        paths[split] = tmp_path / f"{split}.tsv"
        paths[split].write_text("\n".join(rows) + "\n", encoding="utf-8")
    return paths


def prune_arguments(files, out, *more):
    given = [item for split, path in files.items() for item in (f"--{split}", str(path))]
    return ["prune", "--model", "encoder", *given, "--out", str(out), "--dense-epochs", "1", *TINY, *more]


def fails(capsys, argv, *words):
    """The command exits with 2 and one line on stderr that holds all the words."""
    assert main([str(a) for a in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    "command", ["demo", "article", "prune", "convert", "report", "bench", "eval", "sensitivity", "doctor"]
)
def test_help_shows_a_working_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    example = next(line.strip() for line in text.splitlines() if line.strip().startswith(f"sparseprune {command}"))
    if command in ("demo", "prune"):
        assert "healing (default " in " ".join(text.split())
    if command != "bench":
        parser().parse_args(example.split()[1:])


def test_prune_writes_a_run_that_report_reads(files, tmp_path, capsys):
    assert main(prune_arguments(files, tmp_path / "runs", "--density", "0.25", "--name", "one")) == 0
    folder = tmp_path / "runs" / "one"
    record = json.loads((folder / "run.json").read_text())
    assert abs(record["density"] - 0.25) < 1e-3
    for which in ("dense", "pruned"):
        assert {"train", "valid", "test", "latency_ms", "bytes", "parameters"} <= set(record[which])
    assert record["seed"] == 0 and record["mask_hash"] and record["speedup"] > 0
    assert {"curves.png", "layers.png", "tradeoff.png"} <= {p.name for p in folder.iterdir()}
    assert main(["report", str(folder)]) == 0
    assert "test" in capsys.readouterr().out
    assert main(["report", str(folder / "pruned.safetensors")]) == 0
    assert "layers.0" in capsys.readouterr().out
    assert main(prune_arguments(files, tmp_path / "runs", "--density", "0.25", "--name", "two")) == 0
    assert json.loads((tmp_path / "runs" / "two" / "run.json").read_text())["mask_hash"] == record["mask_hash"]


def test_an_int8_run_shows_four_forms_and_writes_what_its_kernels_compute(files, tmp_path, capsys):
    dtypes = ["--granularity", "1x4", "--value-dtype", "int8", "--activations", "int8", "--layout", "bsr"]
    argv = [a for a in prune_arguments(files, tmp_path, "--density", "0.25", *dtypes) if a != "--quiet"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    assert "rounding all layers changes the validation loss from" in shown
    record = json.loads((tmp_path / "prune" / "run.json").read_text())
    assert record["config"]["pruning"]["activations"] == "int8"
    for name in ("dense float32", "dense int8", "sparse float32", "sparse int8"):
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{name}  ")]
        assert len(line.split()) == 9
    assert set(record["forms"]) == {"dense int8", "sparse float32"}
    assert record["forms"]["sparse float32"]["test"]["loss"] != record["pruned"]["test"]["loss"]
    exact = record["rounding"]["exact"]
    assert f"layers kept in float32: {', '.join(exact) or 'none'}" in shown
    fails(capsys, prune_arguments(files, tmp_path, "--activations", "int8"), "'int8' with value_dtype='int8'")
    # The file is the int8 model: what is loaded says, and gives, what ran here.
    from sparseprune.runner.text_encoder import TextEncoder

    settings = json.loads((tmp_path / "prune" / "encoder.json").read_text())
    settings.pop("labels")
    model = sp.load(TextEncoder(**settings), tmp_path / "prune" / "pruned.safetensors").eval().requires_grad_(False)
    kinds = {n: m.activations for n, m in model.named_modules() if isinstance(m, sp.SparseLinear)}
    assert set(kinds) == set(record["layers"]) and {n for n, kind in kinds.items() if kind != "int8"} == set(exact)
    stored = sp.checkpoint.describe(tmp_path / "prune" / "pruned.safetensors")
    assert all(layer.sparse_bytes < 0.12 * layer.dense_bytes for layer in stored.layers if layer.name in kinds)


def test_every_way_in_learns_scores_unless_told_otherwise():
    from sparseprune.runner import run_demo, run_prune

    assert sp.DistillConfig().method == "scores"
    assert {inspect.signature(run).parameters["method"].default for run in (run_demo, run_prune)} == {"scores"}
    assert parser().parse_args(["demo"]).method == "scores"


@pytest.mark.parametrize(("more", "method"), [((), "scores"), (("--method", "gan"), "gan")])
def test_the_adversary_plays_only_when_asked_for(files, tmp_path, more, method):
    assert main(prune_arguments(files, tmp_path, "--name", "one", *more)) == 0
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert (record["config"]["pruning"]["kind"] == "GANConfig") == (method == "gan")
    steps = json.loads((tmp_path / "one" / record["history"]).read_text())["steps"]
    assert ("discriminator_accuracy" in steps[-1]) == (method == "gan")


@pytest.mark.slow
def test_compensation_comes_from_the_command_line_and_counts_in_the_density(files, tmp_path):
    argv = prune_arguments(files, tmp_path, "--name", "one", "--compensation", "best", "--density", "0.25")
    assert main(argv) == 0
    record = json.loads((tmp_path / "one" / "run.json").read_text())
    assert record["config"]["pruning"]["compensation"] == "best" and record["density"] < 0.25 + 1e-3
    events = json.loads((tmp_path / "one" / record["history"]).read_text())["events"]
    chosen = [event["chosen"] for event in events if event["event"] == "compensated"]
    assert len(chosen) == 1 and set(chosen[0]) == set(record["layers"])


def test_demo_hands_every_option_on(monkeypatch):
    given = {}
    monkeypatch.setattr("sparseprune.runner.run", lambda config, **more: given.update(config=config, **more))
    options = (
        "--data clinc10 --density 0.25 --granularity 16x1 --method gan --compensation bias --layers *.ffn.* "
        "--layout csr --epochs 2 --max-seconds 9 --seed 3 --out there --name one --quiet"
    )
    assert main(["demo", *options.split()]) == 0
    config, gan = given["config"], given["config"].pruning
    assert (gan.adversarial, gan.compensation, gan.granularity, gan.epochs) == (True, "bias", sp.Block(16, 1), 2)
    assert (gan.max_seconds, gan.seed, config.seed, config.layout) == (9, 3, 3, "csr")
    assert gan.final_density == pytest.approx(0.25) and config.prune_layers == ("*.ffn.*",)
    assert (config.data, given["out"], given["name"], given["quiet"]) == ("clinc10", "there", "one", True)


def test_only_the_layers_that_match_are_pruned(files, tmp_path):
    argv = prune_arguments(files, tmp_path, "--name", "ffn", "--layers", "*.ffn.*", "--granularity", "16x1")
    assert main([*argv, "--density", "0.5"]) == 0
    record = json.loads((tmp_path / "ffn" / "run.json").read_text())
    assert record["layers"] and all(".ffn." in name for name in record["layers"])


def test_convert_there_and_back(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    sp.prune_(model, sparsity=0.9)
    source, small, back = tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    sp.save(model, source)
    assert main(["convert", str(source), str(small), "--value-dtype", "bfloat16"]) == 0
    assert small.stat().st_size < source.stat().st_size
    assert main(["convert", str(source), str(back), "--dense"]) == 0
    from safetensors.torch import load_file

    dense = load_file(back)
    assert all(torch.equal(dense[name], tensor) for name, tensor in model.state_dict().items())
    fails(capsys, ["convert", source, back, "--dense", "--value-dtype", "int8"], "expected none with dense, got 'int8'")
    assert main(["report", str(small), "--json"]) == 0
    text = capsys.readouterr().out
    assert json.loads(text[text.index("{") :])


def test_doctor_says_what_is_there(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiled core" in text and "CUDA kernels" in text and "Triton kernels" in text
    assert not [line for line in text.splitlines() if line.startswith("ok") and "not built" in line]
    findings = [Finding("a", "there"), Finding("b", "not built", False, "build it"), Finding("c", "not built", None)]
    assert render(findings) == "ok  a: there\n--  b: not built\n      build it\n    c: not built"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("SPARSEPRUNE_BACKEND", "nonsense", "expected one of .* every op raises until it is unset"),
        ("SPARSEPRUNE_BACKEND", "reference", "every op runs in reference or raises"),
        ("SPARSEPRUNE_CPU", "nonsense", "names no tier that can run here, so the core is not loaded; unset it"),
    ],
)
def test_doctor_does_not_call_a_setting_good_that_turns_the_core_off(variable, value, said, monkeypatch, capsys):
    monkeypatch.setenv(variable, value)
    if variable == "SPARSEPRUNE_CPU":  # the core reads it as it is loaded
        monkeypatch.setattr(_native, "C", None)
        monkeypatch.setattr(_native, "_c_error", f"{variable}={value}: expected one of generic, avx2")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if f"{variable}:" in line)
    assert lines[at].startswith("--") and value in lines[at] and re.search(said, lines[at + 1])


def test_the_installed_command_exists():
    run = subprocess.run([sys.executable, "-P", "-m", "sparseprune.cli", "--version"], capture_output=True, text=True)
    assert run.returncode == 0 and sp.__version__ in run.stdout


def test_missing_and_empty_files(files, tmp_path, capsys):
    fails(capsys, prune_arguments({**files, "valid": tmp_path / "none.tsv"}, tmp_path / "out"), "none.tsv")
    empty = tmp_path / "empty.tsv"
    empty.write_text("")
    fails(capsys, prune_arguments({**files, "test": empty}, tmp_path / "out"), "empty.tsv")
    fails(capsys, ["report", tmp_path / "nothing"], "nothing")
    assert not (tmp_path / "out").exists()


def test_a_label_that_training_never_saw(files, tmp_path, capsys):
    files["valid"].write_text("good thing\tsideways\n")
    fails(capsys, prune_arguments(files, tmp_path / "out"), "sideways", "valid.tsv")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("density", ["0", "1.5", "-0.1", "nan"])
def test_density_out_of_range(density, tmp_path, capsys):
    fails(capsys, ["demo", "--density", density, "--out", tmp_path / "out"], "density", "(0, 1]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, words",
    [
        (["--layers", "nothing.*"], ["nothing.*", "layers.0.query"]),
        (["--granularity", "sixteen"], ["granularity", "sixteen"]),
        (["--granularity", "7x1"], ["7"]),
        (["--name", "a/b"], ["name"]),
    ],
)
def test_bad_choices_write_nothing(more, words, files, tmp_path, capsys):
    fails(capsys, [*prune_arguments(files, tmp_path / "out"), *more], *words)
    assert not (tmp_path / "out").exists()


def test_unknown_data_set(tmp_path, capsys):
    fails(capsys, ["demo", "--data", "imdb", "--out", tmp_path / "out"], "imdb", "clinc10")


def test_unknown_configuration_key(tmp_path, capsys):
    from sparseprune.runner import RunConfig

    settings = json.loads(RunConfig().to_json())
    settings["colour"] = "red"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(settings))
    fails(capsys, ["demo", "--config", path, "--out", tmp_path / "out"], "colour")
    assert not (tmp_path / "out").exists()


def test_corrupted_checkpoints(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(32, 32))
    sp.prune_(model, sparsity=0.5)
    path = tmp_path / "a.safetensors"
    sp.save(model, path)
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    fails(capsys, ["report", path], "a.safetensors")
    altered = bytearray(content)
    altered[-1] ^= 1
    path.write_bytes(altered)
    fails(capsys, ["convert", path, tmp_path / "b.safetensors"], "a.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_no_space_left(tmp_path):
    """A limit on the size of files stands in for a full disk: the write fails half-way."""
    pytest.importorskip("resource")
    model = nn.Sequential(nn.Linear(256, 256))
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sp.save(model, source)
    code = (
        "import resource, sys; from sparseprune.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        f"sys.exit(main(['convert', {str(source)!r}, {str(target)!r}, '--dense']))"
    )
    # -B: Python would keep what the limit leaves of a module's bytecode, for every process after this one
    run = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture
def language_model(tmp_path):
    """A folder with a tiny Llama and a word tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", *["the", "a", "cat", "dog", "sat", "ran", "on", "mat", "hill", "and", "then"]]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on a mat and then the dog ran on the hill " * 40)
    return folder, model, text


def test_eval_shows_dense_beside_sparse(language_model, tmp_path, capsys):
    folder, model, text = language_model
    sp.prune_(model, sparsity=0.5)
    sp.save(model, tmp_path / "pruned.safetensors")
    argv = ["eval", "--model", folder, "--text", text, "--context", "64", "--new-tokens", "4"]
    assert main([str(a) for a in [*argv, "--checkpoint", tmp_path / "pruned.safetensors"]]) == 0
    text = capsys.readouterr().out
    assert text.count("perplexity") == 3 and "sparse" in text


def test_eval_runs_the_zeros_of_the_model_itself_sparse(language_model, tmp_path, capsys, monkeypatch):
    folder, model, text = language_model
    argv = [str(a) for a in ["eval", "--model", folder, "--text", text, "--context", "64", "--new-tokens", "4"]]
    assert main(argv) == 0
    assert "sparse" not in capsys.readouterr().out
    for option in ("--value-dtype", "--dense-value-dtype"):
        fails(capsys, [*argv, option, "int8"], "expected neither --value-dtype nor --dense-value-dtype")
    sp.prune_(model, sparsity=0.5)
    model.save_pretrained(folder)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("perplexity") == 2 and "sparse (float32)" in out and "sparse layers" in out
    assert "dense in bfloat16" not in out
    sparsify, given = sp.nn.sparsify_, {}
    monkeypatch.setattr("sparseprune.nn.sparsify_", lambda *a, **named: given.update(named) or sparsify(*a, **named))
    assert main([*argv, "--value-dtype", "bfloat16", "--dense-value-dtype", "bfloat16"]) == 0
    assert (given["value_dtype"], given["dense_value_dtype"]) == ("bfloat16", "bfloat16")
    assert re.search(r"sparse layers, \d+ dense in bfloat16", capsys.readouterr().out)


def test_a_checkpoint_of_another_model(language_model, tmp_path, capsys):
    folder, _, text = language_model
    sp.save(nn.Sequential(nn.Linear(8, 8)), tmp_path / "other.safetensors")
    argv = ["eval", "--model", folder, "--text", text, "--context", "64"]
    fails(capsys, [*argv, "--checkpoint", tmp_path / "other.safetensors"], "other.safetensors")


def test_sensitivity_suggests_densities(language_model, tmp_path, capsys):
    folder, model, text = language_model
    out = tmp_path / "densities.json"
    argv = ["sensitivity", "--model", folder, "--text", text, "--context", "32", "--windows", "4", "--out", out]
    argv += ["--loss-windows", "2", "--densities", "0.5", "0.2", "--sparsity", "0.6"]
    assert main([str(a) for a in argv]) == 0
    printed = capsys.readouterr().out
    densities = json.loads(out.read_text())
    groups = {".".join(name.split(".")[:3]) for name in densities}
    assert len(groups) == 2
    assert f"[{2 * len(groups)}/{2 * len(groups)}, 0 min left]" in printed and "each on 64 tokens" in printed
    assert printed.count(": density ") == len(groups) and out.with_suffix(".png").exists()
    report = sp.prune_(model, 0.6, densities=densities)
    assert report.kept == report.total - round(0.6 * report.total)
    fails(capsys, [*argv, "--loss-windows", "0"], "--loss-windows: expected a whole number of at least 1")


def test_a_model_that_is_not_there(tmp_path, capsys):
    fails(capsys, ["eval", "--model", tmp_path / "none", "--text", tmp_path / "x"], "x: no such file")
    (tmp_path / "x").write_text("some text")
    fails(capsys, ["eval", "--model", tmp_path / "none", "--text", tmp_path / "x"], "none")
