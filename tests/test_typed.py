"""The public face is typed: checkers accept a user's right script, and refuse each wrong line of another."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparseprune

SCRIPTS = Path(__file__).with_name("typed")
RIGHT, WRONG = SCRIPTS / "right.py", SCRIPTS / "wrong.py"
ROOT = Path(sparseprune.__file__).parents[1]
EXPECTED = [number for number, line in enumerate(WRONG.read_text().splitlines(), 1) if "# wrong" in line]


def mypy(folder: Path) -> set[tuple[str, int]]:
    """(script, line) of each error that mypy finds."""
    command = [sys.executable, "-m", "mypy", "--config-file", "", "--follow-imports", "silent", "--cache-dir",
               str(folder), str(RIGHT), str(WRONG)]  # fmt: skip
    path = {} if ROOT.name == "site-packages" else {"MYPYPATH": str(ROOT)}  # an editable install is no path to mypy
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS, env={**os.environ, **path})
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {(name, int(line)) for name, line in re.findall(r"(\w+\.py):(\d+): error", done.stdout)}


def pyright(folder: Path) -> set[tuple[str, int]]:
    """(script, line) of each error that pyright finds, by the rules of its basic level."""
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps({"include": [str(SCRIPTS)], "extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}))
    command = ["basedpyright", "-p", str(config), "--pythonpath", sys.executable, "--outputjson"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["generalDiagnostics"]
    return {(Path(d["file"]).name, d["range"]["start"]["line"] + 1) for d in found if d["severity"] == "error"}


@pytest.mark.parametrize(
    ("checker", "program"),
    [pytest.param(mypy, "mypy", marks=pytest.mark.slow), (pyright, "basedpyright")],  # mypy takes half a minute
)
def test_checkers_accept_what_is_right_and_refuse_what_is_wrong(checker, program, tmp_path):
    if shutil.which(program) is None:
        assert os.environ.get("CI") != "true", f"{program} is missing"
        pytest.skip(f"needs {program}")
    assert checker(tmp_path) == {(WRONG.name, line) for line in EXPECTED}


def test_what_checkers_read_is_what_python_loads():
    tree = ast.parse(Path(sparseprune.__file__).read_text(encoding="utf-8"))
    typed = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and node.names[0].asname:
            typed[node.names[0].asname] = (node.module or node.names[0].name).split(".")[0]
    assert typed == {**sparseprune._PUBLIC, **{name: name for name in sparseprune._SUBMODULES}}
