"""One-shot pruning of models from calibration data: ``wanda``, ``sparsegpt`` and ``best`` (docs/oneshot.md)."""

from .allocation import Sensitivity, owl_densities, score_densities, sensitivity
from .calibration import Batch, calibration_batches
from .criteria import Best, OneShotCriterion, SparseGPT, Wanda
from .driver import Progress

__all__ = [
    "Batch",
    "Best",
    "OneShotCriterion",
    "Progress",
    "Sensitivity",
    "SparseGPT",
    "Wanda",
    "calibration_batches",
    "owl_densities",
    "score_densities",
    "sensitivity",
]
