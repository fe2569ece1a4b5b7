"""The whole compiled core under AddressSanitizer and UndefinedBehaviorSanitizer, with its parallel splits.

A sanitized build of the checkout runs the tests that compare every tier with the reference: torch's buffers are then
surrounded by red zones, and a kernel that reads or writes one element too far ends the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """(environment, folder) in which ``import sparseprune`` finds the sanitized build."""
    compiler = shutil.which("g++")
    if compiler is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI is expected to have g++")
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("sanitized")
    for name in ("sparseprune", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    build = {**os.environ, "CXXFLAGS": FLAGS, "CXX": compiler, "SPARSEPRUNE_CUDA": "0", "SPARSEPRUNE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=folder, env=build, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    runtimes = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "2",
    }
    return environment, folder


def run(sanitized, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment, folder = sanitized
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_sanitizer_sees_an_overrun(sanitized):
    """Bias is read as [N_out] floats: one that is shorter is an overrun that the Python layer would have refused."""
    code = (
        "import torch; from sparseprune import layouts, native, ops; "
        "packed = ops.pack(layouts.from_dense(torch.ones(64, 64), 'csr')); "
        "native.linear.linear(torch.ones(4, 64), packed, torch.ones(3))"
    )
    result = run(sanitized, "-c", code)
    assert result.returncode != 0 and "AddressSanitizer" in result.stderr, result.stderr[-2000:]


@pytest.mark.parametrize(
    "tests",
    [
        "test_linear.py", "test_linear_masked.py", "test_selection.py", "test_selection_masking.py",
        "test_structure.py", "../ops/test_decoder.py",
    ],
)  # fmt: skip
def test_every_kernel_stays_inside_its_buffers(sanitized, tests):
    path = ROOT / "tests" / "native" / tests
    result = run(sanitized, "-m", "pytest", "-v", "-s", "-x", "-p", "no:cacheprovider", "-k", "not flat", str(path))
    assert result.returncode == 0, (result.stdout + result.stderr)[-6000:]
    assert " passed" in result.stdout
