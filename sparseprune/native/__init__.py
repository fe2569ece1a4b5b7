"""Floor 1: the ops through the compiled core ``_C``. Each function has the name of its op and registers itself."""

from . import decoder, encoder, linear, linear_masked, masking, norms, packing, rounded, sddmm, selection  # noqa: F401
