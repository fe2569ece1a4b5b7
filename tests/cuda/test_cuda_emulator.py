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
from cuda_tensors import plain_strips

from sparseprune import layouts, reference
from sparseprune.cuda.deltas import pack_deltas
from sparseprune.cuda.structures import Csr, edges_of

pytestmark = [pytest.mark.emul, pytest.mark.slow]

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"
PROBE = HERE / "emulator_probe.py"
CASES = sorted(path.stem for path in SOURCES.glob("*.cu"))
HEADERS = {"strips.cuh": "linear_bitmap_tiles"}  # the case that shows what a header's text does

# Text that is wrong by one, or that looks at one lane too few: (file, what it says, what the mutant says).
SLIPS = [
    ("strips.cuh", "chunk < last;", "chunk < last - 1;"),
    ("linear_bitmap.cu", "* kStages * chunks;", "* (kStages - 1) * chunks;"),
    ("linear_bitmap.cu", "copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    ("strips.cuh", "if (lane >= delta) upper", "if (lane > delta) upper"),
    ("linear_bitmap.cu", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
    ("strips.cuh", "__shfl_sync(kAllLanes, lower, 31)", "__shfl_sync(kAllLanes, lower, 30)"),
    ("strips.cuh", "ranks.lower_total >> 8 * s", "ranks.upper_total >> 8 * s"),
    ("packing_bitmap.cu", "col[middle] < begin", "col[middle] <= begin"),
    ("packing_bitmap.cu", "at < run.end && col[at] < run.limit", "col[at] < run.limit"),
    ("packing_bitmap.cu", "if (row >= rows) return {0", "if (row >= rows - 1) return {0"),
    ("packing_bitmap.cu", "order != nullptr ?", "order == nullptr ?"),
    ("packing_bitmap.cu", "place += total >> 8 * s", "place += before >> 8 * s"),
    ("linear_bitmap_tiles.cu", "copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    ("linear_bitmap_tiles.cu", "turn == 0 ? kStages - 1 : turn - 1", "turn"),
    ("linear_bitmap_tiles.cu", "token < tokens && column < columns)", "token < tokens)"),
    ("linear_bitmap_tiles.cu", "mine && next < end", "mine && next < end - 1"),
    ("linear_bitmap_tiles.cu", "if (next < end) {", "if (next < end - 1) {"),
    ("linear_bitmap_tiles.cu", "split < splits; ++split", "split < splits - 1; ++split"),
    ("linear_bitmap_tiles.cu", "< across ? begin + steps_a_split", "< across ? across"),
    ("sddmm.cu", "copy_wait<kStages - 2>", "copy_wait<kStages - 1>"),
    ("sddmm.cu", "stage == 0 ? kStages - 1 : stage - 1", "stage"),
    ("sddmm.cu", "if (token + row < tokens && column < features)", "if (column < features)"),
    ("sddmm.cu", "const bool here = token + row < tokens;", "const bool here = true;"),
    ("sddmm.cu", "high = low + 4 * kPitch", "high = low + 3 * kPitch"),
    ("sddmm.cu", "16 * i + 2 * group + k / 2", "16 * i + group + 8 * (k / 2)"),
    ("sddmm.cu", "entry = edge[0] + lane; entry < end", "entry = edge[0] + lane; entry < end - 1"),
    ("sddmm.cu", "if (entry < count) {", "if (entry < count - 1) {"),
    ("sddmm.cu", ", halve<1>(sums, lane);", ";"),
    ("sddmm.cu", "end - first < 32 ? end - first : 32", "end - first < 32 ? end - first : 31"),
    ("linear_delta.cu", "i < tokens * columns;", "i < tokens * columns - 1;"),
    ("linear_delta.cu", "delta != 0 && delta != 255", "delta != 0"),
    ("linear_delta.cu", "delta == 255 ? 254 : delta", "delta"),
    ("linear_delta.cu", "int carry = -1", "int carry = 0"),
    ("linear_delta.cu", "carry += __shfl_sync(kAllLanes, upto, 31)", "carry += __shfl_sync(kAllLanes, upto, 30)"),
    ("linear_delta.cu", "if (lane >= distance) upto", "if (lane > distance) upto"),
    ("linear_delta.cu", "carry + upto - total", "carry + upto"),
    ("linear_delta.cu", "int distance = 16;", "int distance = 8;"),
    ("linear_delta.cu", "if (at < end) {", "if (at < end - kRun) {"),
    ("masking.cu", "if (first + kRun <= n)", "if (first + kRun < n + kRun)"),
    ("masking.cu", "for (int64_t i = first; i < n; ++i)", "for (int64_t i = first; i < n - 1; ++i)"),
    ("masking.cu", "first < n; first += static_cast<int64_t>(gridDim.x)", "first < n; first += 2ll * gridDim.x"),
    ("masking.cu", "int distance = 16;", "int distance = 8;"),
    ("masking.cu", "warp < kThreads / 32; ++warp", "warp < kThreads / 32 - 1; ++warp"),
    ("masking.cu", "size >= cut", "size > cut"),
    ("linear_bitmap.cu", "w < kWarps; ++w", "w < kWarps - 1; ++w"),
    ("linear_csr.cu", "at + i < begin || at + i >= end", "at + i < begin || at + i > end"),
    ("linear_csr.cu", "at + entry < begin || at + entry >= end", "at + entry >= end"),
    ("linear_csr.cu", "at < end; at += 32 * 4", "at < end - 1; at += 32 * 4"),
    ("linear_csr.cu", "i < kTileTokens && first_token + i < tokens", "first_token + i < tokens"),
    ("linear_csr.cu", "int distance = 16;", "int distance = 8;"),
    ("selection.cu", "seen + own[i] >= before.remaining", "seen + own[i] > before.remaining"),
    ("selection.cu", "tensors.first_chunk[middle] <= chunk", "tensors.first_chunk[middle] < chunk"),
    ("selection.cu", "counts[tensors.chunks_before + blockIdx.x] = total", "counts[blockIdx.x] = total"),
    ("selection.cu", "- tensors.first_chunk[low]) * kSelectChunk", ") * kSelectChunk"),
    ("selection.cu", "if (lane >= delta) value", "if (lane > delta) value"),
    ("selection.cu", "(1u << lane) - 1)) < found.remaining", "(1u << lane) - 1)) <= found.remaining"),
    ("selection.cu", "if (other < warp) rank", "if (other <= warp) rank"),
    ("selection.cu", "__ffs(static_cast<int>(same)) - 1", "__ffs(static_cast<int>(same))"),
]


def mutants():
    """(id, file, text): each meeting of threads dropped one at a time, a mask without its last lane, and the slips."""
    for path in sorted([*SOURCES.glob("*.cu"), *(SOURCES / name for name in HEADERS)]):
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
    x = torch.randn(37, w.shape[1], generator=generator).half()
    csr = layouts.CSR.from_dense(w)
    words, starts, values = plain_strips(tuple(w.shape), csr.crow_indices, csr.col_indices, csr.values)
    signed = torch.where(words >> 31 > 0, words - (1 << 32), words).to(torch.int32)
    data = {"strips_x": x, "strips_words": signed, "strips_starts": starts, "strips_values": values}
    data |= {"strips_crow": csr.crow_indices, "strips_col": csr.col_indices, "strips_csr_values": csr.values}
    data |= {"strips_most": (starts[1:] - starts[:-1]).max()}
    data |= {"strips_expected": reference.dense_linear(x, w, None, "none")}

    w = uneven_weight(70, 331, torch.float32)
    x = torch.randn(150, 331, generator=generator)
    csr = layouts.CSR.from_dense(w)
    data |= {"csr_x": x, "csr_crow": csr.crow_indices, "csr_col": csr.col_indices, "csr_values": csr.values}
    data |= {"csr_expected": reference.dense_linear(x, w, None, "none")}

    for name, rows, columns in (("odd", 70, 131), ("even", 72, 136)):
        csr = layouts.CSR.from_dense(uneven_weight(rows, columns, torch.float16))
        x, dy = (torch.randn(100, width, generator=generator).half() for width in (columns, rows))
        parts = csr.crow_indices, csr.col_indices
        found = {"x": x, "dy": dy, "crow": parts[0], "col": parts[1], "edges": edges_of(*parts, columns, 64)}
        found |= {"expected": reference.sddmm(x, dy, *parts, 1, 1).flatten()}
        found |= {"few": reference.sddmm(x[:31], dy[:31], *parts, 1, 1).flatten()}
        data |= {f"sddmm_{name}_{part}": tensor for part, tensor in found.items()}

    w = uneven_weight(20, 3400, torch.float32)
    w[3], w[:, 300:1200] = 0, 0  # an empty row, and gaps wider than one step
    x = torch.randn(7, w.shape[1], generator=generator)
    csr = layouts.CSR.from_dense(w)
    deltas = pack_deltas(Csr(csr.crow_indices, csr.col_indices), w.shape[1])
    bursting = x.clone()
    bursting[:, 300:1200] = torch.inf  # where no entry is: neither a step nor the padding may read it
    data |= {"delta_x": bursting, "delta_starts": deltas.starts, "delta_deltas": deltas.deltas}
    data |= {"delta_values": deltas.filled(csr.values, torch.float32)}
    data |= {"delta_expected": reference.dense_linear(x, w, None, "none")}

    w = torch.randn(4099, generator=generator)
    w[::5] = 0.5
    data |= {"mask_w": w, "mask_mask": (torch.rand(4099, generator=generator) < 0.4).to(torch.uint8)}

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
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize("case", CASES)
def test_the_text_as_it_is_survives(emulator, emulator_folder, inputs, case):
    run = probe(emulator_folder / "_cuda_emul.so", inputs, case)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name, text", [m[1:] for m in MUTANTS], ids=[m[0] for m in MUTANTS])
def test_a_mutant_is_killed(build, emulator, emulator_folder, inputs, tmp_path, name, text):
    del emulator  # its objects stand in emulator_folder
    build(tmp_path, {name: text}, ready=emulator_folder)
    run = probe(tmp_path / "_cuda_emul.so", inputs, HEADERS.get(name, Path(name).stem))
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
    ("linear_bitmap.cu", "bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;", "bytes = sum_bytes;"),
    ("linear_bitmap_tiles.cu", "bytes = ring_bytes > sum_bytes ? ring_bytes : sum_bytes;", "bytes = sum_bytes / 2;"),
    ("packing_bitmap.cu", "at < run.end && col[at] < run.limit", "col[at] < run.limit"),
    ("sddmm.cu", "local < kTile && first_row + local < rows", "local < kTile"),
    ("masking.cu", "uint32_t[2][kThreads / 32], scratch", "uint32_t[1][kThreads / 32], scratch"),
    ("linear_delta.cu", "i < tokens * columns;", "i < tokens * columns + 1;"),
    ("linear_csr.cu", "if (row >= rows) return;  //", "if (row > rows) return;  //"),
    ("selection.cu", "bin < kBins; bin += kThreads) local[bin]", "bin < kBins + 9; bin += kThreads) local[bin]"),
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
