"""nvcc builds the CUDA kernels for every card we name: no spills, few registers, tensor cores; loads without driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.nvcc, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
CARDS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
MOST_REGISTERS = 64  # of 65536: four blocks of 256 threads stay on a multiprocessor
MORE_REGISTERS = {
    "bitmap_tiles_kernel": 128,  # two blocks: the sums of 16 rows x 64 tokens stay in a warp's registers
    "sddmm_tiles_kernel": 128,  # four blocks of 128 threads
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the module, and what nvcc's assembler said of every kernel."""
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda")
    if not any(home and Path(home, "bin", "nvcc").exists() for home in homes):
        if os.environ.get("CI") == "true":
            pytest.fail("CI is expected to have nvcc, below CUDA_HOME or /usr/local/cuda")
        pytest.skip("needs nvcc, below CUDA_HOME or /usr/local/cuda")
    folder = tmp_path_factory.mktemp("cuda")
    environment = {
        **os.environ,
        "SPARSEPRUNE_CUDA": "1",
        "SPARSEPRUNE_NATIVE": "0",
        "SPARSEPRUNE_CUDA_ARCH": "80;90a;100a;120;90+PTX",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
    }
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    command += ["--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    (module,) = (folder / "lib" / "sparseprune").glob("_cuda*.so")
    return module, run.stdout + run.stderr


@pytest.fixture(scope="module")
def cuobjdump():
    """cuobjdump, which CUDA's compiler package leaves out and Triton brings."""
    places = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    except ImportError:
        pass  # then CUDA's own has to be there
    found = next((place for place in places if place.exists()), None)
    if found is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI is expected to have cuobjdump, from CUDA or from Triton")
        pytest.skip("needs cuobjdump, from CUDA or from Triton")
    return str(found)


def listing(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_every_card_has_its_code(built, cuobjdump):
    cards = set(re.findall(r"\.(sm_\d+a?)\.cubin", listing(cuobjdump, "--list-elf", str(built[0]))))
    assert cards == set(CARDS)
    assert "sm_90.ptx" in listing(cuobjdump, "--list-ptx", str(built[0]))


def test_nothing_spills(built):
    report = built[1]
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", report)
    assert len(spills) == len(kernels) and {card for _, card in kernels} == set(CARDS)
    spilling = [kernel for kernel, numbers in zip(kernels, spills) if any(map(int, numbers))]
    assert not spilling


def test_registers_leave_room_for_four_blocks(built):
    used = re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", built[1], re.S)
    assert used
    for kernel, number in used:
        most = next((most for name, most in MORE_REGISTERS.items() if name in kernel), MOST_REGISTERS)
        assert int(number) <= most, kernel


@pytest.mark.parametrize("card", CARDS)
def test_products_run_on_tensor_cores(built, cuobjdump, card):
    """The matrix instruction and asynchronous copies are in the machine code, a population count is not."""
    sass = listing(cuobjdump, "-sass", "-arch", card, str(built[0]))
    bodies = dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", sass, re.S))
    kernels = {name: body for name, body in bodies.items() if "bitmap_linear_kernel" in name}
    kernels |= {name: body for name, body in bodies.items() if "bitmap_tiles_kernel" in name}
    kernels |= {name: body for name, body in bodies.items() if "sddmm_tiles_kernel" in name}
    assert len(kernels) == 8 + 8 + 4
    for name, body in kernels.items():
        assert re.search(r"HMMA\.16816\.F32(\.BF16)? ", body), name
        assert ("HMMA.16816.F32.BF16" in body) == ("Bfloat" in name), name
        assert "POPC" not in body, name
        # A row that is not aligned to 16 bytes is loaded by halves; the strips themselves always are.
        assert "LDGSTS" in body or ("sddmm_tiles_kernelI" in name and "ELb0E" in name), name


def test_it_loads_without_a_driver(built):
    """The module imports, says what is missing, and a launch raises instead of crashing."""
    program = f"""
import importlib.machinery, importlib.util
loader = importlib.machinery.ExtensionFileLoader("_cuda", {str(built[0])!r})
spec = importlib.util.spec_from_file_location("_cuda", {str(built[0])!r}, loader=loader)
cuda = importlib.util.module_from_spec(spec)
loader.exec_module(cuda)
print(repr(cuda.why_no_device()))
try:
    cuda.select_scan(0, 1, 0)
    print("launched")
except RuntimeError as error:
    print(error)
"""
    reason, launch = listing(sys.executable, "-P", "-c", program).splitlines()
    if reason == "''":
        pytest.skip("there is a driver and a card here: nothing to say about their absence")
    assert reason in ("'no driver'", "'no device'")
    assert launch.startswith("sparseprune._cuda: ")
