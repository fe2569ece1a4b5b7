"""What the adversarial pruner can be told: two frozen configurations, JSON both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from .._config import Config
from ..pruning.granularity import Granularity
from ..pruning.schedules import RetentionSchedule, Schedule

__all__ = ["DiscriminatorConfig", "GANConfig"]


def _at_least(owner: str, name: str, value: float, low: float) -> None:
    if not (isinstance(value, int | float) and low <= value < float("inf")):
        raise ValueError(f"{owner}: {name} expected a number >= {low:g}, got {value!r}")


def _one_of(owner: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{owner}: {name} expected one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True)
class DiscriminatorConfig(Config):
    """The discriminator's architecture, its game and its optimiser.

    depth, width: hidden layers and their units. norm: "spectral", "layer" or "none". conditional: it sees the
    teacher's embedding of the same token beside the feature. projection: features wider than this are projected to it.
    rows: feature rows a layer and a step. noise: standard deviation of the instance noise at the start; it falls to 0.
    penalty: weight of the gradient penalty (wgan-gp), taken every fourth step. strong: accuracy above which it rests.
    mode: "trained", or one of the two controls, "frozen" (random and never trained) and "shuffled" (trained on
    shuffled labels).
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
        for key, low in (("depth", 0), ("width", 1), ("projection", 1), ("rows", 2), ("noise", 0), ("penalty", 0),
                         ("lr", 0), ("patience", 1)):  # fmt: skip
            _at_least(name, key, getattr(self, key), low)
        _one_of(name, "norm", self.norm, ("spectral", "layer", "none"))
        _one_of(name, "loss", self.loss, ("hinge", "lsgan", "wgan-gp", "relativistic"))
        _one_of(name, "mode", self.mode, ("trained", "frozen", "shuffled"))
        if self.loss == "wgan-gp" and self.norm == "spectral":
            raise ValueError(
                f'{name}: loss="wgan-gp" bounds the slope already; use norm="layer" or norm="none" with it'
            )
        if not 0.5 < self.strong <= 1:
            raise ValueError(f"{name}: strong expected in (0.5, 1], got {self.strong!r}")


@dataclass(frozen=True)
class GANConfig(Config):
    """One training run that prunes. Every arm of the ablation is a setting of this.

    method: where the scores come from: "scores" learns them, the default, for on a pretrained model it keeps more than
    magnitude and elsewhere as much (docs/gan.md); "gan" learns them with the adversarial term too; "magnitude" takes
    |W|; "movement" sums -W dL/dW. schedule: the density over the pruning window; density: checked against it.
    granularity: a name, a granularity, or a dict from name patterns (fnmatch) to them. scope: "global" or
    "layer"; floor: the least density of a layer under "global", as a share of the density of all.

    The run lasts ``steps`` (default: ``epochs`` times the loader), or until ``max_seconds`` are over, whichever comes
    first; its progress runs from 0 to 1. Up to ``warmup`` the adversarial weight is 0 while the discriminator learns;
    from there to ``prune_until`` the density falls; masks still move until ``freeze_at``; then they are hard, and the
    rest heals.

    loss: ``ce`` CE + ``kd`` tau^2 KL(teacher, student) + ``hidden`` mean square of the normalised hidden states +
    lambda L_adv, with lambda set by the gradient balance ``kappa``. lr: the weights' (3e-5 is careful with a pretrained
    model; MiniLM-L6 keeps more with 4e-4, docs/gan.md). gumbel: temperature of the Gumbel noise on the scores at the
    start; it falls to 0 at the end of the window.
    compensation: what stands in, from the freeze on, for what the masks removed, so that each layer's outputs come
    nearer to the teacher's; fitted to the last batches, each layer taking what serves it best on the validation split
    (without one, on held-out rows), or nothing:
    "bias" shifts the bias; "survivors" refits the kept weights, or shifts the bias, or both; "low_rank" adds a term of
    rank r that takes r (N + K) weights off the mask and heals with the rest; "best" chooses among all of these
    (:func:`sparseprune.pruning.compensate`). accumulate: batches a step. dropout: train with the model's
    dropout on, in teacher and student alike.
    """

    method: Literal["gan", "scores", "magnitude", "movement"] = "scores"
    schedule: Schedule = field(default_factory=lambda: RetentionSchedule(r0=0.1, z_min=0.1))
    density: float | None = None
    granularity: str | Granularity | dict[str, str | Granularity] = "element"
    scope: Literal["global", "layer"] = "global"
    features: str | tuple[str, ...] | Callable[..., Any] = "auto"
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    epochs: float = 8.0
    steps: int | None = None
    max_seconds: float | None = None
    warmup: float = 0.05
    prune_until: float = 0.55
    freeze_at: float = 0.65
    lr: float = 1e-3
    scores_lr: float = 1e-2
    weight_decay: float = 1e-2
    clip: float = 1.0
    ce: float = 0.1
    kd: float = 0.9
    hidden: float = 0.9
    temperature: float = 2.0
    kappa: float = 0.2
    gumbel: float = 0.0
    accumulate: int = 1
    autocast: Literal["none", "bfloat16"] = "none"
    dropout: bool = False
    compensation: Literal["none", "bias", "survivors", "low_rank", "best"] = "none"
    evaluate_every: int | None = None
    patience: int | None = None
    seed: int = 0
    floor: float = 0.0

    def __post_init__(self) -> None:
        name = "GANConfig"
        _one_of(name, "method", self.method, ("gan", "scores", "magnitude", "movement"))
        _one_of(name, "scope", self.scope, ("global", "layer"))
        _one_of(name, "autocast", self.autocast, ("none", "bfloat16"))
        _one_of(name, "compensation", self.compensation, ("none", "bias", "survivors", "low_rank", "best"))
        for key, low in (("lr", 0), ("scores_lr", 0), ("weight_decay", 0), ("ce", 0), ("kd", 0), ("hidden", 0),
                         ("kappa", 0), ("gumbel", 0), ("accumulate", 1)):  # fmt: skip
            _at_least(name, key, getattr(self, key), low)
        for key in ("epochs", "clip", "temperature", "max_seconds", "steps", "evaluate_every", "patience"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{name}: {key} expected a number > 0, got {value!r}")
        if not 0 <= self.warmup < self.prune_until <= self.freeze_at <= 1:
            raise ValueError(
                f"{name}: expected 0 <= warmup < prune_until <= freeze_at <= 1, "
                f"got {self.warmup!r}, {self.prune_until!r}, {self.freeze_at!r}"
            )
        if self.density is not None and abs(self.density - self.schedule.final_density) > 1e-12:
            raise ValueError(
                f"{name}: density {self.density!r} differs from the schedule's final density "
                f"{self.schedule.final_density!r}; give one of them"
            )
        if not (self.ce or self.kd or self.hidden):
            raise ValueError(f"{name}: ce, kd and hidden are all 0: nothing is left to train on")

    @property
    def final_density(self) -> float:
        return self.schedule.final_density

    @property
    def adversarial(self) -> bool:
        return self.method == "gan" and self.kappa > 0

    @property
    def learned(self) -> bool:
        return self.method in ("gan", "scores")

    def density_at(self, progress: float) -> float:
        """The density in use at this share of the whole run."""
        return self.schedule.density((progress - self.warmup) / (self.prune_until - self.warmup))
