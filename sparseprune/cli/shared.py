"""What several commands share: options of a run and of a language model, and reading what they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._arguments import Given, path_of, real, whole

__all__ = [
    "device_option",
    "find_device",
    "language_model",
    "model_options",
    "read_text",
    "run_options",
    "run_settings",
    "text_windows",
]


def device_option(command: argparse.ArgumentParser, default: str = "auto") -> None:
    command.add_argument(
        "--device", default=default, metavar="auto|cpu|cuda",
        help=f"where it computes: auto takes a GPU where there is one, cuda:1 the second (default {default})",
    )  # fmt: skip


def find_device(arguments: argparse.Namespace) -> Any:
    """The torch.device of ``--device``; ValueError where there is none, before any model is read."""
    from ..runner.devices import find_device

    return find_device(arguments.device)


def run_options(command: argparse.ArgumentParser, name: str, epochs: str) -> None:
    command.add_argument(
        "--density", action=Given, type=real("(0, 1]"),
        help="share of weights kept, in (0, 1] (default 0.1, or what N:M keeps)",
    )  # fmt: skip
    command.add_argument(
        "--granularity", action=Given, default="element",
        help="element, RxC blocks such as 16x1, N:M such as 2:4, heads, neurons; heads/axes and neurons/axes keep the"
        " square root of the density of units and of the other axis, and rescale the survivors by the trim factor",
    )  # fmt: skip
    command.add_argument(
        "--method",
        action=Given,
        default="scores",
        choices=("magnitude", "scores", "gan", "movement"),
        help="what decides which weights stay; all but gan without the adversary (default scores)",
    )
    command.add_argument(
        "--compensation",
        action=Given,
        default="none",
        choices=("none", "bias", "survivors", "low_rank", "best"),
        help="what stands in for the removed weights, within the same number of parameters (default none)",
    )
    command.add_argument(
        "--layers", action=Given, const=list, metavar="PATTERN", help="prune only Linears whose name matches"
    )
    command.add_argument("--layout", action=Given, default="auto", choices=("auto", "csr", "bsr", "nm", "dense"))
    command.add_argument(
        "--value-dtype", action=Given, default="float32", choices=("float32", "bfloat16", "int8"),
        help="how inference and the file hold the kept weights; healing rounds so too (default float32)",
    )  # fmt: skip
    command.add_argument(
        "--activations", action=Given, default="float32", choices=("float32", "int8"),
        help="int8, with --value-dtype int8: products round activations to 8 bits, best with --granularity 1x4; dense"
        " and pruned are then shown in both (default float32)",
    )  # fmt: skip
    command.add_argument(
        "--autocast", action=Given, default="none", choices=("none", "bfloat16"),
        help="mixed precision in training: forward passes in bfloat16 (default none)",
    )  # fmt: skip
    device_option(command)
    command.add_argument(
        "--epochs", action=Given, type=real("(0, inf)"), help=f"epochs of pruning and healing (default {epochs})"
    )  # fmt: skip
    command.add_argument(
        "--max-seconds", action=Given, type=real("(0, inf)"),
        help="limit on the pruning loop; it still ends at its density",
    )  # fmt: skip
    command.add_argument(
        "--data-check", action=Given, default="report", choices=("report", "stop", "off"),
        help="duplicates, label conflicts, empty or cut texts, leakage between splits: say so or stop (default report)",
    )  # fmt: skip
    command.add_argument(
        "--robustness", action=Given, type=whole(0), default=1000, metavar="N",
        help="test examples to judge both models on with typos and missing words (default 1000; 0: none)",
    )  # fmt: skip
    command.add_argument("--seed", action=Given, type=whole(0, 2**32 - 1), default=0)
    command.add_argument("--out", default="runs", help="folder of all runs (default runs)")
    command.add_argument("--name", default=name, help=f"the run's folder below it (default {name})")
    command.add_argument(
        "--config", type=path_of, metavar="JSON",
        help="a run's settings.json, for all settings at once; options given besides take the place of its own",
    )  # fmt: skip
    command.add_argument("--quiet", action="store_true")


def model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="hub name or folder of a causal language model")
    command.add_argument("--gguf-file", help="name of a GGUF file in that folder")


def run_settings(arguments: argparse.Namespace) -> int:
    """A run by --config; what the options besides it change is said."""
    from ..runner import override, read_settings, run

    asked = getattr(arguments, "given", {})
    config, changed = override(read_settings(arguments.config), {name: getattr(arguments, name) for name in asked})
    if changed and not arguments.quiet:
        print(f"{arguments.config}, but {'; '.join(changed)}", flush=True)
    run(config, out=arguments.out, name=arguments.name, quiet=arguments.quiet, device=arguments.device)
    return 0


def language_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from ..integrations import transformers

    return transformers.language_model(arguments.model, gguf_file=arguments.gguf_file)


def text_windows(arguments: argparse.Namespace, tokenizer: Any) -> Any:
    from ..language import token_windows

    return token_windows(tokenizer(read_text(arguments.text))["input_ids"], arguments.context, arguments.windows)


def read_text(path: Path) -> str:
    """The text, read before any model is; ValueError or FileNotFoundError where there is none."""
    from ..runner.language import read_text

    return read_text(path)
