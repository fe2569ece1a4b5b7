"""benchmarks/compare.py and benchmarks/limits.py, on made-up results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from sparseprune.bench.run import save_results

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"_benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(ratio, spread=0.01, shape=(3072, 768), tokens=128, structure="element", sparsity=0.9):
    quartiles = {"median": ratio, "low": ratio * (1 - spread), "high": ratio * (1 + spread), "count": 9}
    return {
        "case": {"suite": "linear", "shape": shape, "sparsity": sparsity, "structure": structure, "tokens": tokens},
        "baseline": "torch dense",
        "threads": 2,
        "tier": "avx2",
        "cold": False,
        "load": 0.1,
        "results": {"ours csr": {"ratio": quartiles, "ms": quartiles, "ours": True, "share": 0.5}},
        "absent": {},
        "wrong": {},
    }


@pytest.fixture
def files(tmp_path):
    def write(name, *records):
        path = tmp_path / name
        save_results(path, records, None)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("new", "status", "said"),
    [
        (record(5.0), 1, "1 slower"),
        (record(9.5), 0, "0 slower, 0 faster"),
        (record(5.0, spread=1.5), 0, "0 slower"),
        (record(20.0), 0, "1 faster"),
    ],
)
def test_compare(files, capsys, new, status, said):
    compare = load("compare")
    assert compare.main([files("old.json", record(10.0)), files("new.json", new)]) == status
    assert said in capsys.readouterr().out


def test_compare_refuses_what_has_nothing_in_common(files, capsys, tmp_path):
    compare = load("compare")
    assert compare.main([files("old.json", record(1.0)), files("new.json", record(1.0, tokens=8))]) == 2
    assert compare.main([files("old.json"), str(tmp_path / "missing.json")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "nothing" not in lines[1] and "missing.json" in lines[1]


def test_shares_of_limits():
    limits = load("limits")
    shapes = ((768, 768), (3072, 768), (768, 3072), (4096, 4096))
    text = limits.shares_of_limits([record(9.0, shape=shape) for shape in shapes])
    assert "element 90%, 3072x768, N=128" in text and "50%" in text
    assert "element 90%, geometric mean of four shapes, N=128" in text
    assert "none of the products" in limits.shares_of_limits([])
