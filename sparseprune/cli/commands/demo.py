"""``sparseprune demo``."""

from __future__ import annotations

import argparse

from ..._arguments import Given
from .. import shared

ABOUT = "Train, prune and measure a small text classifier on built-in data, in about five minutes."
EXAMPLE = "sparseprune demo --data crosswoz_zh --density 0.1 --name chinese"
RESUMES = True
PLACE = 1


def options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data", action=Given, default="clinc10", help="built-in data set: clinc10 (English) or crosswoz_zh (Chinese)"
    )
    shared.run_options(command, "demo", "4; crosswoz_zh 12")


def run(arguments: argparse.Namespace) -> int:
    if arguments.config is not None:
        return shared.run_settings(arguments)
    from ...pruning import make_granularity
    from ...runner import run_demo

    run_demo(
        out=arguments.out,
        name=arguments.name,
        data=arguments.data,
        density=arguments.density,
        granularity=make_granularity(arguments.granularity),
        layers=arguments.layers,
        method=arguments.method,
        compensation=arguments.compensation,
        seed=arguments.seed,
        epochs=arguments.epochs,
        max_seconds=arguments.max_seconds,
        layout=arguments.layout,
        value_dtype=arguments.value_dtype,
        activations=arguments.activations,
        data_check=arguments.data_check,
        robustness=arguments.robustness,
        quiet=arguments.quiet,
        autocast=arguments.autocast,
        device=arguments.device,
    )
    return 0
