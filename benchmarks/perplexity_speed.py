"""``python -m benchmarks.perplexity_speed --text FILE --pruned DIR ...``: what a language model is worth, how fast it
writes and what memory it takes, in every form that one could run on a CPU.

Dense in torch (float32, dynamic int8), in llama.cpp (the file as it comes, Q8_0, Q4_0) and rounded by us, and
pruned: one folder each, as ``python -m benchmarks.oneshot --save`` leaves them. Perplexity is of windows of the text's
second half, with weights rounded as one token reads them; all models take turns at a prompt and at greedy tokens after
it; resident bytes are the growth of a fresh process that makes one model and calls it once. What is absent is named
with the reason. Results are merged into ``benchmarks/results/perplexity-speed.json``, one record a machine's tier and
number of threads; a record of the same tier lends its perplexities and bytes. ``--plot`` draws one.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseprune as sp
from sparseprune import language
from sparseprune.bench import machine, plots
from sparseprune.bench.run import load_results, save_results
from sparseprune.bench.tables import text_table
from sparseprune.nn.rounded import RoundedLinear, rounded_copy

from .language_peers import LLAMA_TYPES, LlamaCpp, llama_file, torch_int8, why_no_llama
from .oneshot import gguf_of, halves, load, status
from .run import RESULTS, merged

PICTURE = RESULTS.parents[1] / "docs" / "pictures" / "perplexity-speed.svg"
#: name -> what sparsify_ is told of values; what stays dense, above all the head, is held so too.
VALUES: dict[str, dict[str, Any]] = {
    "bfloat16": {"value_dtype": "bfloat16", "dense_value_dtype": "bfloat16"},
    "int8": {"value_dtype": "int8", "activations": "int8", "dense_value_dtype": "int8"},
}
_KEY = ("model", "threads", "tier")


def ours(model: nn.Module, tokens: int | tuple[int, ...], **how: Any) -> nn.Module:
    """As a program, its weights in packed form alone; SystemExit where it is none, so that no other time is shown."""
    model.requires_grad_(False)
    report = sp.sparsify_(model, tokens=tokens, engine="program", keep="packed", **how)
    if [stack.engine for stack in report.stacks] != ["program"]:
        raise SystemExit(f"no program: {report.stacks}")
    return model


#: Makes a model; with True for the perplexity of what one token reads, else for one token and prompts.
Maker = Callable[[bool], nn.Module]


def forms(arguments: argparse.Namespace) -> tuple[dict[str, Maker], dict[str, str]]:
    """(name -> what makes the model, name -> why it is absent), the baseline first."""
    makers: dict[str, Maker] = {}
    plain = arguments.cache / "dense"  # as float32, so that the file that is read is no part of what a form holds
    if not (plain / "config.json").exists():
        load(arguments.model)[0].save_pretrained(plain)

    def read(folder: Path) -> Any:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        for parameter in model.parameters():  # out of the mapped file, all of which counts while one tensor lies in it
            parameter.data = parameter.detach().clone()
        return model

    def sparse(folder: Path, how: dict[str, Any]) -> Maker:
        def make(judged: bool) -> nn.Module:
            model = read(folder)
            if not judged:
                return ours(model, (1, arguments.prompt), **how)
            # int8 gives the same bits in every packed form, and the layers answer whole windows in any case
            sp.sparsify_(model, tokens=(1, 2048), engine="layers", **{**how, "layout": "csr"})
            return model

        return make

    makers["torch float32"] = lambda _: read(plain)
    makers["torch int8"] = lambda _: torch_int8(read(plain))
    makers["ours dense int8"] = sparse(plain, {"layout": "csr", **VALUES["int8"]})
    for folder in arguments.pruned:
        for name, how in VALUES.items():
            makers[f"ours {folder.name} {name}"] = sparse(folder, how)
    why, source = why_no_llama(), gguf_of(arguments.model)
    if why is not None or source is None:
        return makers, {"llama.cpp": why or f"{arguments.model} is no GGUF file"}
    makers["llama.cpp as it comes"] = lambda _: LlamaCpp(source)
    for kind in LLAMA_TYPES:
        makers[f"llama.cpp {kind}"] = lambda _, kind=kind: LlamaCpp(llama_file(source, kind, arguments.cache))
    return makers, {}


def resident(make: Maker) -> int:
    """Bytes that this process, which should be fresh, grows by when it makes the model and calls it once."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    small = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()  # what is imported on the way
    sp.prune_(small, 0.5, scope="layer")
    ours(small, 1, layout="csr")
    ids = torch.tensor([[5, 6]])

    def now() -> int:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        return status("VmRSS")

    with torch.inference_mode():
        small(ids, use_cache=True)
    before = now()
    model = make(False)
    with torch.inference_mode():
        model(ids, use_cache=True)
    return now() - before


@contextlib.contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Layers that read a rounded copy for few rows answer every call from it, as decoding sees them."""
    layers = [module for module in model.modules() if isinstance(module, RoundedLinear)]
    for layer in layers:
        values, scale = rounded_copy(layer.weight, layer.value_dtype)
        weight = values.float() if scale is None else values.float() * scale[:, None]
        layer.forward = partial(F.linear, weight=weight, bias=layer.bias)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def texts(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """(windows that judge `[W, context]`, a prompt `[P]`): both of the text's second half."""
    _, tokenizer = load(arguments.model)
    ids = torch.tensor(tokenizer(halves(arguments.text.read_text(encoding="utf-8"))[1])["input_ids"])
    return language.token_windows(ids, arguments.context, arguments.windows), ids[: arguments.prompt]


def measure(arguments: argparse.Namespace, known: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """known: earlier records; perplexity and bytes of a form are taken from one of the same tier, windows and prompt,
    whatever its threads.
    """
    makers, absent = forms(arguments)
    windows, prompt = texts(arguments)
    same = {"model": arguments.model, "tier": machine.tier(), "prompt": arguments.prompt,
            "judged_tokens": windows.shape[0] * (windows.shape[1] - 1)}  # fmt: skip
    earlier: dict[str, dict[str, Any]] = {}
    for record in known:
        if all(record[key] == value for key, value in same.items()):
            earlier |= record["forms"]
    found: dict[str, dict[str, Any]] = {}
    models: dict[str, nn.Module] = {}
    for name, make in makers.items():
        if name in earlier:
            found[name] = {key: earlier[name][key] for key in ("perplexity", "resident")}
            models[name] = make(False)
            continue
        judged = make(True)
        with rounded(judged):
            found[name] = {"perplexity": language.perplexity(judged, windows).value}
        models[name] = make(False) if name.startswith("ours") else judged
        found[name]["resident"] = _fresh(name)
        print(f"{name}: perplexity {found[name]['perplexity']:.2f}, {found[name]['resident'] / 1e6:.0f} MB", flush=True)
    before = machine.load()
    speeds = language.tokens_per_second(models, prompt, new_tokens=arguments.new_tokens, repeats=arguments.repeats)
    for name, speed in speeds.items():
        found[name]["speed"] = dataclasses.asdict(speed)
    return {
        **same, "threads": arguments.threads, "machine": machine.describe(), "load": [before, machine.load()],
        "forms": found, "absent": absent,
    }  # fmt: skip


def _fresh(name: str) -> int:
    command = [sys.executable, "-m", "benchmarks.perplexity_speed", *sys.argv[1:], "--resident", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def table(record: dict[str, Any], markdown: bool = False) -> str:
    first = next(iter(record["forms"].values()))
    rows = []
    for name, form in record["forms"].items():
        cells = [f"{form['perplexity']:.2f} ({form['perplexity'] / first['perplexity']:.3f})"]
        for what in ("prompt", "generation"):
            speed, base = form["speed"][what], first["speed"][what]
            low, high = form["speed"][f"{what}_range"]
            cells.append(f"{speed:.1f} ({low:.1f} to {high:.1f}), {speed / base:.2f}")
        cells.append(f"{form['resident'] / 1e6:.0f} ({form['resident'] / first['resident']:.2f})")
        rows.append([name, *cells])
    head = ["form", "perplexity (of dense)", "prompt tokens/s, ratio", "generation tokens/s, ratio", "MB (of dense)"]
    return text_table(head, rows, markdown)


def draw(record: dict[str, Any], path: Path) -> None:
    """Perplexity over tokens a second and over resident bytes."""
    found = record["forms"]
    panels = {
        "tokens a second, one by one": {n: (f["speed"]["generation"], f["perplexity"]) for n, f in found.items()},
        "MB that the process holds": {n: (f["resident"] / 1e6, f["perplexity"]) for n, f in found.items()},
    }
    about = record["machine"]
    title = f"{record['model']}; {about['cpu']}, {record['threads']} threads, {about['tier']}"
    plots.trade_off(panels, path, "perplexity, lower is better (logarithmic)", title, log_height=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", type=Path, help="a plain text file")
    parser.add_argument("--pruned", type=Path, nargs="+", default=[], help="folders of pruned models")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="windows judged, spread over the second half")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path("runs/perplexity-speed"), help="llama.cpp's rounded files")
    parser.add_argument("--out", type=Path, default=RESULTS / "perplexity-speed.json")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--plot", type=Path, nargs="?", const=PICTURE, help="draw the record of these threads there")
    parser.add_argument("--resident", metavar="FORM", help="one form's resident bytes, of this process")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.resident is not None:
        print(resident(forms(arguments)[0][arguments.resident]))
        return
    known = load_results(arguments.out)["records"] if arguments.out.exists() else []
    if not arguments.table:
        if arguments.text is None:
            raise SystemExit("--text FILE is needed")
        record = measure(arguments, known)
        known = merged(known, record, _KEY)
        save_results(arguments.out, known, None)
    chosen = [r for r in known if (r["threads"], r["tier"]) == (arguments.threads, machine.tier())] or known
    for record in chosen:
        about = record["machine"]
        print(f"{about['cpu']}, {record['threads']} threads, {record['tier']}, load {record['load']}")
        print(table(record, arguments.markdown))
        print("absent:", record["absent"] or "nothing")
    if arguments.plot and chosen:
        draw(chosen[0], arguments.plot)


if __name__ == "__main__":
    main()
