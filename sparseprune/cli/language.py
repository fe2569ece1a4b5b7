"""``sparseprune prune --text FILE``: language models have options of their own."""

from __future__ import annotations

from collections.abc import Sequence

from .._arguments import Parser, path_of, real, whole
from .shared import device_option

__all__ = ["parser", "prune"]


def parser() -> Parser:
    """The options of ``sparseprune prune --text FILE``."""
    from ..pruning import criterion_names, make_criterion

    # no gradients are seen on the way
    criteria = [name for name in criterion_names() if not make_criterion(name).needs_gradients]
    command = Parser(
        prog="sparseprune prune", description="Prune a causal language model in one shot, and measure it.",
        epilog="example:\n  sparseprune prune --model HuggingFaceTB/SmolLM2-135M --text corpus.txt --density 0.5",
    )  # fmt: skip
    command.add_argument("--model", required=True, help="hub name or folder of a causal language model")
    command.add_argument("--gguf-file", help="name of a GGUF file in that folder")
    command.add_argument("--text", required=True, type=path_of, help="plain text, or a folder by Dataset.save_to_disk")
    command.add_argument(
        "--judged-on", type=path_of, metavar="FILE", help="text for the perplexity (default: its last fifth)"
    )
    command.add_argument("--criterion", default="admm", choices=criteria, help="default admm")
    command.add_argument(
        "--density", type=real("(0, 1)"), help="share of the weights kept (default 0.5, or what N:M keeps)"
    )
    command.add_argument("--granularity", default="element", help="element, 16x1, 2:4 ... (default element)")
    command.add_argument("--context", type=whole(2), default=256, help="tokens a window (default 256)")
    command.add_argument("--windows", type=whole(1), default=32, help="windows to prune with (default 32)")
    command.add_argument("--judged-windows", type=whole(1), default=32, help="windows to judge on (default 32)")
    command.add_argument("--value-dtype", default="float32", choices=("float32", "bfloat16", "int8"))
    command.add_argument("--layout", default="auto", choices=("auto", "csr", "bsr", "nm"))
    device_option(command)
    command.add_argument("--new-tokens", type=whole(1), default=32)
    command.add_argument("--out", default="runs")
    command.add_argument("--name", default="language")
    command.add_argument("--quiet", action="store_true")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return command


def prune(arguments: Sequence[str]) -> int:
    """``sparseprune prune --text FILE ...``"""
    given = vars(parser().parse_args(list(arguments)))
    given.pop("debug")
    from ..runner.language import prune_language_model

    prune_language_model(given.pop("model"), given.pop("text"), **given)
    return 0
