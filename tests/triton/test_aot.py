"""Every Triton kernel compiled for four GPUs that are not here, with stated limits on what the compiler may spend.

The compiler runs in a process of its own, without TRITON_INTERPRET and with an empty cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sparseprune.triton
from sparseprune.triton import aot

KIB = 1024
#: Bytes of shared memory a program may take. 99 KiB: what every NVIDIA card of capability 8.0 and newer has.
SHARED = {"sm_80": 99 * KIB, "sm_90": 99 * KIB, "sm_100": 99 * KIB, "gfx942": 64 * KIB}
#: Registers a thread may take: kernel -> limit. 256 threads with 255 registers still fit one multiprocessor.
REGISTERS = {
    "apply_mask_kernel": 64,
    "masked_copy_kernel": 64,
    "threshold_mask_kernel": 64,
    "mask_gradient_kernel": 64,
    "masked_adamw_kernel": 96,
    "radix_histogram_kernel": 192,
    "radix_select_kernel": 160,
    "key_value_kernel": 32,
    "count_ties_kernel": 64,
    "cut_mask_kernel": 96,
    "nm_mask_kernel": 96,
    "block_scores_kernel": 64,
    "masked_linear_kernel": 248,
    "masked_weight_gradient_kernel": 248,
    "bsr_linear_kernel": 248,
    "bsr_sddmm_kernel": 248,
}
#: The instruction that the products must use: target -> pattern, for tiles of 64 outputs and more.
LARGE_TILES = {"sm_80": r"mma\.sync", "sm_90": r"wgmma", "sm_100": r"mma", "gfx942": r"v_mfma"}

pytestmark = pytest.mark.aot
everywhere = pytest.mark.parametrize("target", list(aot.TARGETS))
_built: dict[str, list[dict]] = {}


@pytest.fixture
def built(target, need_package, tmp_path):
    """What the compiler made of every spec for this target: ``aot.Built`` as dicts, compiled once a session."""
    need_package("triton")
    if target not in _built:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
        command = [sys.executable, "-P", "-m", "sparseprune.triton.aot", "--target", target, "--json"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
        rows = [json.loads(line) for line in run.stdout.splitlines()]
        done = rows[-1]["name"] if rows else "nothing"
        assert run.returncode == 0, f"{target}: compiled up to {done}, then\n{run.stderr[-4000:]}"
        _built[target] = rows
    return _built[target]


@pytest.mark.slow
@everywhere
def test_every_spec_compiles_without_a_spill(target, built):
    assert [row["name"] for row in built] == [spec.name for spec in aot.specs()]
    spilled = {row["name"]: row["spilled"] for row in built if row["spilled"]}
    assert not spilled, f"{target}: bytes spilled a thread: {spilled}"


@pytest.mark.slow
@everywhere
def test_registers_and_shared_memory_stay_within_their_budgets(target, built):
    over = {}
    for row in built:
        limit = REGISTERS[row["name"].split("[")[0]]
        if row["registers"] > limit or row["shared"] > SHARED[target]:
            over[row["name"]] = (row["registers"], limit, row["shared"], SHARED[target])
    assert not over, f"{target}: (registers, limit, shared bytes, limit): {over}"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_blocks_are_loaded_ahead(target, built):
    """bsr_linear has several buffers of a step, for a few tokens three: with one, a copy is waited for as soon as it is
    begun.
    """
    checked = 0
    for spec in aot.specs():
        if spec.kernel != "bsr_linear_kernel" or spec.types["x"] != "*fp16" or spec.constants["TRANSPOSED"]:
            continue
        constants, step = spec.constants, spec.constants["BLOCK_R"] * 2
        (row,) = [row for row in built if row["name"] == spec.name]
        least = 3 if constants["BLOCK_M"] == 16 else 2
        assert row["shared"] >= least * step * (constants["ROWS"] + constants["BLOCK_M"]), row
        checked += 1
    assert checked


@pytest.mark.slow
@everywhere
def test_products_use_the_matrix_instruction(target, built):
    wanted = {spec.name: spec for spec in aot.specs() if spec.matrix}
    if target == "gfx942":  # where float32 has matrix instructions of its own
        wanted |= {spec.name: spec for spec in aot.specs() if "PRECISION" in spec.constants}
        wanted = {name: spec for name, spec in wanted.items() if "tf32" not in name}
    rows = {row["name"]: row for row in built}
    without = [name for name in wanted if not rows[name]["matrix"]]
    assert not without, f"{target}: no matrix instruction in {without}"
    for name, spec in wanted.items():
        if spec.constants.get("BLOCK_O", spec.constants.get("BLOCK_N", 0)) >= 64:
            assert re.search(LARGE_TILES[target], " ".join(rows[name]["matrix"])), (name, rows[name]["matrix"])


def test_the_specs_name_every_kernel_and_every_configuration():
    kernels = set()
    for path in (Path(sparseprune.triton.__file__).parent / "kernels").glob("*.py"):
        kernels |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    specs = aot.specs(everything=True)
    assert {spec.kernel for spec in specs} == kernels == set(REGISTERS)
    assert len({spec.name for spec in specs}) == len(specs)
    few = {spec.name for spec in aot.specs()}
    assert few <= {spec.name for spec in specs}


@pytest.mark.slow
def test_the_interpreter_does_not_stand_in_for_the_compiler(need_package):
    need_package("triton")
    command = [sys.executable, "-P", "-m", "sparseprune.triton.aot", "--target", "sm_80", "--only", "key_value"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode != 0 and "TRITON_INTERPRET" in run.stderr
