"""Floor 6: pruning. Scores -> exact top-k under a granularity -> mask; schedules say when, allocation says how much
of each.
"""

from .allocation import erk_densities, kept_count, weighted_counts
from .compensation import (
    Compensation,
    CompensationReport,
    collect_inputs,
    collect_outputs,
    compensate,
    compensate_,
    refit_survivors,
)
from .criteria import Criterion, PruneContext, criterion_names, make_criterion, register_criterion
from .factors import Factors
from .granularity import NM, Block, Element, Granularity, Heads, Mixture, Neurons, Plan, UnitMap, make_granularity
from .masks import MaskSet
from .prune import PruneReport, prune_
from .pruner import PruneConfig, Pruner
from .schedules import Constant, Cubic, Linear, OneShot, RetentionSchedule, Schedule
from .structures import attention_blocks, feed_forwards, restore_shapes, shrink_

from . import oneshot  # isort: skip  # registers its criteria, needs the modules above

__all__ = [
    "NM",
    "Block",
    "Compensation",
    "CompensationReport",
    "Constant",
    "Criterion",
    "Cubic",
    "Element",
    "Factors",
    "Granularity",
    "Heads",
    "Linear",
    "MaskSet",
    "Mixture",
    "Neurons",
    "OneShot",
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
    "refit_survivors",
    "register_criterion",
    "restore_shapes",
    "shrink_",
    "weighted_counts",
]
