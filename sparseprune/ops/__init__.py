"""Floor 3: the public ops. Each is registered with torch.library (schema, fake, autograd) as
``torch.ops.sparseprune.NAME``.
"""

from .linear import (
    add_layer_norm,
    bsr_linear,
    csr_linear,
    layout_linear,
    masked_linear,
    nm_linear,
    pack,
    packed_linear,
    repack,
    rms_norm,
    rounded_linear,
    sddmm,
    trained_linear,
)
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
    "add_layer_norm",
    "apply_mask_",
    "block_scores",
    "bsr_linear",
    "csr_linear",
    "cut_mask",
    "kth_magnitude",
    "layout_linear",
    "magnitude_mask",
    "mask_gradient_",
    "masked_adamw_",
    "masked_copy",
    "masked_linear",
    "nm_linear",
    "nm_mask",
    "pack",
    "packed_linear",
    "radix_histogram",
    "repack",
    "rms_norm",
    "rounded_linear",
    "sddmm",
    "threshold_mask",
    "topk_mask",
    "trained_linear",
]
