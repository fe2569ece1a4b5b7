"""``sparseprune eval``."""

from __future__ import annotations

import argparse

from ..._arguments import path_of, whole
from .. import shared

ABOUT = "Perplexity and tokens per second of a language model, dense beside sparse."
EXAMPLE = "sparseprune eval --model folder --checkpoint pruned.safetensors --text test.txt"
PLACE = 6


def options(command: argparse.ArgumentParser) -> None:
    shared.model_options(command)
    command.add_argument(
        "--checkpoint", type=path_of,
        help="a pruned checkpoint of the same model, by sp.save; without it the zeros of --model itself run sparse",
    )  # fmt: skip
    command.add_argument("--text", required=True, type=path_of, help="plain text to judge on")
    command.add_argument("--context", type=whole(2), default=256, help="tokens a window (default 256)")
    command.add_argument("--windows", type=whole(1), help="at most that many windows, spread over the text")
    command.add_argument(
        "--new-tokens", type=whole(1), default=32, help="tokens to generate for the speed (default 32)"
    )
    command.add_argument("--value-dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    command.add_argument(
        "--dense-value-dtype", default="float32", choices=("float32", "bfloat16", "int8"),
        help="how calls of few tokens hold what was not pruned, the head among it (default float32, exact)",
    )  # fmt: skip
    shared.device_option(command)


def run(arguments: argparse.Namespace) -> int:
    from torch import nn

    from ...language import perplexity, speed_table, tokens_per_second
    from ...nn import SparseLinear, densify_, prunable_linears, sparsify_
    from ...nn.copies import copy_of
    from ...nn.matrices import shared_linears

    device = shared.find_device(arguments)
    shared.read_text(arguments.text)
    if arguments.checkpoint is not None and not arguments.checkpoint.is_file():
        raise FileNotFoundError(f"{arguments.checkpoint}: no such file; expected a checkpoint by sp.save")
    model, tokenizer = shared.language_model(arguments)
    model.to(device)
    # Of what is no Linear itself, those alone that sparsify_ gives Linears.
    given = dict(shared_linears(model, pruned=True).named_modules())
    zeros = arguments.checkpoint is None and any(
        isinstance(given.get(name), nn.Linear) and bool((linear.weight == 0).any())
        for name, linear in prunable_linears(shared_linears(model)).items()
    )
    rounded_to = (arguments.value_dtype, arguments.dense_value_dtype)
    if arguments.checkpoint is None and not zeros and rounded_to != ("float32", "float32"):
        raise ValueError(
            f"--model {arguments.model}: no weight of it is zero, so that nothing runs sparse and rounded; expected "
            "neither --value-dtype nor --dense-value-dtype, or a --checkpoint"
        )
    windows = shared.text_windows(arguments, tokenizer)
    models = {"dense": model}
    print(f"dense: {perplexity(model, windows)}")
    pruned = None
    if arguments.checkpoint is not None:
        from ... import checkpoint

        pruned, _ = shared.language_model(arguments)
        checkpoint.load(pruned, arguments.checkpoint)
        if not any(isinstance(m, SparseLinear) and m.low_rank_a is not None for m in pruned.modules()):
            densify_(pruned)  # what the file runs sparse is chosen again, and rounded as asked for
        elif rounded_to != ("float32", "float32"):
            raise ValueError(
                f"--checkpoint {arguments.checkpoint}: its layers have low-rank terms and run as the file has them; "
                "expected neither --value-dtype nor --dense-value-dtype"
            )
        pruned.to(device)
        print(f"pruned: {perplexity(pruned, windows)}")
    elif zeros:
        pruned = copy_of(model, "eval")
    if pruned is not None:
        pruned.requires_grad_(False)  # a frozen weight is not compared with what was packed at every call
        rest = arguments.dense_value_dtype
        report = sparsify_(pruned, tokens=(1, 128), value_dtype=arguments.value_dtype, dense_value_dtype=rest)
        rounded = sum(layer.layout != "dense" for layer in report.rounded)
        sparse = sum(isinstance(m, SparseLinear) for m in pruned.modules())
        print(
            f"sparse ({arguments.value_dtype}): {perplexity(pruned, windows)}, {sparse} sparse layers"
            + ("" if rest == "float32" else f", {rounded} dense in {rest}")
        )
        models["sparse"] = pruned
    print(speed_table(tokens_per_second(models, windows[0, :128], new_tokens=arguments.new_tokens)))
    return 0
