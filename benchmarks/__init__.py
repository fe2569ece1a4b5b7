"""Benchmarks of the installed package: ``python -m benchmarks.run``, ``.compare``, ``.models``, ``.gpu``, ..."""

import sys
from pathlib import Path

# `python -m benchmarks.x` puts the checkout first on the path, where sparseprune has no compiled core unless it was
# installed editable: what is measured is the installed package.
if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent.parent:
    del sys.path[0]
