"""``sparseprune article``."""

from __future__ import annotations

import argparse

from ..._arguments import real, whole
from .. import shared

ABOUT = "Prune nn.Linear(128, 10) by a GAN as the article has it, beside learned scores and magnitude; under a minute."
EXAMPLE = "sparseprune article --data crosswoz_zh --retention 0.1 --convention formula"
PLACE = 2


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", default="clinc10", help="built-in data set: clinc10 (English) or crosswoz_zh (Chinese)"
    )
    command.add_argument(
        "--retention", nargs="+", type=real("(0, 1)"), default=[0.1, 0.01], metavar="R",
        help="shares of the parameters kept, one after the other (default 0.1 0.01)",
    )  # fmt: skip
    command.add_argument(
        "--convention", default="text", choices=("text", "formula"),
        help="how the factors are read: text keeps R of the weights, formula sqrt(R) of the input features (default"
        " text)",
    )  # fmt: skip
    command.add_argument(
        "--mode", default="bounded", choices=("bounded", "literal", "consistent"),
        help="how the recurrence is read (default bounded)",
    )  # fmt: skip
    command.add_argument(
        "--methods", nargs="+", default=["gan", "scores", "magnitude"], choices=("gan", "scores", "magnitude")
    )
    command.add_argument("--epochs", type=whole(1), default=4, help="of the dense training and of each pruning")
    command.add_argument("--batch-size", type=whole(1), default=64)
    command.add_argument("--every", type=whole(1), default=100, help="a line each so many batches (default 100)")
    command.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    shared.device_option(command)
    command.add_argument("--out", default="runs", help="folder of all runs (default runs)")
    command.add_argument("--name", default="article", help="the run's folder below it (default article)")
    command.add_argument("--quiet", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    from ...runner.article import run_article

    run_article(
        data=arguments.data,
        retentions=arguments.retention,
        convention=arguments.convention,
        mode=arguments.mode,
        methods=arguments.methods,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        every=arguments.every,
        out=arguments.out,
        name=arguments.name,
        quiet=arguments.quiet,
        device=arguments.device,
    )
    return 0
