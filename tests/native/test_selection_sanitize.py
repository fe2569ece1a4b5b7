"""The selection, masking, AdamW, LayerNorm and int8 kernels under AddressSanitizer and UndefinedBehaviorSanitizer,
fuzzed for a bounded time in every tier that this CPU runs, and in the 16-lane text under AVX2 flags.
"""

from __future__ import annotations

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "native" / "sanitize"
TIERS = ROOT / "csrc" / "cpu" / "tiers"
FLAGS = ["-std=c++17", "-O1", "-g", "-w", "-Wno-psabi", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt", "-mlzcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


@pytest.mark.slow
def test_fuzz_under_the_sanitizers(tmp_path, need_tool):
    compiler = need_tool("g++")
    sources = {HERE / "kernels_fuzz.cpp": [], TIERS / "generic.cpp": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources |= {TIERS / "avx2.cpp": AVX2, HERE / "avx2x16.cpp": AVX2, TIERS / "avx512.cpp": AVX512}
        sources |= {TIERS / "avx512vnni.cpp": [*AVX512, "-mavx512vnni"]}

    def build(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.o"
        command = [compiler, *FLAGS, *sources[source], f"-I{ROOT / 'csrc'}", "-c", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = [str(target) for target in pool.map(build, sources)]
    program = tmp_path / "kernels_fuzz"
    linked = subprocess.run([compiler, *FLAGS, *objects, "-o", str(program)], capture_output=True, text=True)
    assert linked.returncode == 0, linked.stderr
    seconds = os.environ.get("SPARSEPRUNE_FUZZ_SECONDS", "10")
    run = subprocess.run([str(program), seconds, "1"], capture_output=True, text=True, timeout=float(seconds) + 600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rounds on: generic" in run.stdout
