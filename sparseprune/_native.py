"""Loads the compiled modules and keeps the reason when one is absent. Nothing else imports ``_C`` or ``_cuda``.

Floor 0. ``C`` and ``CUDA`` are the modules or None; ``why_no_c()`` and ``why_no_cuda()`` say why, with the remedy.
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["CUDA", "C", "require_c", "why_no_c", "why_no_cuda"]


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module(f"sparseprune.{name}"), None
    except ImportError as error:
        if "libgomp" not in str(error):
            return None, str(error)
    try:  # a system without it: torch brings one, of this name, with which a wheel is content
        importlib.import_module("torch")
        return importlib.import_module(f"sparseprune.{name}"), None
    except ImportError as error:
        return None, str(error)


C, _c_error = _load("_C")
CUDA, _cuda_error = _load("_cuda")


def why_no_c() -> str | None:
    """None where the compiled core is loaded, else the reason and the remedy."""
    if C is not None:
        return None
    return (
        f"the compiled core sparseprune._C is not loaded ({_c_error}); install a C++17 compiler and reinstall with "
        "SPARSEPRUNE_NATIVE=1, which fails loudly instead of installing without it"
    )


def why_no_cuda() -> str | None:
    """None where the CUDA module is loaded, else the reason and the remedy."""
    if CUDA is not None:
        return None
    return f"sparseprune._cuda is not loaded ({_cuda_error}); reinstall with SPARSEPRUNE_CUDA=1 and CUDA_HOME set"


def require_c() -> ModuleType:
    """The compiled core, or RuntimeError with the reason."""
    if C is None:
        raise RuntimeError(why_no_c())
    return C
