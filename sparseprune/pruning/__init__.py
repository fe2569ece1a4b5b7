"""Floor 7: pruning. Scores -> exact top-k under a granularity -> mask; schedules say when, allocation says how much
of each.
"""

from ..structured import attention_blocks, feed_forwards, restore_shapes, shrink_
from .compensation import Compensation, CompensationReport, compensate, compensate_, refit_survivors
from .counts import erk_densities, kept_count, weighted_counts
from .criteria import Criterion, PruneContext, criterion_names, make_criterion, register_criterion
from .factors import Factors
from .fisher import Fisher
from .granularity import NM, Block, Element, Granularity, Heads, Mixture, Neurons, make_granularity
from .masks import MaskSet
from .plan import Plan
from .prune import PruneReport, prune_, prune_below_
from .pruner import PruneConfig, Pruner
from .reading import collect_inputs, collect_outputs
from .schedules import ConstantSchedule, CubicSchedule, LinearSchedule, OneShotSchedule, RetentionSchedule, Schedule
from .units import UnitMap

from . import oneshot  # isort: skip  # registers its criteria, needs the modules above

__all__ = [
    "NM",
    "Block",
    "Compensation",
    "CompensationReport",
    "ConstantSchedule",
    "Criterion",
    "CubicSchedule",
    "Element",
    "Factors",
    "Fisher",
    "Granularity",
    "Heads",
    "LinearSchedule",
    "MaskSet",
    "Mixture",
    "Neurons",
    "OneShotSchedule",
    "Plan",
    "PruneConfig",
    "PruneContext",
    "PruneReport",
    "Pruner",
    "RetentionSchedule",
    "Schedule",
    "UnitMap",
    "attention_blocks",
    "collect_inputs",
    "collect_outputs",
    "compensate",
    "compensate_",
    "criterion_names",
    "erk_densities",
    "feed_forwards",
    "kept_count",
    "make_criterion",
    "make_granularity",
    "oneshot",
    "prune_",
    "prune_below_",
    "refit_survivors",
    "register_criterion",
    "restore_shapes",
    "shrink_",
    "weighted_counts",
]
