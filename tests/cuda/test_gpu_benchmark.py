"""benchmarks/gpu.py in its tiny form, against the emulator: its own code works before there is a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu
from benchmarks.gpu_cases import Case, Place

PROGRAM = Path(gpu.__file__)
TINY = Place("cpu", tiny=True)


@pytest.mark.slow
@pytest.mark.emul
def test_every_tiny_case_runs_and_is_right(emulator, emulator_folder, need_package, tmp_path):
    need_package("transformers")
    command = [sys.executable, str(PROGRAM), "--tiny", "--module", str(emulator_folder / "_cuda_emul.so")]
    run = subprocess.run([*command, "--name", "tiny", "--out", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "gpu-tiny.json").read_text())
    assert results["all_right"] and not results["left_out"] and results["limits"]["bandwidth"] > 0
    assert len(results["rows"]) == sum(len(cases) for cases in gpu.groups(TINY).values())
    for row in results["rows"]:
        assert row["notes"] == {} and len(row["microseconds"]) > 1 and row["microseconds"]["dense"] > 0, row


def test_a_failing_contestant_is_a_note_and_a_wrong_one_is_not_timed():
    def bad():
        raise RuntimeError("no such kernel image")

    def prepare():
        return {"dense": lambda: torch.ones(3), "cuda": bad, "triton": lambda: torch.zeros(3)}, torch.ones(3), 1e-3

    limits = {"bandwidth": 1e9, "float16": 1e9}
    row = gpu.measure(TINY, Case("op", "setting", prepare, bytes=100.0), limits)
    assert list(row["microseconds"]) == ["dense"] and gpu.failed(row)
    assert row["notes"] == {
        "cuda": "RuntimeError: no such kernel image", "triton": "wrong result: off by 1.0e+00 of the largest value",
    }  # fmt: skip
    assert row["roofline_us"] == pytest.approx(0.1)
    assert "no such kernel image" in gpu.table(row)
    row = gpu.measure(TINY, Case("op", "setting", bad), {})
    assert row["notes"] == {"case": "RuntimeError: no such kernel image"} and gpu.failed(row)


def test_each_pruned_model_has_a_result_of_its_own():
    def prepare():
        found = {"dense": lambda: torch.ones(3), "2:4": lambda: torch.ones(3), "blocks 90%": lambda: torch.ones(3)}
        return found, {"2:4": torch.ones(3), "blocks 90%": torch.full((3,), 2.0)}, 5e-2

    row = gpu.measure(TINY, Case("model", "setting", prepare), {})
    assert list(row["microseconds"]) == ["dense", "2:4"] and list(row["notes"]) == ["blocks 90%"] and gpu.failed(row)


def test_a_library_that_lacks_a_format_is_no_failure_of_ours():
    assert not gpu.failed({"notes": {"cusparse": "not implemented"}, "microseconds": {"cuda": 1.0}})
    assert not gpu.failed({"notes": {"cuda": "no CUDA graph"}, "microseconds": {"cuda": 1.0}})
    assert gpu.failed({"notes": {"2:4": "wrong result"}, "microseconds": {"dense": 1.0}})


CHILD = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
limits = json.loads(sys.argv[sys.argv.index("--limits") + 1]) if "--limits" in sys.argv else {"processes": 0}
limits["processes"] += 1
print(json.dumps({"limits": limits}), flush=True)
for i in range(first, 4):
    print(json.dumps({"begins": i}), flush=True)
    row = {"op": "op", "setting": f"case {i}", "microseconds": {"dense": 1.0}, "quartiles": {}, "notes": {}}
    if i == 0: os.abort()
    if i == 1: time.sleep(1000)
    if i == 2: row["notes"] = {"cuda": "an illegal memory access"}
    print(json.dumps({"row": row}), flush=True)
    if i == 2: os._exit(3)
"""


@pytest.fixture
def four_cases(monkeypatch, tmp_path):
    """A child that dies at the first case, hangs at the second and loses its context at the third."""
    cases = [Case("op", f"case {i}", lambda: ({}, None, 0.0)) for i in range(4)]
    monkeypatch.setattr(gpu, "groups", lambda place: {"group": cases})
    program = tmp_path / "child.py"
    program.write_text(CHILD)
    monkeypatch.setattr(gpu, "__file__", str(program))


def test_a_process_that_dies_hangs_or_loses_the_card_costs_one_row(monkeypatch, four_cases):
    monkeypatch.setattr(gpu, "LONGEST", 5.0)
    rows, limits = [], {}
    assert not gpu.run_group(TINY, "group", gpu.time.monotonic() + 200, [], limits, rows.append)
    assert [row["setting"] for row in rows] == [f"case {i}" for i in range(4)]
    assert [row["notes"] for row in rows[1:]] == [
        {"case": "nothing came for 5 seconds"}, {"cuda": "an illegal memory access"}, {},
    ]  # fmt: skip
    assert "the process ended with -6" in rows[0]["notes"]["case"]
    assert limits["processes"] == 4, "each hands its limits to the next"


def test_what_the_time_does_not_reach_is_left_out(four_cases):
    rows: list[dict] = []
    missed = gpu.run_group(TINY, "group", gpu.time.monotonic() - 1, [], {}, rows.append)
    assert missed == [f"op case {i}" for i in range(4)] and not rows


def test_a_context_that_is_lost_ends_the_process_behind_its_row(monkeypatch, capsys):
    """After an illegal address every call raises: the row names the contestant, and no other case is tried."""
    lost = []

    def illegal():
        lost.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def prepare():
        return {"dense": lambda: torch.ones(3), "cuda": illegal, "triton": lambda: torch.ones(3)}, torch.ones(3), 0.0

    def synchronize(place):
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def ended(code):
        raise SystemExit(code)

    cases = [Case("op", "first", prepare), Case("op", "second", prepare)]
    monkeypatch.setattr(gpu, "groups", lambda place: {"group": cases})
    monkeypatch.setattr(gpu, "synchronize", synchronize)
    monkeypatch.setattr(gpu.os, "_exit", ended)
    with pytest.raises(SystemExit, match="3"):
        gpu.child(TINY, "group", 0, {"bandwidth": 1e9, "float16": 1e9})
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (row,) = [message["row"] for message in said if "row" in message]
    assert list(row["notes"]) == ["cuda"] and "illegal memory access" in row["notes"]["cuda"]


def test_every_row_is_in_the_file_as_soon_as_it_is_there(monkeypatch, tmp_path):
    seen = []

    def run_group(place, group, end, arguments, limits, keep):
        for i in range(2):
            keep({"op": "op", "setting": f"{i}", "microseconds": {"dense": 1.0}, "quartiles": {}, "notes": {}})
            found = json.loads((tmp_path / "gpu-tiny.json").read_text())
            seen.append((len(found["rows"]), found["finished"]))
        return []

    monkeypatch.setattr(gpu, "run_group", run_group)
    monkeypatch.setattr(gpu, "groups", lambda place: {"group": []})
    monkeypatch.setattr(gpu, "use_module", lambda path: None)
    assert gpu.main(["--tiny", "--module", "none", "--name", "tiny", "--out", str(tmp_path)]) == 0
    assert seen == [(1, False), (2, False)]
    assert json.loads((tmp_path / "gpu-tiny.json").read_text())["finished"]
