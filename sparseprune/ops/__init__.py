"""Floor 3: the public ops. Each is registered with torch.library (schema, fake, autograd) as
``torch.ops.sparseprune.NAME``.
"""

from .decoder import decoder
from .encoder import encoder, prompt
from .linear import (
    bsr_linear,
    csr_linear,
    inferred_linear,
    layout_linear,
    nm_linear,
    packed_linear,
    trained_linear,
)
from .linear_masked import masked_linear
from .masking import apply_mask_, mask_gradient_, masked_adamw_, masked_copy, threshold_mask
from .norms import add_layer_norm, rms_norm
from .packing import pack, pack_for_gpu, refill, unpack
from .rounded import rounded_linear
from .sddmm import sddmm
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
    "decoder",
    "encoder",
    "inferred_linear",
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
    "pack_for_gpu",
    "packed_linear",
    "prompt",
    "radix_histogram",
    "refill",
    "rms_norm",
    "rounded_linear",
    "sddmm",
    "threshold_mask",
    "topk_mask",
    "trained_linear",
    "unpack",
]
