"""Floor 9: the adversary: a discriminator between teacher and student, its game, and the pruner that plays it."""

from .config import DiscriminatorConfig, GANConfig
from .discriminator import Discriminator
from .probe import null_test, probe
from .trainer import GANPruner

__all__ = ["Discriminator", "DiscriminatorConfig", "GANConfig", "GANPruner", "null_test", "probe"]
