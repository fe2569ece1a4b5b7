"""Floor 4: timing that can be trusted: interleaved, checked before it is reported, beside measured limits.

Serves ``sparsify_(layout="auto")``, ``sparseprune bench`` and ``benchmarks/``.
"""

from .cache import TimingCache, cache_path, default_cache, layer_key
from .choose import Choice, choose_fastest
from .command import main
from .machine import describe, one_line
from .timing import Comparison, Spread, interleave

__all__ = [
    "Choice",
    "Comparison",
    "Spread",
    "TimingCache",
    "cache_path",
    "choose_fastest",
    "default_cache",
    "describe",
    "interleave",
    "layer_key",
    "main",
    "one_line",
]
