"""Floor 1: every op in plain torch: the truth in the tests and the fallback where no kernel runs.

Written for clarity and exactness, not for speed. Each function has the name of its op.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._registry import kernel


def _always(*args: Any) -> list[str]:
    return []


@kernel("apply_mask_", "reference", _always)
def apply_mask_(w: Tensor, mask: Tensor) -> None:
    """w, mask (bool): `[...]`. Zeroes w where mask is False."""
    w.masked_fill_(~mask, 0)
