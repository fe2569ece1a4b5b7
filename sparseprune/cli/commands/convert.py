"""``sparseprune convert``."""

from __future__ import annotations

import argparse

from ..._arguments import check_file, path_of

ABOUT = "Rewrite a checkpoint: a dense file with zeros becomes sparse, a sparse one dense, values another type."
EXAMPLE = "sparseprune convert runs/demo/pruned.safetensors small.safetensors --value-dtype bfloat16"
PLACE = 3


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=path_of, help="a .safetensors file, dense or written by sparseprune")
    command.add_argument("target", type=path_of, help="the .safetensors file to write")
    command.add_argument("--value-dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    command.add_argument("--dense", action="store_true", help="write a plain dense state dict")


def run(arguments: argparse.Namespace) -> int:
    from ...checkpoint import convert

    if not arguments.source.is_file():
        raise FileNotFoundError(f"{arguments.source}: no such file; expected a .safetensors checkpoint")
    check_file(arguments.target, "target")
    before = arguments.source.stat().st_size
    convert(arguments.source, arguments.target, value_dtype=arguments.value_dtype, dense=arguments.dense)
    after = arguments.target.stat().st_size
    print(f"{arguments.source} ({before:,} bytes) -> {arguments.target} ({after:,} bytes, {after / before:.3f})")
    return 0
