"""sparseprune: prune language models, run them sparse, and see the gain measured on your own machine."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that `import sparseprune` stays quick and never fails
# for the lack of an optional package.
_PUBLIC = {
    "GANConfig": "gan",
    "GANPruner": "gan",
    "DiscriminatorConfig": "gan",
    "AdamW": "optim",
    "Block": "pruning",
    "Constant": "pruning",
    "Cubic": "pruning",
    "Element": "pruning",
    "Factors": "pruning",
    "Heads": "pruning",
    "Linear": "pruning",
    "NM": "pruning",
    "Neurons": "pruning",
    "OneShot": "pruning",
    "PruneConfig": "pruning",
    "Pruner": "pruning",
    "RetentionSchedule": "pruning",
    "compensate_": "pruning",
    "prune_": "pruning",
    "MaskedLinear": "nn",
    "SparseLinear": "nn",
    "densify_": "nn",
    "explain": "nn",
    "sparsify_": "nn",
    "use_linears_": "nn",
    "load": "checkpoint",
    "save": "checkpoint",
    "sparsity_report": "report",
}
_SUBMODULES = (
    "bench",
    "checkpoint",
    "data",
    "gan",
    "integrations",
    "layouts",
    "nn",
    "ops",
    "optim",
    "pruning",
    "reference",
    "report",
)

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'sparseprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
