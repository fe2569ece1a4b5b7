"""Each page's programs, from the first to the last, in one namespace, as a reader runs them."""

from __future__ import annotations

import contextlib
import math
import shlex
import subprocess
import sys

import pytest
from pages import PAGES, ROOT, blocks, program

import sparseprune as sp
from sparseprune.cli import main, parser

#: Pages that bring all they need. What must not stay in the process runs in one of its own.
WHOLE = (
    "README.md", "docs/choosing.md", "docs/classifiers.md", "docs/coming-from.md", "docs/language-models.md",
    "docs/quickstart.md", "docs/research.md", "docs/saving.md", "docs/structured.md", "docs/why-not-faster.md",
)  # fmt: skip
LONG = ("docs/classifiers.md", "docs/language-models.md")
APART = ("docs/kernels.md",)
#: Pages whose programs want a model that a test prepares: page -> the test.
PREPARED = {"docs/huggingface.md": "tests/integrations/test_docs.py"}


def test_every_page_with_a_program_is_run():
    assert [page for page in PAGES if blocks(page, "python")] == sorted((*WHOLE, *APART, *PREPARED))
    assert all((ROOT / test).is_file() for test in PREPARED.values())


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """The programs write where they stand; what they time is not kept for others, nor are their settings."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield tmp_path
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture
def own_criteria(monkeypatch):
    """A criterion that a page registers is gone afterwards."""
    from sparseprune.pruning import criteria

    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in LONG else ()) for page in WHOLE]
)
def test_the_programs_of_a_page(page, in_folder, own_criteria, capsys):
    pytest.importorskip("transformers")
    names: dict = {"__name__": "page"}
    exec(compile(program(page), page, "exec"), names)
    assert capsys.readouterr().out.strip()
    if page == "README.md":
        pruned, total = names["pruner"].masks, 512 * 512 * 2 + 512 * 10
        assert sum(int(mask.sum()) for mask in pruned.values()) == total - round(0.9 * total)
        dense, again = (names["evaluate"](names[name], names["test"])["accuracy"] for name in ("dense", "again"))
        assert dense > 0.6 and again > 0.85 * dense
        assert (in_folder / "pruned.safetensors").stat().st_size < 0.5 * 4 * total
    if page == "docs/classifiers.md":
        pruned = [layer for layer in sp.sparsity_report(names["served"]).layers if layer.density < 1]
        assert len(pruned) == 13 and sum(p.nnz for p in pruned) < 0.11 * sum(math.prod(p.shape) for p in pruned)
    if page == "docs/language-models.md":
        kept = [layer.weight for name, layer in names["other"].named_modules() if name.endswith("_proj")]
        assert len(kept) == 14 and sum(int((w != 0).sum()) for w in kept) == names["report"].total // 2


@pytest.mark.parametrize("page", APART)
def test_the_programs_of_a_page_apart(page, in_folder):
    (in_folder / "page.py").write_text(program(page), encoding="utf-8")
    run = subprocess.run([sys.executable, "page.py"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.strip(), run.stderr[-4000:]


def commands_of(page: str) -> list[list[str]]:
    """The command lines of a page, comments left out, joined over backslashes, a part for each side of ``&&``."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    split = [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]
    return [words for words in split if words]


#: Programs that a page may call; each is there after the page's own pip line, or with any Python.
TOOLS = {"pip", "python", "python3", ".", "pytest", "sphinx-build", "lm_eval", ".ci/run"}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_the_commands_of_a_page_are_understood(page, capsys):
    for words in commands_of(page):
        while "=" in words[0]:  # settings of the environment
            words = words[1:]
        if words[0] == "sparseprune":
            check_options(words, capsys)
        else:
            assert words[0] in TOOLS, words
            files = [f"{word.replace('.', '/')}.py" for word in words if word.startswith("benchmarks.")]
            files += [word for word in words[1:] if word.startswith(("tests/", "examples/", "benchmarks/"))]
            assert not [file for file in files if not (ROOT / file).exists()], words


def check_options(words: list[str], capsys) -> None:
    """The command exists and knows the options; where nothing but its own parser reads them, all of the line fits."""
    with contextlib.suppress(SystemExit):
        assert main([words[1], *(["--text", "x"] if "--text" in words else []), "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: sparseprune"), words
    assert not [word for word in words if word.startswith("--") and word not in shown], words
    if words[1] != "bench" and "--text" not in words:
        parser().parse_args(words[1:])


def test_a_wrong_command_is_seen(capsys):
    check_options(["sparseprune", "demo", "--density", "0.1"], capsys)
    for wrong in (["nothing"], ["demo", "--no-such-option"], ["prune", "--text", "x", "--no-such-option", "1"]):
        with pytest.raises((AssertionError, SystemExit)):
            check_options(["sparseprune", *wrong], capsys)
