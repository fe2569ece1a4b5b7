"""Floor 0: packed weights, the form in which a kernel of the compiled core reads a sparse matrix.

A form is made once from the structure of a canonical layout (:mod:`.structure`) and never saved; fresh values enter it
by one gather (:mod:`.packed`). Its kind says how the entries lie: each has a module with ``pack``, which lays them out,
and ``flat_positions``, which says where in the dense matrix each lies, and a line in :mod:`.places`. Kernels, the
reference and the ops all read the format from here.
"""

from .bitmask8 import pack as pack_bitmask8
from .bitmask8 import wanted as wants_bitmask8
from .dtypes import ACTIVATION_DTYPES, VALUE_CODES, VALUE_DTYPES
from .gpu import DELTA_RUN, DELTA_STEP, STRIP_COLUMNS, STRIP_ROWS, delta_entries
from .huge_pages import in_huge_pages
from .kinds import GpuKind, Kind
from .packed import Packed, check_length, with_values
from .places import flat_positions, to_dense
from .plan import SLACK, Plan
from .quads import QUAD, scale_of
from .quads import pack as pack_quads
from .quads import reach as reach_in_quads
from .quads import why_not as why_not_quads
from .quantise import quantise
from .structure import nm_as_csr, pack_structure

__all__ = [
    "ACTIVATION_DTYPES",
    "DELTA_RUN",
    "DELTA_STEP",
    "QUAD",
    "SLACK",
    "STRIP_COLUMNS",
    "STRIP_ROWS",
    "VALUE_CODES",
    "VALUE_DTYPES",
    "GpuKind",
    "Kind",
    "Packed",
    "Plan",
    "check_length",
    "delta_entries",
    "flat_positions",
    "in_huge_pages",
    "nm_as_csr",
    "pack_bitmask8",
    "pack_quads",
    "pack_structure",
    "quantise",
    "reach_in_quads",
    "scale_of",
    "to_dense",
    "wants_bitmask8",
    "why_not_quads",
    "with_values",
]
