"""The neon tier, compiled by a cross compiler and run by an emulator of the CPU: the fuzzer of the kernels, and
recorded calls whose results the reference has given. Its speed is not shown by this.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseprune import _native, layouts, ops, reference
from sparseprune.activations import ACTIVATIONS
from sparseprune.packing import VALUE_CODES, VALUE_DTYPES, Packed

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "native"
TIERS = [ROOT / "csrc" / "cpu" / "tiers" / f"{name}.cpp" for name in ("generic", "neon")]
FLAGS = ["-std=c++17", "-O2", "-w", "-static", "-fno-math-errno", "-ffp-contract=fast", f"-I{ROOT / 'csrc'}"]
ALLOWED = "3e-5"
LINEAR, SDDMM, ROUNDED, RMS_NORM = range(4)  # replay.cpp

pytestmark = [pytest.mark.slow, pytest.mark.skipif(_native.C is None, reason="needs the compiled core to pack")]


@functools.cache
def build(compiler: str, folder: Path) -> dict[str, Path]:
    """The two programs, each with both tiers of an ARM CPU."""
    sources = [*TIERS, HERE / "sanitize" / "kernels_fuzz.cpp", HERE / "replay" / "replay.cpp"]

    def compiled(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *FLAGS, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        generic, neon, *mains = pool.map(compiled, sources)
    found = {Path(main).stem: folder / Path(main).stem for main in mains}
    for main in mains:
        subprocess.run([compiler, *FLAGS, generic, neon, main, "-o", str(found[Path(main).stem])], check=True)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("aarch64")


@pytest.fixture
def on_arm(folder, need_tool):
    """Runs one of the two programs as an ARM CPU would."""
    emulator = need_tool("qemu-aarch64")
    built = build(need_tool("aarch64-linux-gnu-g++"), folder)

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([emulator, str(built[name]), *arguments], capture_output=True, text=True, timeout=900)

    return run


def call(op: int, numbers: list[int], *buffers: Tensor | None) -> bytes:
    """One call as replay.cpp reads it; the last buffer is the result."""
    parts = [struct.pack(f"<{3 + len(numbers)}q", op, len(numbers), len(buffers), *numbers)]
    for tensor in buffers:
        raw = b"" if tensor is None else tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
        parts += [struct.pack("<q", len(raw)), raw]
    return b"".join(parts)


def weights():
    generator = torch.Generator().manual_seed(3)
    for rows, columns, block, density in (
        (40, 130, (1, 1), 0.5), (33, 17, (1, 1), 1.0), (70, 300, (1, 1), 0.1), (1, 515, (1, 1), 0.7),
        (36, 90, (4, 1), 0.3), (34, 50, (2, 2), 0.3), (80, 77, (16, 1), 0.3), (72, 200, (8, 1), 0.2),
        (16, 8, (1, 1), 0.0),
    ):  # fmt: skip
        r, c = block
        kept = torch.rand(rows // r, 1, columns // c, 1, generator=generator) < density
        w = (torch.randn(rows // r, r, columns // c, c, generator=generator) * kept).reshape(rows, columns)
        yield layouts.CSR.from_dense(w) if block == (1, 1) else layouts.BSR.from_dense(w, block)


def plan_of(packed: Packed, tokens: int, activation: int = 0) -> list[int]:
    return [*packed.plan, VALUE_CODES[packed.values.dtype], tokens, activation]


def linear_calls():
    generator = torch.Generator().manual_seed(5)
    for i, layout in enumerate(weights()):
        for tuned in (1, 8, 128):
            for values, activations in (*((v, "float32") for v in VALUE_DTYPES), ("int8", "int8")):
                if activations == "int8" and layout.shape[1] % 4:
                    continue
                packed = ops.pack(layout, tokens=tuned, value_dtype=values, activations=activations)
                rows, columns = packed.shape
                for n in (1, 2, 7, 8, 33, 70):
                    name = list(ACTIVATIONS)[(i + n) % len(ACTIVATIONS)]
                    x = torch.randn(n, columns, generator=generator)
                    bias = torch.randn(rows, generator=generator) if n % 2 else None
                    residual = torch.randn(n, rows, generator=generator) if n % 3 else None
                    y = reference.packed_linear(
                        x, packed.values, packed.index, packed.offsets, packed.scale, bias, residual, packed.plan, name
                    )
                    yield call(
                        LINEAR, plan_of(packed, n, list(ACTIVATIONS).index(name)), packed.values, packed.index,
                        packed.offsets, packed.scale, bias, residual, x, y,
                    )  # fmt: skip


def other_calls():
    generator = torch.Generator().manual_seed(7)
    for layout in weights():
        packed = ops.pack(layout, tokens=128)
        rows, columns = packed.shape
        x, dy = (torch.randn(19, width, generator=generator) for width in (columns, rows))
        canonical = torch.ops.sparseprune.packed_sddmm(
            x, dy, packed.index, packed.offsets, packed.perm, packed.plan, packed.n_values
        )
        flat = torch.cat([canonical, torch.zeros(1)])[packed.perm.long()]  # -1: the slack
        used = packed.n_values
        yield call(SDDMM, plan_of(packed, 19), packed.values, packed.index, packed.offsets, x, dy, flat[:used])
        w = layout.to_dense().bfloat16()
        bias = torch.randn(rows, generator=generator)
        yield call(ROUNDED, [rows, columns, 19], w, bias, x, reference.rounded_linear(x, w, bias))
        gain = torch.rand(columns, generator=generator)
        yield call(RMS_NORM, [19, columns], gain, x, reference.rms_norm(x, gain, 1e-6))


def test_recorded_calls(on_arm, tmp_path):
    calls = [*linear_calls(), *other_calls()]
    file = tmp_path / "calls"
    file.write_bytes(b"".join(calls))
    run = on_arm("replay", str(file), ALLOWED)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(calls)} calls on: generic neon" in run.stdout


def test_a_wrong_result_is_seen(on_arm, tmp_path):
    layout = next(weights())
    packed = ops.pack(layout, tokens=128)
    x = torch.randn(3, packed.shape[1])
    y = x @ layout.to_dense().T
    y[2, -1] += 0.001
    file = tmp_path / "calls"
    file.write_bytes(
        call(LINEAR, plan_of(packed, 3), packed.values, packed.index, packed.offsets, None, None, None, x, y)
    )
    run = on_arm("replay", str(file), ALLOWED)
    assert run.returncode == 1 and f"place {y.numel() - 1} is" in run.stdout


def test_fuzz(on_arm):
    run = on_arm("kernels_fuzz", "10", "1")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rounds on: generic neon" in run.stdout
