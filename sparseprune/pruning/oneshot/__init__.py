"""One-shot pruning of models from calibration data: ``wanda``, ``sparsegpt`` and ``best`` (docs/oneshot.md)."""

from .allocation import Sensitivity, block_of, owl_densities, score_densities, sensitivity
from .calibration import Batch, calibration_batches
from .criteria import Best, OneShotCriterion, SparseGPT, Wanda
from .driver import Progress
from .reconstruct import fast_bfloat16

__all__ = [
    "Batch",
    "Best",
    "OneShotCriterion",
    "Progress",
    "Sensitivity",
    "SparseGPT",
    "Wanda",
    "block_of",
    "calibration_batches",
    "fast_bfloat16",
    "owl_densities",
    "score_densities",
    "sensitivity",
]
