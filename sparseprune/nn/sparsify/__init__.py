"""sparsify_ and densify_: layers made sparse where that pays, and dense again.

:mod:`.sparsify` decides layer by layer, :mod:`.measure` says what is fastest, :mod:`.rounding` sees to what stays
dense, :mod:`.densify` undoes it all.
"""

from .densify import densify_
from .reports import DensifyReport, LayerChoice, SparsifyReport
from .sparsify import sparsify_

__all__ = ["DensifyReport", "LayerChoice", "SparsifyReport", "densify_", "sparsify_"]
