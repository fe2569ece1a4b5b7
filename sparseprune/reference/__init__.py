"""Floor 1: every op in plain torch: the truth in the tests and the fallback where no kernel runs.

Written for clarity and exactness, not for speed. Each function has the name of its op, and lies in the file of its
family.
"""

from ..activations import ACTIVATIONS, activate
from .decoder import decoder
from .encoder import encoder, prompt
from .linear import (
    bsr_linear,
    csr_linear,
    csr_linear_dx,
    csr_to_dense,
    dense_linear,
    inferred_linear,
    masked_linear,
    masked_linear_dw,
    masked_linear_dx,
    nm_linear,
    nm_linear_dx,
    packed_linear,
    trained_linear,
)
from .masking import apply_mask_, mask_gradient_, masked_adamw_, masked_copy, threshold_mask
from .norms import add_layer_norm, rms_norm
from .packing import gather_values
from .rounded import rounded_linear
from .sddmm import nm_sddmm, packed_sddmm, sddmm
from .selection import (
    RADIX_BINS,
    RADIX_DIGITS,
    block_scores,
    cut_mask,
    key_value,
    kth_magnitude,
    magnitude_mask,
    nm_mask,
    radix_histogram,
    sortable_key,
    topk_mask,
)

__all__ = [
    "ACTIVATIONS",
    "RADIX_BINS",
    "RADIX_DIGITS",
    "activate",
    "add_layer_norm",
    "apply_mask_",
    "block_scores",
    "bsr_linear",
    "csr_linear",
    "csr_linear_dx",
    "csr_to_dense",
    "cut_mask",
    "decoder",
    "dense_linear",
    "encoder",
    "gather_values",
    "inferred_linear",
    "key_value",
    "kth_magnitude",
    "magnitude_mask",
    "mask_gradient_",
    "masked_adamw_",
    "masked_copy",
    "masked_linear",
    "masked_linear_dw",
    "masked_linear_dx",
    "nm_linear",
    "nm_linear_dx",
    "nm_mask",
    "nm_sddmm",
    "packed_linear",
    "packed_sddmm",
    "prompt",
    "radix_histogram",
    "rms_norm",
    "rounded_linear",
    "sddmm",
    "sortable_key",
    "threshold_mask",
    "topk_mask",
    "trained_linear",
]
