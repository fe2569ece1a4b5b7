"""The command line where little is as it should be: no reader, no home, no extras, and a user in a hurry."""

from __future__ import annotations

import builtins
import os
import subprocess
import sys

import pytest

from sparseprune import cli
from sparseprune.runner import display, measuring

BARE = {
    "PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20",
    "HOME": "/proc/nowhere", "TERM": "dumb",
}  # fmt: skip


def test_nobody_reads_the_output():
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-P", "-m", "sparseprune.cli", "doctor"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert run.returncode == 141 and run.stderr == ""


def test_a_run_says_why_it_stopped_when_nobody_reads_on(monkeypatch, capsys):
    def closed(*args, **named):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sparseprune.runner.run_demo", closed)
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    assert cli.main(["demo"]) == 141
    assert "goes on from its last checkpoint" in capsys.readouterr().err


def test_a_bare_environment(tmp_path):
    code = (
        "import sys; from sparseprune.cli import main; from sparseprune.runner.display import Display; "
        "main(['report', '/none']); main(['doctor']); Display().say('\\u9152'); sys.stdout.flush(); "
        "sys.stdout = None; Display().begin('a', 3); sys.exit(main(['doctor']))"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=BARE, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "compiled core" in run.stdout and "\\u9152" in run.stdout and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    "command", ["demo", "article", "prune", "convert", "report", "bench", "eval", "sensitivity", "doctor"]
)
def test_help_on_a_narrow_terminal(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and "--help" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "goes_on"), [("demo", True), ("report", False), ("bench", False)])
def test_a_user_who_stops_it(command, goes_on, monkeypatch, capsys):
    def stopped(*args, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseprune.runner.run_demo", stopped)
    monkeypatch.setattr("sparseprune.cli.commands.report.run", stopped)
    monkeypatch.setattr("sparseprune.bench.command._run", stopped)
    assert cli.main([command, *{"report": ["x"], "bench": ["--allow-reference"]}.get(command, [])]) == 130
    error = capsys.readouterr().err
    assert error.startswith("sparseprune: stopped") and ("goes on" in error) == goes_on


@pytest.mark.parametrize("error", [RuntimeError("not finite\nat step 3"), MemoryError()])
def test_work_that_failed_is_one_line_and_status_1(error, monkeypatch, capsys):
    def fails(*args, **named):
        raise error

    monkeypatch.setattr("sparseprune.runner.run_demo", fails)
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and "error: " in said and "--debug" in said
    with pytest.raises(type(error)):
        cli.main(["demo", "--debug"])


@pytest.fixture
def without(monkeypatch):
    """``without("rich")``: as if the package were not installed."""

    def hide(package):
        real = builtins.__import__

        def importing(name, *args, **named):
            if name.split(".")[0] == package:
                raise ImportError(f"No module named {package!r}")
            return real(name, *args, **named)

        monkeypatch.setattr(builtins, "__import__", importing)
        for name in list(sys.modules):
            if name.split(".")[0] == package or name == "sparseprune.runner.plots":
                monkeypatch.delitem(sys.modules, name)

    return hide


def test_without_rich(without, monkeypatch, capsys):
    without("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = display.Display()
    shown.begin("pruning", 3)
    assert "pip install 'sparseprune[demo]'" in capsys.readouterr().out


def test_without_matplotlib(without, tmp_path, monkeypatch, capsys):
    without("matplotlib")
    said = []
    assert measuring.plot(tmp_path, {}, {}, said.append) == []
    assert len(said) == 1 and "pip install 'sparseprune[plot]'" in said[0]


def test_bars_start_at_zero():
    pytest.importorskip("matplotlib")
    from sparseprune.runner.plots import _layers

    figure = _layers({"layers": {"a": 0.1, "b": 0.35}, "density": 0.2})
    assert figure.axes[0].get_xlim() == (0.0, 1.0)


def test_data_that_can_only_be_read(tmp_path):
    from sparseprune.data import load_files

    path = tmp_path / "folder" / "a.tsv"
    path.parent.mkdir()
    path.write_text("a\tx\nb\ty\n")
    path.chmod(0o444)
    path.parent.chmod(0o555)
    try:
        assert len(load_files(path, path, path).train) == 2
    finally:
        path.parent.chmod(0o755)
