"""Floor 8: pruning in training, with distillation from the dense model: the trainer and its parts."""

from .config import DistillConfig
from .evaluate import compare, evaluate, predictions
from .exact_layers import RoundingReport, choose_exact_layers
from .history import History
from .trainer import DistillPruner

__all__ = [
    "DistillConfig",
    "DistillPruner",
    "History",
    "RoundingReport",
    "choose_exact_layers",
    "compare",
    "evaluate",
    "predictions",
]
