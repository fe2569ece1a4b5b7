"""Fixtures and rules that every test shares."""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

IN_CI = os.environ.get("CI") == "true"

#: dtype name -> (rtol, atol): the one table of tolerances. Sums run in float32, so the rounding of the result decides.
TOLERANCES = {
    "float64": (1e-9, 1e-9),
    "float32": (2e-5, 2e-5),
    "bfloat16": (2e-2, 2e-2),
    "float16": (2e-3, 2e-3),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", type=int, metavar="SEED",
        help="run the files in an order drawn from SEED, and the tests within each, so that fixtures of a file stay",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    order = random.Random(seed)
    files: dict[str, list[pytest.Item]] = {}
    for item in sorted(items, key=lambda item: item.nodeid):
        files.setdefault(str(item.path), []).append(item)
    drawn = list(files.values())
    order.shuffle(drawn)
    for tests in drawn:
        order.shuffle(tests)
    items[:] = [item for tests in drawn for item in tests]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports left is not looked through again by every collection of the tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    seed = config.getoption("--shuffle")
    if seed is not None:
        terminalreporter.write_line(f"the same order again: --shuffle {seed}")


def need(present: bool, what: str) -> None:
    """Skips a test, visibly, where a tool is missing; fails it where CI says that every tool is there."""
    if present:
        return
    if IN_CI:
        pytest.fail(f"CI is expected to have {what}")
    pytest.skip(f"needs {what}")


@pytest.fixture
def close():
    """``close(got, expected)``: equal within the tolerance of got's dtype, same shape, no NaN where none is
    expected.
    """
    import torch

    def check(got, expected, dtype=None):
        rtol, atol = TOLERANCES[str(dtype or got.dtype).removeprefix("torch.")]
        torch.testing.assert_close(
            got.to(torch.float64), expected.to(torch.float64), rtol=rtol, atol=atol, equal_nan=True
        )

    return check


@pytest.fixture
def fussy_blas(monkeypatch):
    """Dense products that hang on how their tensors lie, as those of a BLAS on some CPUs do: on the order of the
    dimensions in memory, and on where in its memory a tensor begins. For tests that compare to the bit.
    """
    import torch.nn.functional as F

    plain = F.linear

    def linear(input, weight, bias=None):
        off = sum(t.storage_offset() * t.element_size() % 64 + (not t.is_contiguous()) for t in (input, weight))
        return plain(input, weight, bias) * (1 + 1e-5 * off)

    monkeypatch.setattr(F, "linear", linear)


@pytest.fixture
def benchmarks(monkeypatch):
    """Makes the folder a package, though it is no part of the installed one and the checkout is on no path."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    monkeypatch.setitem(sys.modules, "benchmarks", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(sys.modules["benchmarks"])


@pytest.fixture
def need_tool():
    """``need_tool("nvcc")``: the program's path; a skip (or, in CI, a failure) where it is missing."""

    def find(name: str, *places: str) -> str:
        path = next((p for p in places if os.path.exists(p)), None) or shutil.which(name)
        need(path is not None, name)
        return str(path)

    return find


@pytest.fixture
def need_package():
    """``need_package("triton")``: a skip (or, in CI, a failure) where the package is missing."""

    def find(name: str) -> None:
        need(importlib.util.find_spec(name) is not None, f"the package {name}")

    return find


@pytest.fixture(scope="session")
def torchrun(tmp_path_factory):
    """``torchrun(script, *arguments)``: the script in two gloo processes that see the installed package and no
    checkout; ``launcher``: other arguments to Python that start them.
    """

    def run(script, *arguments, timeout: float = 600.0, launcher: list[str] | None = None) -> str:
        launcher = launcher or ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [sys.executable, *launcher, *(str(part) for part in (script, *arguments))]
        started = subprocess.Popen(
            command, cwd=tmp_path_factory.mktemp("elsewhere"), env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)  # the processes it started, too
            out, err = started.communicate()
            err = f"over {timeout:g} s\n{err}"
        assert started.returncode == 0, f"{' '.join(command)}\n{out[-4000:]}\n{err[-8000:]}"
        return out

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tier" in metafunc.fixturenames:
        from sparseprune import _native

        tiers = _native.C.runnable_tiers() if _native.C is not None else []
        metafunc.parametrize(
            "tier", tiers or [pytest.param(None, marks=pytest.mark.skip(reason="no compiled core"))], indirect=True
        )


@pytest.fixture
def tier(request):
    """Each tier that this CPU can run, in turn; the one in use before comes back afterwards."""
    from sparseprune import _native

    before = _native.C.tier()
    _native.C.use_tier(request.param)
    yield request.param
    _native.C.use_tier(before)
