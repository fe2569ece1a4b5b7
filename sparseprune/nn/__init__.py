"""Floor 5: layers, and what puts them into a model and takes them out again."""

from .averaging import guard_averaging
from .explain import explain
from .expose import Attention, expose_linears_
from .filters import Selection, prunable_linears, select_linears
from .fusion import Fusion, fuse_, unfuse_
from .linear import SparseLinear
from .masked import MaskedLinear
from .rounded import RoundedLinear
from .sparsify import DensifyReport, LayerChoice, SparsifyReport, densify_, sparsify_
from .stacks import StackChoice, drop_stacks_, stack_of, use_stacks_

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
    "StackChoice",
    "densify_",
    "drop_stacks_",
    "explain",
    "expose_linears_",
    "fuse_",
    "prunable_linears",
    "select_linears",
    "sparsify_",
    "stack_of",
    "unfuse_",
    "use_stacks_",
]

guard_averaging()
