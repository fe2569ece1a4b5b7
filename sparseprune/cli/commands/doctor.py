"""``sparseprune doctor``."""

from __future__ import annotations

import argparse

ABOUT = "What this installation can run, and what is missing."
EXAMPLE = "sparseprune doctor"
PLACE = 8


def options(command: argparse.ArgumentParser) -> None:
    """None."""


def run(arguments: argparse.Namespace) -> int:
    from ...doctor import examine, render

    print(render(examine()))
    return 0
