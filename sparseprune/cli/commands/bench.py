"""``sparseprune bench``: its options belong to the bench floor, which also runs without this room."""

from __future__ import annotations

ABOUT = "Time our kernels beside dense and other sparse libraries (bench --help)."
PLACE = 5


def take_over(rest: list[str]) -> int:
    """rest: what stands behind the command's name."""
    from ...bench.command import main

    return main(rest)
