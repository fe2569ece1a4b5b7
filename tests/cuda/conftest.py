"""The CUDA kernels as tests see them: the .cu text under the emulator, or the built module on a card.

The folder is put on the path, so that its tests can share ``cuda_tensors``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
CSRC = Path(__file__).resolve().parents[2] / "csrc"


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, f"{shlex.join(command)}\n{run.stderr}"


def build_emulator(
    folder: Path,
    replaced: dict[str, str] | None = None,
    ready: Path | None = None,
    flags: Sequence[str] = (),
    load: bool = True,
):
    """Compiles csrc/cuda against the emulator and loads it. replaced: file name -> text compiled in that file's place;
    ready: a folder whose objects serve for all other files; flags: more for the compiler; load: False only compiles.
    """
    import pybind11

    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    includes = [CSRC / "cuda", CSRC, pybind11.get_include(), sysconfig.get_path("include")]
    options = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas", *flags]
    options += [f"-I{path}" for path in includes]
    objects, commands = [], []
    replaced = dict(replaced or {})
    headers = [name for name in replaced if name.endswith(".cuh")]
    for name in headers:
        (folder / name).write_text(replaced[name], encoding="utf-8")
    for source in [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "cuda" / "bindings.cpp"]:
        text = source.read_text(encoding="utf-8")
        if source.name not in replaced and any(f'#include "{name}"' in text for name in headers):
            replaced[source.name] = text  # compiled beside the header, which is then the one it finds
        text = replaced.get(source.name)
        if text is None and ready is not None:
            objects.append(ready / (source.name + ".o"))
            continue
        if text is not None:
            source = folder / source.name
            source.write_text(text, encoding="utf-8")
        objects.append(folder / (source.name + ".o"))
        commands.append([compiler, *options, "-x", "c++", "-c", str(source), "-o", str(objects[-1])])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    library = folder / "_cuda_emul.so"
    _run([compiler, "-shared", *flags, *map(str, objects), "-o", str(library)])
    if not load:
        return None
    loader = importlib.machinery.ExtensionFileLoader("_cuda_emul", str(library))
    spec = importlib.util.spec_from_file_location("_cuda_emul", library, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulator_folder(tmp_path_factory, request):
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI is expected to have a C++ compiler")
        pytest.skip("needs a C++20 compiler")
    return tmp_path_factory.mktemp("emulator")


@pytest.fixture(scope="session")
def emulator(emulator_folder):
    """The kernels under the emulator; its objects stay in emulator_folder."""
    return build_emulator(emulator_folder)


def _why_no_gpu() -> str | None:
    import torch

    from sparseprune import _native

    if not torch.cuda.is_available():
        return "no CUDA device that torch can see"
    if _native.CUDA is None:
        return _native.why_no_cuda()
    return None


@pytest.fixture(
    params=[
        *(pytest.param(seed, id=f"emul-{seed}", marks=pytest.mark.emul) for seed in range(3)),
        pytest.param("gpu", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request, monkeypatch):
    """Where the kernels run: "cpu" under one of the emulator's schedules, or "cuda"."""
    from sparseprune import _native

    if request.param == "gpu":
        reason = _why_no_gpu()
        if reason is not None:
            pytest.skip(reason)
        return "cuda"
    emulator = request.getfixturevalue("emulator")
    emulator.use_schedule(request.param)
    monkeypatch.setattr(_native, "CUDA", emulator)
    return "cpu"


@pytest.fixture(scope="session")
def build():
    """:func:`build_emulator`, for tests that compile changed text."""
    return build_emulator
