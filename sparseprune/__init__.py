"""sparseprune: prune language models, run them sparse, and see the gain measured on your own machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _companions

__version__ = "0.1.0"

# Public name -> module that defines it. Loaded on first use, so that `import sparseprune` stays quick and never fails
# for the lack of an optional package. Type checkers read the imports below it instead; a test compares the two.
_PUBLIC = {
    "AdamW": "optim",
    "Block": "pruning",
    "ConstantSchedule": "pruning",
    "CubicSchedule": "pruning",
    "DiscriminatorConfig": "gan",
    "DistillConfig": "training",
    "DistillPruner": "training",
    "Element": "pruning",
    "Factors": "pruning",
    "GANConfig": "gan",
    "GANPruner": "gan",
    "Heads": "pruning",
    "LinearSchedule": "pruning",
    "MaskedLinear": "nn",
    "NM": "pruning",
    "Neurons": "pruning",
    "OneShotSchedule": "pruning",
    "PruneConfig": "pruning",
    "Pruner": "pruning",
    "RetentionSchedule": "pruning",
    "SparseLinear": "nn",
    "choose_exact_layers": "training",
    "compensate_": "pruning",
    "densify_": "nn",
    "explain": "nn",
    "expose_linears_": "nn",
    "load": "checkpoint",
    "prune_": "pruning",
    "prune_below_": "pruning",
    "save": "checkpoint",
    "shrink_": "structured",
    "sparsify_": "nn",
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
    "structured",
    "training",
)

__all__ = ["__version__", *_PUBLIC, *_SUBMODULES]

if TYPE_CHECKING:
    from . import bench as bench
    from . import checkpoint as checkpoint
    from . import data as data
    from . import gan as gan
    from . import integrations as integrations
    from . import layouts as layouts
    from . import nn as nn
    from . import ops as ops
    from . import optim as optim
    from . import pruning as pruning
    from . import reference as reference
    from . import report as report
    from . import structured as structured
    from . import training as training
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .gan import DiscriminatorConfig as DiscriminatorConfig
    from .gan import GANConfig as GANConfig
    from .gan import GANPruner as GANPruner
    from .nn import MaskedLinear as MaskedLinear
    from .nn import SparseLinear as SparseLinear
    from .nn import densify_ as densify_
    from .nn import expose_linears_ as expose_linears_
    from .nn import sparsify_ as sparsify_
    from .nn.explain import explain as explain
    from .optim import AdamW as AdamW
    from .pruning import NM as NM
    from .pruning import Block as Block
    from .pruning import ConstantSchedule as ConstantSchedule
    from .pruning import CubicSchedule as CubicSchedule
    from .pruning import Element as Element
    from .pruning import Factors as Factors
    from .pruning import Heads as Heads
    from .pruning import LinearSchedule as LinearSchedule
    from .pruning import Neurons as Neurons
    from .pruning import OneShotSchedule as OneShotSchedule
    from .pruning import PruneConfig as PruneConfig
    from .pruning import Pruner as Pruner
    from .pruning import RetentionSchedule as RetentionSchedule
    from .pruning import compensate_ as compensate_
    from .pruning import prune_ as prune_
    from .pruning import prune_below_ as prune_below_
    from .report import sparsity_report as sparsity_report
    from .structured import shrink_ as shrink_
    from .training import DistillConfig as DistillConfig
    from .training import DistillPruner as DistillPruner
    from .training import choose_exact_layers as choose_exact_layers
else:

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


_companions.watch()
