"""What a training run that prunes can be told: a frozen configuration, JSON both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .._config import Config
from ..nn.simulated import check_dtypes
from ..pruning.criteria import Criterion, criterion_names, make_criterion
from ..pruning.granularity import Granularity
from ..pruning.schedules import CubicSchedule, Schedule

__all__ = ["METHODS", "MOST_EPOCHS", "DistillConfig", "at_least", "criterion_of", "one_of"]

#: Where the scores of the masks can come from, beside registered criteria; gates.py and trainer.py do what each says.
METHODS = ("scores", "magnitude", "movement")
#: A small set is read so often at the most to reach ``min_steps``.
MOST_EPOCHS = 40
_BY_DEFAULT = CubicSchedule(0.1)


def at_least(owner: str, name: str, value: float, low: float) -> None:
    """ValueError unless the value is a finite number >= low."""
    if not (isinstance(value, int | float) and low <= value < float("inf")):
        raise ValueError(f"{owner}: {name} expected a number >= {low:g}, got {value!r}")


def one_of(owner: str, name: str, value: Any, known: tuple[str, ...]) -> None:
    """ValueError unless the value is known."""
    if value not in known:
        raise ValueError(f"{owner}: {name} expected one of {', '.join(known)}, got {value!r}")


def criterion_of(owner: str, method: str) -> Criterion | None:
    """A new criterion of the registered name; None for one of ``METHODS``, which the trainer computes itself.

    ValueError on an unknown name, and on a criterion that needs data or chooses its masks by itself.
    """
    if method in METHODS:
        return None
    if method not in criterion_names():
        raise ValueError(
            f"{owner}: method expected one of {', '.join(METHODS)} or the name of a registered criterion, got "
            f"{method!r}; call register_criterion first"
        )
    criterion = make_criterion(method)
    if criterion.needs_data or type(criterion).masks is not Criterion.masks:
        why = "needs data" if criterion.needs_data else "chooses its masks by itself"
        raise ValueError(
            f"{owner}: method expected a criterion of scores from weights and gradients, got {method!r}, which {why}; "
            "use prune_"
        )
    return criterion


@dataclass(frozen=True)
class DistillConfig(Config):
    """One training run that prunes with a teacher.

    method: where the scores come from: "scores" learns them, the default, for on a pretrained model it keeps more than
    magnitude and elsewhere as much (docs/lab/gan.md); "magnitude" takes ``|W|``; "movement" sums -W dL/dW; any other
    name is a criterion's (:func:`~sparseprune.pruning.register_criterion`), which observes the gradients of each step,
    unclipped, and whose state is in the checkpoint. schedule: the density, a share of the weights in (0, 1], over the
    pruning window, by default the cubic one; density: its last, checked against it, or what the default one ends at.
    granularity: a name, a granularity, or a dict from name patterns (fnmatch) to them. scope: "global" or "layer";
    floor: the least density of a layer under "global", as a share of the density of all; None as in ``prune_``, so that
    no layer starves.

    The run lasts ``steps`` of the optimiser (default: ``epochs`` > 0 times the loader, and ``min_steps`` at least as
    far as 40 epochs make them), or until ``max_seconds`` are over, whichever comes first; its progress runs from 0 to
    1, and 0 <= warmup < prune_until <= freeze_at <= 1 are places in it. Up to ``warmup`` the learning rate rises and
    nothing is pruned; from there to ``prune_until`` the density falls; masks still move until ``freeze_at``; then they
    are hard, and the rest heals.

    loss: ``ce`` CE + ``kd`` tau^2 KL(teacher, student) + ``hidden`` mean square of the normalised hidden states, those
    of ``features``: "auto", "logits", names of modules, or a callable; tau is ``temperature`` > 0; the three weights
    are >= 0 and not all 0. lr: the weights'; None takes it from the hidden size of a model of transformers (4e-4 at
    384, 1e-4 at 768: :func:`~sparseprune.training.rates.rate_of`), and 1e-3 for any other; scores_lr: that of learned
    scores; weight_decay: of matrices, by AdamW; clip > 0: the largest norm of all gradients of a step. gumbel:
    temperature of the Gumbel noise on the scores at the start; it falls to 0 at the end of the window.

    compensation: what stands in, from the freeze on, for what the masks removed, so that each layer's outputs come
    nearer to the teacher's; fitted to the last batches, each layer taking what serves it best on the validation split
    (without one, on held-out rows), or nothing: "bias" shifts the bias; "survivors" refits the kept weights, or shifts
    the bias, or both; "low_rank" adds a term of rank r that takes r (N + K) weights off the mask and heals with the
    rest; "best" chooses among all of these (:func:`sparseprune.pruning.compensate`). accumulate >= 1: batches a step.
    autocast: "bfloat16" computes the forward passes so. evaluate_every: steps between two evaluations on the validation
    split (default: a tenth of the run); patience: evaluations after the freeze without a better state, after which the
    run ends (default: never). seed: of all that is drawn. dropout: train with the model's dropout on, in teacher and
    student alike. rescale: what the survivors are multiplied by once, when the masks are final (the article's trim
    factor). heal: "auto" computes on the sparse kernels where that is faster: once the masks are hard, forward
    and backward; before, where at most a fifth is kept, the outputs and the gradients of the inputs; "dense" never.
    label_smoothing: share of the target spread over all classes, in training only. input_noise: standard deviation of
    normal noise on the input embeddings (or on floating inputs), as a share of theirs; teacher and student get the
    same. value_dtype, activations: those that ``sparsify_`` will be given; once the masks are hard, the pruned Linears
    round as its kernels will, gradients pass straight through, and the best state is chosen so.

    ValueError on a value outside these ranges.
    """

    VERSION: ClassVar[int] = 2
    adversarial: ClassVar[bool] = False

    method: str = "scores"
    schedule: Schedule = field(default_factory=lambda: _BY_DEFAULT)
    density: float | None = None
    granularity: str | Granularity | dict[str, str | Granularity] = "element"
    scope: Literal["global", "layer"] = "global"
    features: str | tuple[str, ...] | Callable[..., Any] = "auto"
    epochs: float = 8.0
    steps: int | None = None
    max_seconds: float | None = None
    warmup: float = 0.05
    prune_until: float = 0.55
    freeze_at: float = 0.65
    lr: float | None = None
    scores_lr: float = 1e-2
    weight_decay: float = 1e-2
    clip: float = 1.0
    ce: float = 0.1
    kd: float = 0.9
    hidden: float = 0.9
    temperature: float = 2.0
    gumbel: float = 0.0
    accumulate: int = 1
    autocast: Literal["none", "bfloat16"] = "none"
    dropout: bool = False
    compensation: Literal["none", "bias", "survivors", "low_rank", "best"] = "none"
    evaluate_every: int | None = None
    patience: int | None = None
    seed: int = 0
    floor: float | None = None
    rescale: float = 1.0
    heal: Literal["auto", "dense"] = "auto"
    label_smoothing: float = 0.0
    input_noise: float = 0.0
    min_steps: int = 0
    value_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    activations: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        name = type(self).__name__
        criterion_of(name, self.method)
        one_of(name, "scope", self.scope, ("global", "layer"))
        one_of(name, "autocast", self.autocast, ("none", "bfloat16"))
        one_of(name, "compensation", self.compensation, ("none", "bias", "survivors", "low_rank", "best"))
        one_of(name, "heal", self.heal, ("auto", "dense"))
        check_dtypes(name, self.value_dtype, self.activations)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"{name}: label_smoothing expected in [0, 1), got {self.label_smoothing!r}")
        if not isinstance(self.schedule, Schedule):
            got = repr(self.schedule)
            raise ValueError(f"{name}: schedule expected a Schedule such as sp.CubicSchedule(0.1), got {got}")
        if self.density is not None and self.schedule is _BY_DEFAULT:
            object.__setattr__(self, "schedule", CubicSchedule(self.density))
        if self.lr is not None:
            at_least(name, "lr", self.lr, 0)
        for key, low in (("scores_lr", 0), ("weight_decay", 0), ("ce", 0), ("kd", 0), ("hidden", 0),
                         ("gumbel", 0), ("input_noise", 0), ("min_steps", 0), ("accumulate", 1)):  # fmt: skip
            at_least(name, key, getattr(self, key), low)
        if not 0 < self.rescale < float("inf"):
            raise ValueError(f"{name}: rescale expected a number > 0, got {self.rescale!r}")
        for key in ("steps", "evaluate_every", "patience", "accumulate", "min_steps"):
            value = getattr(self, key)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name}: {key} expected a whole number, got {value!r}")
        for key in ("epochs", "clip", "temperature", "max_seconds", "steps", "evaluate_every", "patience"):
            value = getattr(self, key)
            if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
                raise ValueError(f"{name}: {key} expected a number > 0, got {value!r}")
        if not 0 <= self.warmup < self.prune_until <= self.freeze_at <= 1:
            raise ValueError(
                f"{name}: expected 0 <= warmup < prune_until <= freeze_at <= 1, "
                f"got {self.warmup!r}, {self.prune_until!r}, {self.freeze_at!r}"
            )
        if self.density is not None and not abs(self.density - self.schedule.final_density) <= 1e-12:
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
    def learned(self) -> bool:
        """Whether scores are parameters of an optimiser."""
        return self.method == "scores"

    @property
    def rounds(self) -> bool:
        """Whether healing simulates rounded values, and activations."""
        return self.value_dtype != "float32"

    @property
    def scored(self) -> bool:
        """Whether units have scores of their own, which gradients reach."""
        return self.method in ("scores", "movement")

    def density_at(self, progress: float) -> float:
        """The density in use at this share of the whole run."""
        return self.schedule.density((progress - self.warmup) / (self.prune_until - self.warmup))
