"""One-shot pruning of models from calibration data: ``wanda``, ``sparsegpt`` and ``admm`` (docs/lab/oneshot.md)."""

from ..batches import Batch
from .calibration import calibration_batches
from .criteria import ADMM, OneShotCriterion, SparseGPT, Wanda
from .densities import Sensitivity, block_of, owl_densities, score_densities, sensitivity
from .driver import Progress
from .reconstruct import fast_bfloat16

__all__ = [
    "ADMM",
    "Batch",
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
