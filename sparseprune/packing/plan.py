"""The sizes of a packed weight."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SLACK", "Plan"]

SLACK = 64  # entries that a kernel may read, never use, behind the last one


class Plan(NamedTuple):
    """What a kernel knows of a weight `[rows, columns]` beside its tensors. A tuple of whole numbers, so that it passes
    through ``torch.library`` as ``int[]``; ``Plan(*numbers)`` names them again.

    kind: a :class:`~.kinds.Kind`; height: rows that share their columns; k_block: columns of a K-block; row_block: rows
    of a row block.
    """

    kind: int
    rows: int
    columns: int
    height: int
    k_block: int
    row_block: int
