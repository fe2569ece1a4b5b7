"""Floor 1: the ops through the compiled core ``_C``. Each function has the name of its op and registers itself."""

from . import decode, masking, matmul, selection  # noqa: F401
