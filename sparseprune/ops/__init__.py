"""Floor 3: the public ops. Each is registered with torch.library (schema, fake, autograd) as
``torch.ops.sparseprune.NAME``.
"""

from .masking import apply_mask_, mask_gradient_, masked_adamw_, masked_copy, threshold_mask
from .selection import (
    RadixSelect,
    block_scores,
    cut_mask,
    kth_magnitude,
    magnitude_mask,
    nm_mask,
    radix_histogram,
    topk_mask,
)

__all__ = [
    "RadixSelect",
    "apply_mask_",
    "block_scores",
    "cut_mask",
    "kth_magnitude",
    "magnitude_mask",
    "mask_gradient_",
    "masked_adamw_",
    "masked_copy",
    "nm_mask",
    "radix_histogram",
    "threshold_mask",
    "topk_mask",
]
