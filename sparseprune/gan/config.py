"""What the adversarial pruner can be told besides: two frozen configurations, JSON both ways."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from .._config import Config
from ..training.config import DistillConfig, at_least, one_of
from .losses import LOSSES, loss_of

__all__ = ["DiscriminatorConfig", "GANConfig"]


@dataclass(frozen=True)
class DiscriminatorConfig(Config):
    """The discriminator's architecture, its game and its optimiser.

    depth >= 0, width >= 1: hidden layers and their units. norm: "spectral", "layer" or "none". loss: which game both
    sides play, one of ``gan/losses.py``. conditional: it sees the teacher's embedding of the same token beside the
    feature. projection >= 1: features wider than this are projected to it. rows >= 2: feature rows a layer and a step.
    noise >= 0: standard deviation of the instance noise at the start, where features have variance 1; it falls to 0.
    penalty >= 0: weight of the gradient penalty (wgan-gp), taken every fourth update. lr, betas: of its Adam. strong,
    in (0.5, 1]: mean pair accuracy above which it rests. patience >= 1: steps of rest on end after which it starts
    anew. mode: "trained", or one of the two controls, "frozen" (random and never trained) and "shuffled" (trained on
    shuffled labels).

    ValueError on a value outside these ranges, and on the spectral norm beside a loss with a gradient penalty.
    """

    depth: int = 3
    width: int = 256
    norm: Literal["spectral", "layer", "none"] = "spectral"
    loss: Literal["hinge", "lsgan", "wgan-gp", "relativistic"] = "hinge"
    conditional: bool = True
    projection: int = 256
    rows: int = 128
    noise: float = 0.1
    penalty: float = 10.0
    lr: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    strong: float = 0.95
    patience: int = 200
    mode: Literal["trained", "frozen", "shuffled"] = "trained"

    def __post_init__(self) -> None:
        name = "DiscriminatorConfig"
        for key in ("depth", "width", "projection", "rows", "patience"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: {key} expected a whole number, got {value!r}")
        for key, low in (("depth", 0), ("width", 1), ("projection", 1), ("rows", 2), ("noise", 0), ("penalty", 0),
                         ("lr", 0), ("patience", 1)):  # fmt: skip
            at_least(name, key, getattr(self, key), low)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{name}: betas expected two numbers in [0, 1), got {self.betas!r}")
        one_of(name, "norm", self.norm, ("spectral", "layer", "none"))
        one_of(name, "loss", self.loss, tuple(LOSSES))
        one_of(name, "mode", self.mode, ("trained", "frozen", "shuffled"))
        if loss_of(self.loss).penalty and self.norm == "spectral":
            raise ValueError(
                f'{name}: loss="{self.loss}" bounds the slope already; use norm="layer" or norm="none" with it'
            )
        if not 0.5 < self.strong <= 1:
            raise ValueError(f"{name}: strong expected in (0.5, 1], got {self.strong!r}")


@dataclass(frozen=True)
class GANConfig(DistillConfig):
    """A training run with an adversary: what :class:`DistillConfig` says, and a discriminator whose verdict on the
    student's ``features`` is a further term of the loss.

    The term's weight lambda is set by the gradient balance: ``kappa`` (> 0) times the distillation's pull on the
    features. Up to ``warmup`` lambda is 0 while the discriminator learns. ValueError as :class:`DistillConfig`, and on
    a ``kappa`` that is not above 0.
    """

    adversarial: ClassVar[bool] = True

    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    kappa: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("GANConfig", "kappa", self.kappa, 0)
        if not self.kappa:
            raise ValueError("GANConfig: kappa expected > 0, got 0, a run without an adversary; use DistillPruner")
