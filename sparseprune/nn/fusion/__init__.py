"""What follows a SparseLinear, moved into its kernel; :mod:`.fuse` says which patterns.

:mod:`.patterns` finds them, :mod:`.activations` and :mod:`.modules` hold what runs in their place, :mod:`.hooks` knows
who watches. A new pattern is a finder there, a module here, and a function in :mod:`.fuse` that tries both forms.
"""

from .activations import FusedActivations, fused_activations, keep_attributes_
from .fuse import Fusion, fuse_, is_fused, unfuse_
from .hooks import hand_on_hooks_, hooked
from .modules import FUSED, FusedOutput, FusedRMSNorm
from .patterns import epilogue_of

__all__ = [
    "FUSED",
    "FusedActivations",
    "FusedOutput",
    "FusedRMSNorm",
    "Fusion",
    "epilogue_of",
    "fuse_",
    "fused_activations",
    "hand_on_hooks_",
    "hooked",
    "is_fused",
    "keep_attributes_",
    "unfuse_",
]
