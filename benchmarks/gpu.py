"""``python benchmarks/gpu.py``: shows on a real card what no other test can: that the GPU kernels are right and fast.

For a machine with an NVIDIA card, CUDA, this checkout and no network: builds sparseprune._cuda for the card, runs the
tests marked ``gpu``, then times every CUDA and Triton kernel against its dense and library baselines (cuBLAS, cuSPARSE,
2:4 through torch) on BERT and Llama shapes, each result checked before it is timed. Writes
``benchmarks/results/gpu-NAME.json`` and prints a table; takes at most ten minutes, and says what it left out.

A time is the median of single calls, replayed from a CUDA graph where one can be recorded, each after the L2 cache was
overwritten, as a layer of a large model finds it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
BERT = [(768, 768), (3072, 768), (768, 3072)]
LLAMA = [(4096, 4096), (11008, 4096), (4096, 11008)]
FLUSH_BYTES = 256 << 20  # more than any L2
ROUNDS = 30


@dataclass
class Case:
    """One table row: contestants by name, the first of them the dense baseline; ``prepare`` makes them on the card."""

    op: str
    setting: str
    prepare: Callable[[], tuple[dict[str, Callable[[], Any]], Any, float]]  # contestants, expected, tolerance
    unchecked: tuple[str, ...] = ()  # contestants that do not promise the same result


@dataclass
class Row:
    op: str
    setting: str
    microseconds: dict[str, float] = field(default_factory=dict)
    quartiles: dict[str, tuple[float, float]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def ours(op: str, *args: Any) -> dict[str, Callable[[], Any]]:
    """Every CUDA and Triton kernel of this op that can run on these arguments."""
    from sparseprune._registry import kernels_of

    found = {}
    for kernel in kernels_of(op):
        if kernel.backend in ("cuda", "triton") and not kernel.why_not(*args):
            found[kernel.backend] = lambda run=kernel.run: run(*args)
    return found


def pruned(rows: int, columns: int, sparsity: float, dtype: torch.dtype, block: int = 1) -> torch.Tensor:
    kept = torch.rand(rows // block, columns // block, device="cuda") >= sparsity
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return (torch.randn(rows, columns, device="cuda") * kept / (columns * (1 - sparsity)) ** 0.5).to(dtype)


def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x.float(), w.float())


def unstructured(rows: int, columns: int, tokens: int, sparsity: float, dtype: torch.dtype) -> Case:
    def prepare() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        from sparseprune.cuda import matmul
        from sparseprune.layouts import CSR

        w, x = pruned(rows, columns, sparsity, dtype), torch.randn(tokens, columns, device="cuda", dtype=dtype)
        csr = CSR.from_dense(w)
        parts = csr.crow_indices, csr.col_indices, csr.values
        library = torch.sparse_csr_tensor(*parts, size=(rows, columns))
        found: dict[str, Callable[[], Any]] = {
            "dense": lambda: F.linear(x, w),
            "cusparse": lambda: (library @ x.t()).t(),
            "cuda csr": lambda: matmul.csr_as_it_is(x, *parts, None, "none"),
        }
        if dtype != torch.float32 and tokens <= matmul.STRIP_TOKENS:
            strips = matmul.pack_strips((rows, columns), *parts)
            found["cuda strips"] = lambda: matmul.strips_linear(x, strips)
        return found, exact(x, w), tolerance(dtype)

    return Case("csr_linear", f"{rows}x{columns} N={tokens} {sparsity:.0%} {name_of(dtype)}", prepare)


def two_of_four(rows: int, columns: int, tokens: int) -> Case:
    def prepare() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        from sparseprune.layouts import NM
        from sparseprune.reference import nm_mask

        w = torch.randn(rows, columns, device="cuda") / columns**0.5
        w = (w * nm_mask(w.abs(), 2, 4)).half()
        x = torch.randn(tokens, columns, device="cuda").half()
        nm = NM.from_dense(w, 2, 4)
        return (
            {"dense": lambda: F.linear(x, w), **ours("nm_linear", x, nm.values, nm.indices, 2, 4, None, "none")},
            exact(x, w),
            tolerance(torch.float16),
        )

    return Case("nm_linear", f"{rows}x{columns} N={tokens} 2:4 float16", prepare)


def blocks(rows: int, columns: int, tokens: int, sparsity: float, side: int) -> Case:
    def prepare() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        from sparseprune.layouts import BSR

        w = pruned(rows, columns, sparsity, torch.float16, side)
        x = torch.randn(tokens, columns, device="cuda").half()
        bsr = BSR.from_dense(w, (side, side))
        parts = bsr.crow_indices, bsr.col_indices, bsr.values
        library = torch.sparse_bsr_tensor(*parts, size=(rows, columns))
        found = {"dense": lambda: F.linear(x, w), "torch bsr": lambda: F.linear(x, library)}
        return {**found, **ours("bsr_linear", x, *parts, None, "none")}, exact(x, w), tolerance(torch.float16)

    return Case("bsr_linear", f"{rows}x{columns} N={tokens} {sparsity:.0%} {side}x{side} float16", prepare)


def masked(rows: int, columns: int, tokens: int) -> Case:
    def prepare() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        w, x = pruned(rows, columns, 0.0, torch.float16), torch.randn(tokens, columns, device="cuda").half()
        mask = torch.rand(rows, columns, device="cuda") < 0.1
        found = {"dense": lambda: F.linear(x, w * mask), **ours("masked_linear", x, w, mask, None)}
        return found, exact(x, w * mask), tolerance(torch.float16)

    return Case("masked_linear", f"{rows}x{columns} N={tokens} float16", prepare)


def selection(n: int, dtype: torch.dtype) -> Iterator[Case]:
    k = n // 10

    def prepare_kth() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        x = torch.randn(n, device="cuda").to(dtype)
        sort = lambda: torch.sort(x.abs(), descending=True).values[k - 1]  # noqa: E731
        return {"dense": sort, **ours("kth_magnitude", [x], k)}, sort(), 0.0

    def prepare_mask() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        x = torch.randn(n, device="cuda").to(dtype)

        def topk() -> torch.Tensor:
            return torch.zeros(n, dtype=torch.bool, device="cuda").scatter_(0, torch.topk(x, k).indices, True)

        stable = torch.sort(x, descending=True, stable=True).indices[:k]
        expected = torch.zeros(n, dtype=torch.bool, device="cuda").scatter_(0, stable, True)
        found = {"dense": topk, **{name: lambda run=run: run()[0] for name, run in ours("topk_mask", [x], k).items()}}
        return found, expected, 0.0

    yield Case("kth_magnitude", f"n={n:,} {name_of(dtype)} (against torch.sort)", prepare_kth)
    yield Case("topk_mask", f"n={n:,} {name_of(dtype)} (against torch.topk)", prepare_mask, ("dense",))


def one_pass(n: int) -> Iterator[Case]:
    def prepare_mask() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        w, mask = torch.randn(n, device="cuda"), torch.rand(n, device="cuda") < 0.1
        expected = w * mask

        def after(run: Callable[[], Any]) -> Callable[[], torch.Tensor]:
            return lambda: (run(), w)[1]

        found = {"dense": lambda: w.mul_(mask), **{k: after(r) for k, r in ours("apply_mask_", w, mask).items()}}
        return found, expected, 0.0

    def prepare_threshold() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        w, threshold = torch.randn(n, device="cuda"), torch.tensor(1.6, device="cuda")

        def plain() -> torch.Tensor:
            mask = w.abs() >= threshold
            return torch.stack([(w * mask).sum(), mask.sum().float()])[1]

        fused = ours("threshold_mask", w, threshold)
        found = {"dense": plain, **{name: lambda run=run: run()[2].float() for name, run in fused.items()}}
        return found, plain(), 0.0

    def prepare_adamw() -> tuple[dict[str, Callable[[], Any]], Any, float]:
        grad, mask = torch.randn(n, device="cuda"), torch.rand(n, device="cuda") < 0.1
        p, first, second = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
        weight = torch.nn.Parameter(torch.zeros(n, device="cuda"))
        weight.grad = grad.clone()
        adamw = torch.optim.AdamW([weight], lr=1e-3, fused=True)

        def plain() -> None:
            weight.grad.mul_(mask)
            adamw.step()
            weight.data.mul_(mask)

        step = ours("masked_adamw_", p, grad, first, second, mask, 1, 1e-3, 0.9, 0.999, 1e-8, 0.01)
        return {"dense": plain, **step}, None, 0.0

    yield Case("apply_mask_", f"n={n:,} float32", prepare_mask)
    yield Case("threshold_mask", f"n={n:,} float32", prepare_threshold)
    yield Case("masked_adamw_", f"n={n:,} float32 (right by the gpu tests)", prepare_adamw)


def cases() -> Iterator[Case]:
    """The most telling first: what the time does not reach is left out."""
    half = torch.float16
    for rows, columns in [LLAMA[1], LLAMA[0], BERT[1]]:
        for sparsity in (0.5, 0.7, 0.9, 0.95):
            for tokens in (1, 16):
                yield unstructured(rows, columns, tokens, sparsity, half)
    yield from selection(100_000_000, torch.float32)
    yield from selection(10_000_000, half)
    for shape in (LLAMA[1], BERT[1]):
        yield from (two_of_four(*shape, tokens) for tokens in (16, 512, 4096))
        for side, sparsity in ((64, 0.5), (64, 0.75), (32, 0.75), (32, 0.9), (16, 0.9)):
            yield from (blocks(*shape, tokens, sparsity, side) for tokens in (16, 512, 4096))
        yield from (masked(*shape, tokens) for tokens in (16, 512))
    yield from one_pass(50_000_000)
    for rows, columns in (LLAMA[0], BERT[1]):
        for dtype in (torch.float32, half, torch.bfloat16):
            for tokens, sparsity in ((1, 0.9), (8, 0.95), (128, 0.95), (128, 0.99)):
                yield unstructured(rows, columns, tokens, sparsity, dtype)
    for rows, columns in (LLAMA[2], BERT[0], BERT[2]):
        yield from (unstructured(rows, columns, 1, sparsity, half) for sparsity in (0.25, 0.5, 0.75, 0.9))


def tolerance(dtype: torch.dtype) -> float:
    """Relative to the largest expected magnitude: sums of thousands of products, in another order."""
    return 1e-4 if dtype == torch.float32 else 2e-2 if dtype == torch.bfloat16 else 4e-3


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wrong(got: Any, expected: Any, allowed: float) -> str | None:
    if expected is None:
        return None
    if expected.dtype == torch.bool or allowed == 0.0:
        return None if torch.equal(got, expected) else "wrong result"
    worst = float((got.float() - expected).abs().max() / expected.abs().max())
    return None if worst <= allowed else f"wrong result: off by {worst:.1e} of the largest value"


def recorded(run: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
    """The call replayed from a CUDA graph, or as it is with the reason why not."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay, ""
    except (RuntimeError, ValueError, AssertionError) as error:
        torch.cuda.synchronize()
        return run, f"no CUDA graph ({str(error).splitlines()[0][:80]})"


def measure(case: Case) -> Row:
    """Checks and times the contestants of a case, in turn within every round."""
    row = Row(case.op, case.setting)
    contestants, expected, allowed = case.prepare()
    ready = {}
    for name, run in contestants.items():
        try:
            got = run()
            reason = None if name in case.unchecked else wrong(got, expected, allowed)
            run()
            torch.cuda.synchronize()
        except Exception as error:  # a library that lacks a format must not end the run; the row says so
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        if reason is not None:
            row.notes[name] = reason
            continue
        ready[name], note = recorded(run)
        if note:
            row.notes[name] = note
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(ROUNDS):
        for name, run in ready.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1000)
    for name, times in samples.items():
        low, median, high = statistics.quantiles(times, n=4)
        row.microseconds[name], row.quartiles[name] = median, (low, high)
    return row


def table(rows: list[Row]) -> str:
    """One line a case: microseconds of each contestant, and how many times faster than dense it is."""
    lines = []
    for row in rows:
        dense = row.microseconds.get("dense")
        parts = []
        for name, value in row.microseconds.items():
            ratio = f" ({dense / value:.2f}x)" if dense and name != "dense" else ""
            parts.append(f"{name} {value:.1f} us{ratio}")
        parts += [f"{name}: {note}" for name, note in row.notes.items()]
        lines.append(f"{row.op:14} {row.setting:45} " + "; ".join(parts))
    return "\n".join(lines)


def build() -> float:
    """Builds sparseprune._cuda in place for this card; returns the seconds."""
    start = time.perf_counter()
    environment = {**os.environ, "SPARSEPRUNE_CUDA": "1", "SPARSEPRUNE_NATIVE": "0"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return time.perf_counter() - start


def test() -> tuple[bool, str]:
    """Runs the tests that need a card; (all passed, pytest's last line)."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/cuda", "tests/triton"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-8000:], run.stderr[-2000:], sep="\n", file=sys.stderr)
    return run.returncode == 0, run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "no output"


def save(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def main(arguments: list[str] | None = None) -> int:
    """0: all right; 1: a test failed or a result of ours was wrong; 2: this machine cannot run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", help="of the result file (default: the card's name)")
    parser.add_argument("--seconds", type=float, default=570, help="for everything together (default: 570)")
    parser.add_argument("--no-build", action="store_true", help="use sparseprune._cuda as it is")
    parser.add_argument("--no-tests", action="store_true", help="time without running the gpu tests first")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or torch.version.cuda is None:
        print(
            "benchmarks/gpu.py needs an NVIDIA card, its driver and a torch built for CUDA; "
            f"this torch is {torch.__version__} and sees no such device. Nothing was run.",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + options.seconds
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build_seconds": None if options.no_build else build(),
    }
    good = True
    if not options.no_tests:
        good, results["tests"] = test()
        print(f"gpu tests: {results['tests']}")
    rows, left_out = [], []
    with torch.no_grad():
        for case in cases():
            if time.monotonic() > end:
                left_out.append(f"{case.op} {case.setting}")
                continue
            rows.append(measure(case))
            print(table(rows[-1:]), flush=True)
    for row in rows:
        missing = [name for name in row.notes if name.startswith(("cuda", "triton")) and name not in row.microseconds]
        good = good and not missing
    results |= {"all_right": good, "rows": [asdict(row) for row in rows], "left_out": left_out}
    name = options.name or re.sub(r"[^a-z0-9]+", "-", results["gpu"].lower()).strip("-")
    path = ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    save(path, results)
    print(f"{path.relative_to(ROOT)}: {len(rows)} cases, {len(left_out)} left out for lack of time")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
