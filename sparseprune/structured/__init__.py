"""Floor 6: heads and neurons: found by structure, their units, cut out for real, the configuration after it."""

from .find import attention_blocks, feed_forwards, position_biases
from .shrink import ShrinkReport, restore_shapes, shrink_
from .units import AttentionBlock, FeedForward, Share, head_groups

__all__ = [
    "AttentionBlock",
    "FeedForward",
    "Share",
    "ShrinkReport",
    "attention_blocks",
    "feed_forwards",
    "head_groups",
    "position_biases",
    "restore_shapes",
    "shrink_",
]
