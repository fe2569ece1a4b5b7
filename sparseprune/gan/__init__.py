"""Floor 7: the adversarial pruner: gates, discriminator, losses, monitor and the trainer of every arm."""

from .config import DiscriminatorConfig, GANConfig
from .discriminator import Discriminator
from .evaluate import compare, evaluate, predictions
from .history import History
from .trainer import GANPruner

__all__ = [
    "Discriminator",
    "DiscriminatorConfig",
    "GANConfig",
    "GANPruner",
    "History",
    "compare",
    "evaluate",
    "predictions",
]
