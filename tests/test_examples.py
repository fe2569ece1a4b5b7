"""The examples run."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def test_linear_128_10_learns_and_is_pruned_exactly():
    train = runpy.run_path(str(EXAMPLES / "linear_128_10.py"))["train"]
    figures = train(density=0.25, epochs=4)
    assert figures["density"] == pytest.approx(0.25, abs=1e-6)
    assert figures["accuracy"] > 0.35  # ten classes
    assert figures == train(density=0.25, epochs=4)
