"""Hostile command lines: every one ends in work that may begin, or in one line and exit status 1 or 2.

SPARSEPRUNE_FUZZ_SECONDS: how long (default 5); SPARSEPRUNE_FUZZ_SEED: the seed of a run to see again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path

import pytest
from torch import nn

import sparseprune as sp
from sparseprune import cli
from sparseprune.bench import command as bench
from sparseprune.cli import language

NUMBERS = [
    "-5", "0", "1", "2", "3", "0.5", "0.999", "1.5", "-0.1", "-0", "nan", "inf", "-inf", "1e400", "1e-400", "1_000",
    "0x10", "\u0663", "\u00b2", "", " ", "+1", "1,2", "9" * 25, "9" * 5000, "4294967295", "4294967296", "True", "None",
]  # fmt: skip
WORDS = [
    "", " ", ".", "..", "../..", "a/b", "/", "-", "--", "--help", "-h", "--version", "--debug", "element", "16x1",
    "2:4", "0:0", "4:2", "7x", "x", ":", "heads", "csr", "auto", "dense", "gan", "movement", "best", "bfloat16", "int8",
    "all", "none", "8x8", "8x8,", "30x7", "kth,mask", "crosswoz_zh", "imdb", "encoder", "*.ffn.*", "[", "*",
    "nothing.*", "\0", "a\0b", "\udcff", "\ud800", "\n", "a\nb\nc", "\x1b[31m", "%s%n", "{}", "n" * 300, "\u202e",
    "\u9152\u5e97", "~", "~nobody/x",
]  # fmt: skip


class Reached(BaseException):
    """The checks are over and the work would begin."""


@pytest.fixture
def shallow(monkeypatch):
    def reached(*args, **named):
        raise Reached

    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    for module in ("runner", "runner.article", "runner.language"):
        monkeypatch.setattr(f"sparseprune.{module}.occupied", reached)
    monkeypatch.setattr("sparseprune.integrations.folder.load_folder", reached)
    monkeypatch.setattr("sparseprune.runner.sources._transformer", reached)
    monkeypatch.setattr("sparseprune.cli.shared.language_model", reached)
    monkeypatch.setattr(bench, "_run", reached)
    monkeypatch.setattr(bench, "refuse_reference", lambda allow: None)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Paths of all kinds: of files that are fine, broken, empty, of another kind, of folders and of nothing."""
    monkeypatch.chdir(tmp_path)
    good = "\n".join(f"good {i}\tup\nbad {i}\tdown" for i in range(8))
    model = nn.Sequential(nn.Linear(16, 16))
    sp.prune_(model, sparsity=0.5)
    sp.save(model, "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    from sparseprune.runner import RunConfig

    settings = json.loads(RunConfig(data="crosswoz_zh").to_json())
    figures = {"latency_ms": 1.0, "bytes": 0, "parameters": 0}
    record = {"dense": {**figures, "train": {"loss": 0, "accuracy": 0}}, "pruned": 3, "speedup": "fast"}
    contents = {
        "good.tsv": good, "good.jsonl": '{"text": "a", "label": 1}\n{"text": "b", "label": 0}',
        "good.conll": "a O\nb B", "settings.json": json.dumps(settings),
        "odd.json": json.dumps({**settings, "seed": -1}),
        "gan.json": json.dumps({**settings, "pruning": [1]}), "limit.json": json.dumps({**settings, "train_limit": 0}),
        "run.json": json.dumps(record), "list.json": "[]", "number.json": "3", "deep.json": "[" * 100_000,
        "nan.json": "NaN", "empty.json": "", "header.tsv": "text\tlabel\na\tx", "one.tsv": "a\tx", "empty.tsv": "",
        "wide.tsv": "a\tb\tc\td", "surrogate.jsonl": '{"text": "\\ud800", "label": 1}', "labels.txt": "up\ndown",
        "half.safetensors": whole[: len(whole) // 2], "header.safetensors": b"\xff" * 8 + whole[8:],
        "binary.tsv": bytes(range(256)), "utf16.tsv": good.encode("utf-16"), "empty.safetensors": b"",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("folder", "folder.json", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "run" / "settings.json").write_text(contents["settings.json"])
    (tmp_path / "folder.json" / "config.json").write_text(contents["nan.json"])
    there = sorted(path.name for path in tmp_path.iterdir())
    return [*there, "missing", "missing/deeper/file.json", "good.tsv/file.json", "folder/", "/proc/self/mem",
            "/dev/null", "/dev/null/x", str(tmp_path / "run"), "l" * 300 + ".json"]  # fmt: skip


def fine(name, moments):
    """A command line of this command that gets as far as its work, but for what is put into it afterwards."""
    data = moments.choice(["good.tsv", "good.jsonl"])
    return {
        "demo": ["demo", "--data", "crosswoz_zh"],
        "prune": ["prune", "--model", "encoder", "--train", data, "--valid", data, "--test", data],
        "convert": ["convert", "good.safetensors", "out.safetensors"],
        "report": ["report"],
        "export": ["export", "folder", "out"],
        "prune --text": ["prune", "--model", "folder", "--text", "good.tsv"],
        "eval": ["eval", "--model", "folder", "--text", "good.tsv"],
        "sensitivity": ["sensitivity", "--model", "folder", "--text", "good.tsv"],
        "bench": ["bench", "--shapes", "16x16"],
    }.get(name, [name])  # fmt: skip


def command_lines(moments, places):
    """Random ones for ever: fine ones with a few options more, and some of anything at all."""
    whole = cli.parser()
    choices = next(a.choices for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    parsers = {**choices, "bench": bench.parser(), "prune --text": language.parser()}

    def anything():
        return moments.choice(moments.choice([NUMBERS, WORDS, places, places]))

    def value(action):
        if moments.random() < 0.1:
            return anything()
        numbers = action.type not in (None, Path)
        return moments.choice(list(action.choices or (NUMBERS if numbers else [*places, *WORDS])))

    while True:
        name = moments.choice(list(parsers))
        actions = [action for action in parsers[name]._actions if action.nargs != 0 or moments.random() < 0.1]
        argv = fine(name, moments) if moments.random() < 0.8 else name.split()
        for action in moments.sample(actions, min(len(actions), moments.choice((0, 1, 1, 1, 2, 3, 9)))):
            if action.option_strings:
                argv.append(moments.choice(action.option_strings))
            if action.nargs != 0 and moments.random() < 0.98:
                argv.append(value(action))
        if moments.random() < 0.05:
            argv.insert(moments.randint(0, len(argv)), anything())
        if moments.random() < 0.02:
            argv = argv[1:]
        yield [part for part in argv if part != "--debug"]  # which asks for the traceback


def complaint(argv, capsys):
    """What is wrong with how this command line ended; None where nothing is."""
    capsys.readouterr()
    try:
        status = cli.main(argv)
    except Reached:
        return None
    except SystemExit as stop:
        return None if stop.code in (0, None) else f"SystemExit({stop.code!r})"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    said = capsys.readouterr().err
    if status == 0:
        return None
    lines = said.strip().splitlines()
    if status not in (1, 2) or len(lines) != 1 or not lines[0].startswith("sparseprune") or "error: " not in lines[0]:
        return f"status {status}, said {said!r}"
    return None


def test_hostile_command_lines_end_in_one_line(shallow, places, capsys):
    seed = int(os.environ.get("SPARSEPRUNE_FUZZ_SEED", str(time.time_ns() % 2**32)))
    seconds = float(os.environ.get("SPARSEPRUNE_FUZZ_SECONDS", "5"))
    with capsys.disabled():
        print(f"\nSPARSEPRUNE_FUZZ_SEED={seed} for {seconds:g} s", end=" ")
    end, count = time.monotonic() + seconds, 0
    for argv in command_lines(random.Random(seed), places):
        found = complaint(argv, capsys)
        assert found is None, f"SPARSEPRUNE_FUZZ_SEED={seed}, command line {count}, {argv!r}: {found}"
        count += 1
        if time.monotonic() > end:
            break
    assert count
