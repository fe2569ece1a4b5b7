"""``python -m benchmarks.int8_accuracy``: what int8 costs a pruned classifier, and healing under its rounding saves.

Blocks of 1x4, weights in int8, activations in 8 bits, as ``python -m benchmarks.int8`` times them. A run prunes a copy
of a dense model by learned scores with distillation and heals it, with the rounding simulated or without; then the
model is made sparse in float32 and in int8, and each form is judged on both splits. ``--size minilm`` is the pretrained
MiniLM-L6, the others the built-in encoder (settings of :mod:`benchmarks.ablation`, whose dense model is shared by
all runs and kept under ``--cache``).

Finished runs are appended to ``--output`` and not repeated; one that was stopped goes on from its checkpoint under
``--cache``, which also keeps each healed model. ``--table`` only renders what is there.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseprune as sp
from benchmarks.ablation import Cell, append, arm_config, read, setting_of
from sparseprune._files import replacing
from sparseprune.bench import describe
from sparseprune.bench.tables import text_table
from sparseprune.training import predictions

INT8 = {"value_dtype": "int8", "activations": "int8"}
FORMS = ("dense float32", "dense int8", "pruned float32", "pruned int8")
RESULTS = Path(__file__).parent / "results" / "int8-accuracy.jsonl"


def forms(dense: nn.Module, pruned: nn.Module, filter_fn: Any) -> dict[str, nn.Module]:
    """The two models as they are and in int8, all four frozen."""
    found = {"dense float32": copy.deepcopy(dense), "dense int8": copy.deepcopy(dense),
             "pruned float32": copy.deepcopy(pruned), "pruned int8": copy.deepcopy(pruned)}  # fmt: skip
    for name, blocksize in (("dense int8", (16, 1)), ("pruned int8", (1, 4))):
        found[name].requires_grad_(False)
        sp.sparsify_(found[name], layout="bsr", blocksize=blocksize, filter_fn=filter_fn, **INT8)  # type: ignore[arg-type]
    sp.sparsify_(found["pruned float32"].requires_grad_(False), layout="csr", filter_fn=filter_fn)
    return {name: model.eval() for name, model in found.items()}


def judge(logits: Tensor, targets: Tensor) -> dict[str, float]:
    return {
        "accuracy": float((logits.argmax(-1) == targets).float().mean()),
        "loss": float(F.cross_entropy(logits, targets)),
    }


def share_kept(right: Tensor, dense: Tensor, draws: int = 4000) -> list[float]:
    """right, dense: bool `[M]`, what each model has right; the share of the dense accuracy that is kept, and the ends
    of its 95 % interval over examples drawn anew, the same for both models.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(right), (draws, len(right)), generator=generator)
    shares = (right.float()[chosen].mean(1) / dense.float()[chosen].mean(1)).sort().values
    found = [right.float().mean() / dense.float().mean(), shares[int(0.025 * draws)], shares[int(0.975 * draws)]]
    return [float(value) for value in found]


def run(cell: Cell, size: str, sparsity: float, seed: int, simulate: bool, work: Path) -> dict[str, Any]:
    """One pruned model, from ``work``'s checkpoint on where there is one; its figures."""
    base = arm_config("scores_kd", sparsity, seed, cell.setting, granularity="1x4")
    config = replace(base, **INT8) if simulate else base
    pruner = sp.DistillPruner(copy.deepcopy(cell.dense), config, copy.deepcopy(cell.dense), cell.filter_fn)
    cell.train.seed = seed
    began, last = time.monotonic(), [time.monotonic()]

    def said(record: dict[str, Any]) -> None:
        if time.monotonic() - last[0] > 60:
            last[0] = time.monotonic()
            print(f"  step {record['step']}, density {record['density']:.3f}, loss {record['loss']:.3f}", flush=True)

    work.mkdir(parents=True, exist_ok=True)
    name = f"{size}-{sparsity:g}-{seed}-{'simulated' if simulate else 'exact'}"
    history = pruner.fit(cell.train, cell.valid, checkpoint=work / f"{name}.ckpt", checkpoint_every=50, callback=said)
    model = pruner.finalize()
    with replacing(work / f"{name}.pt") as unfinished:
        torch.save(model.state_dict(), unfinished)
    made = forms(cell.dense, model, cell.filter_fn)
    figures: dict[str, Any] = {form: {} for form in FORMS}
    kept = {}
    for split in ("valid", "test"):
        logits = {form: predictions(each, getattr(cell, split)) for form, each in made.items()}
        for form, (found, targets) in logits.items():
            figures[form][split] = judge(found, targets)
            if split == "test":
                right, dense = (logits[which][0].argmax(-1) == targets for which in (form, FORMS[0]))
                kept[form] = share_kept(right, dense)
    report = None  # which takes two passes a layer where rounding costs much, too long with a large model
    if cell.setting.pretrained is None:
        report = sp.choose_exact_layers(model, cell.valid, layers=list(pruner.masks)).to_dict()
    (work / f"{name}.ckpt").unlink(missing_ok=True)
    return {
        "forms": figures, "kept": kept, "examples": len(cell.data.test.labels), "density": pruner.density,
        "autocast": config.autocast, "steps": len(history.steps), "seconds": round(time.monotonic() - began, 1),
        "exact_layers": report,
        "healed_on": [e["layers"] for e in history.events if e["event"].startswith("healing")][-1:],
    }  # fmt: skip


def table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    """A line a size, sparsity and way of healing: means over seeds, the share of dense accuracy with its interval; over
    seeds (Student's t) where there are several, over test examples where there is one.
    """
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[record["size"], record["sparsity"], record["simulate"]].append(record)
    rows = []
    for (size, sparsity, simulate), own in sorted(groups.items()):
        cells = []
        for form in FORMS:
            accuracy = statistics.fmean(r["forms"][form]["test"]["accuracy"] for r in own)
            if form == FORMS[0]:
                cells.append(f"{accuracy:.4f}")
                continue
            shares = [r["kept"][form][0] for r in own]
            mean = statistics.fmean(shares)
            low, high = own[0]["kept"][form][1:]
            if len(own) > 1:
                half = _STUDENT[len(own) - 1] * statistics.stdev(shares) / math.sqrt(len(own))
                low, high = mean - half, mean + half
            cells.append(f"{accuracy:.4f}: {mean:.2%} ({low:.2%} to {high:.2%})")
        reports = [r["exact_layers"] for r in own if r["exact_layers"] is not None]
        exact = f"{statistics.fmean(len(r['exact']) for r in reports):g}" if reports else "-"
        rows.append([size, f"{sparsity:.0%}", "yes" if simulate else "no", str(len(own)), *cells, exact])
    head = ["model", "zeros", "healed rounded", "seeds", *FORMS, "layers kept exact by the validation loss"]
    return text_table(head, rows, markdown)


_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5 % point by degrees of freedom


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_accuracy", description=__doc__)
    parser.add_argument("--size", default="minilm", choices=("minilm", "full", "small", "tiny"))
    parser.add_argument("--data", default="clinc150")
    parser.add_argument("--data-dir", type=Path, help="the folder of data sets that do not ship with the package")
    parser.add_argument("--cache", type=Path, default=Path("runs/int8-accuracy"), help="dense models, checkpoints")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heal", nargs="+", choices=("rounded", "exact"), default=["rounded"])
    parser.add_argument("--autocast", choices=("bfloat16", "none"), help="as the size has it; a CPU without bfloat16 "
                        "instructions takes many times as long with it as with none")  # fmt: skip
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args(argv)
    if not arguments.table:
        done = {tuple(r[k] for k in ("size", "data", "sparsity", "seed", "simulate")) for r in read(arguments.output)}
        cells: dict[int, Cell] = {}
        setting = setting_of(arguments.size, autocast=arguments.autocast)
        for seed, sparsity, heal in itertools.product(arguments.seeds, arguments.sparsity, arguments.heal):
            simulate = heal == "rounded"
            if (arguments.size, arguments.data, sparsity, seed, simulate) in done:
                continue
            # A pretrained model has one dense start for all seeds, which differ in order and draws.
            start = 0 if setting.pretrained else seed
            if start not in cells:
                cells[start] = Cell(arguments.data, start, setting, arguments.data_dir, arguments.cache)
            print(f"{arguments.size}, {sparsity:.0%} zeros, seed {seed}, healed {heal}", flush=True)
            found = run(cells[start], arguments.size, sparsity, seed, simulate, arguments.cache)
            record = {"size": arguments.size, "data": arguments.data, "sparsity": sparsity, "seed": seed,
                      "simulate": simulate, **found, "machine": describe(), "finished": time.time()}  # fmt: skip
            append(arguments.output, record)
            print(table([record]), flush=True)
    print(table(read(arguments.output), arguments.markdown))
    return 0


if __name__ == "__main__":
    sys.exit(main())
