"""The emulator itself: it must see what would be wrong on a card. Mutants of the kernel text, and the sanitizers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseprune import layouts, reference
from sparseprune.cuda import matmul

pytestmark = [pytest.mark.emul, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
PROBE = HERE / "emulator_probe.py"
CASES = sorted(path.stem for path in SOURCES.glob("*.cu"))

# Text that is wrong by one, or that looks at one lane too few: (file, what it says, what the mutant says).
SLIPS = [
    ("bitmap_linear.cu", "chunk < last;", "chunk < last - 1;"),
    ("bitmap_linear.cu", "* kStages * chunks;", "* (kStages - 1) * chunks;"),
    ("bitmap_linear.cu", "copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    ("bitmap_linear.cu", "if (lane >= delta) upper", "if (lane > delta) upper"),
    ("bitmap_linear.cu", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
    ("bitmap_linear.cu", "__shfl_sync(kAllLanes, lower, 31)", "__shfl_sync(kAllLanes, lower, 30)"),
    ("bitmap_linear.cu", "w < kWarps; ++w", "w < kWarps - 1; ++w"),
    ("csr_linear.cu", "at + i < begin || at + i >= end", "at + i < begin || at + i > end"),
    ("csr_linear.cu", "at + entry < begin || at + entry >= end", "at + entry >= end"),
    ("csr_linear.cu", "at < end; at += 32 * 4", "at < end - 1; at += 32 * 4"),
    ("csr_linear.cu", "i < kTileTokens && first_token + i < tokens", "first_token + i < tokens"),
    ("csr_linear.cu", "int distance = 16;", "int distance = 8;"),
    ("select.cu", "seen + own[i] >= before.remaining", "seen + own[i] > before.remaining"),
    ("select.cu", "if (lane >= delta) value", "if (lane > delta) value"),
    ("select.cu", "(1u << lane) - 1)) < found.remaining", "(1u << lane) - 1)) <= found.remaining"),
    ("select.cu", "if (other < warp) rank", "if (other <= warp) rank"),
    ("select.cu", "__ffs(static_cast<int>(same)) - 1", "__ffs(static_cast<int>(same))"),
]


def mutants():
    """(id, file, text): each meeting of threads dropped one at a time, a mask without its last lane, and the slips."""
    for path in sorted(SOURCES.glob("*.cu")):
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"__syncthreads\(\);|__syncwarp\(\);|copy_wait<[^>]*>\(\);", text):
            line = text.count("\n", 0, found.start()) + 1
            changed = text[: found.start()] + ";" + text[found.end() :]
            yield f"{path.stem}:{line} without {found.group()}", path.name, changed
        for found in list(re.finditer("kAllLanes", text))[:1]:
            yield f"{path.stem} mask", path.name, text[: found.start()] + "0x7fffffffu" + text[found.end() :]
    for name, old, new in SLIPS:
        text = (SOURCES / name).read_text(encoding="utf-8")
        if text.count(old) == 0:
            continue  # test_every_slip_is_in_the_text says so
        yield f"{Path(name).stem}: {new}", name, text.replace(old, new, 1)


MUTANTS = list(mutants())


def test_every_slip_is_in_the_text():
    for name, old, _ in SLIPS:
        assert old in (SOURCES / name).read_text(encoding="utf-8"), f"{name} no longer says {old!r}"


def uneven_weight(rows, columns, dtype):
    generator = torch.Generator().manual_seed(5)
    density = torch.rand(rows, columns // 64 + 1, generator=generator).repeat_interleave(64, 1)[:, :columns]
    w = torch.randn(rows, columns, generator=generator) / 16
    return (w * (torch.rand(rows, columns, generator=generator) < density)).to(dtype)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The probe's inputs and what must come out, in one file."""
    generator = torch.Generator().manual_seed(6)
    w = uneven_weight(20, 64 * 8 * 6 + 24, torch.float16)
    x = torch.randn(11, w.shape[1], generator=generator).half()
    csr = layouts.CSR.from_dense(w)
    strips = matmul.pack_strips(tuple(w.shape), csr.crow_indices, csr.col_indices, csr.values)
    data = {"strips_x": x, "strips_words": strips.words, "strips_starts": strips.starts, "strips_values": strips.values}
    data |= {"strips_most": torch.tensor(strips.most), "strips_expected": reference._dense_linear(x, w, None, "none")}

    w = uneven_weight(70, 331, torch.float32)
    x = torch.randn(150, 331, generator=generator)
    csr = layouts.CSR.from_dense(w)
    data |= {"csr_x": x, "csr_crow": csr.crow_indices, "csr_col": csr.col_indices, "csr_values": csr.values}
    data |= {"csr_expected": reference._dense_linear(x, w, None, "none")}

    a, b = torch.randn(9000, generator=generator), torch.randn(4500, generator=generator)
    a[::3], b[::2] = 0.5, 0.5  # enough ties that their ranks matter in every chunk
    counts = [1, 900, 5000, 8000, 13500]
    flat = torch.cat([a, b])
    masks = [torch.cat(reference.topk_mask([a, b], k)).to(torch.uint8) for k in counts]
    data |= {"select_a": a, "select_b": b, "select_k": torch.tensor(counts), "select_masks": torch.stack(masks)}
    data |= {"select_kth": torch.stack([torch.sort(flat, descending=True).values[k - 1] for k in counts])}
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in data.items()})
    return path


def probe(module: Path, inputs: Path, case: str, preload: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROBE), str(module), str(inputs), case]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **(preload or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.parametrize("case", CASES)
def test_the_text_as_it_is_survives(emulator, emulator_folder, inputs, case):
    run = probe(emulator_folder / "_cuda_emul.so", inputs, case)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name, text", [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_killed(build, emulator, emulator_folder, inputs, tmp_path, name, text):
    del emulator  # its objects stand in emulator_folder
    build(tmp_path, {name: text}, ready=emulator_folder)
    run = probe(tmp_path / "_cuda_emul.so", inputs, Path(name).stem)
    assert run.returncode != 0, "no schedule noticed the change"


def _runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(build, tmp_path_factory):
    """The module under the address and undefined-behaviour sanitizers, and what its process has to preload."""
    asan = _runtime("libasan.so")
    if not os.path.isabs(asan):
        pytest.skip("needs a compiler with libasan")
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
    build(folder, flags=flags, load=False)
    preload = {"LD_PRELOAD": f"{asan} {_runtime('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"}
    return folder / "_cuda_emul.so", flags, preload


@pytest.mark.parametrize("case", CASES)
def test_the_text_under_the_sanitizers(sanitized, inputs, case):
    module, _, preload = sanitized
    run = probe(module, inputs, case, preload)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]


OVERRUNS = [
    ("bitmap_linear.cu", "bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;", "bytes = sum_bytes;"),
    ("csr_linear.cu", "if (row >= rows) return;  //", "if (row > rows) return;  //"),
    ("select.cu", "bin < kBins; bin += kThreads) local[bin] = 0", "bin < kBins + 9; bin += kThreads) local[bin] = 0"),
]


@pytest.mark.parametrize("name, old, new", OVERRUNS, ids=[o[0] for o in OVERRUNS])
def test_the_sanitizers_see_an_overrun(build, sanitized, inputs, tmp_path, name, old, new):
    """An access past shared or global memory is reported by name: the fibers do not blind the sanitizer."""
    module, flags, preload = sanitized
    text = (SOURCES / name).read_text(encoding="utf-8")
    assert text.count(old) == 1
    build(tmp_path, {name: text.replace(old, new)}, ready=module.parent, flags=flags, load=False)
    run = probe(tmp_path / "_cuda_emul.so", inputs, Path(name).stem, preload)
    assert run.returncode != 0 and ("buffer-overflow" in run.stderr or "runtime error" in run.stderr)
