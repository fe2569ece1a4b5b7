"""Floor 5: layers, and what puts them into a model and takes them out again."""

from .filters import Selection, prunable_linears, select_linears
from .fusion import Fusion, fuse_, unfuse_
from .linear import SparseLinear
from .masked import MaskedLinear
from .rounded import RoundedLinear
from .sparsify import DensifyReport, LayerChoice, SparsifyReport, densify_, explain, sparsify_
from .unpack import Attention, use_linears_

__all__ = [
    "Attention",
    "DensifyReport",
    "Fusion",
    "LayerChoice",
    "MaskedLinear",
    "RoundedLinear",
    "Selection",
    "SparseLinear",
    "SparsifyReport",
    "densify_",
    "explain",
    "fuse_",
    "prunable_linears",
    "select_linears",
    "sparsify_",
    "unfuse_",
    "use_linears_",
]
