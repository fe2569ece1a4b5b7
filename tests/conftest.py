"""Fixtures and rules that every test shares."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys

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

    def run(script, *arguments, timeout: float = 120.0, launcher: list[str] | None = None) -> str:
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
