"""The article's five factors, from the share of the parameters to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .._config import Config

__all__ = ["Factors"]


@dataclass(frozen=True)
class Factors(Config):
    """``retention`` R (share kept), ``reduction`` 1 - R (share removed), and three that depend on the reading:

    - convention ``"text"``: ``pruning`` = 1 - reduction = R, ``trim`` = 1 - R (1 - R), ``update`` = the smaller,
      which is always R;
    - convention ``"formula"``: ``pruning`` = sqrt(R), the retention of each axis of a matrix (sqrt(R) of the rows times
      sqrt(R) of the columns keeps R of it); ``trim`` = min(1, sqrt(R) / (1 - R)), which rescales the survivors for the
      mass removed; ``update`` = the smaller. For R = 0.1: .316228, .351364, .316228.
    """

    retention: float
    reduction: float
    pruning: float
    trim: float
    update: float

    @classmethod
    def from_retention(cls, retention: float, convention: Literal["text", "formula"] = "text") -> Factors:
        """retention: in (0, 1]. ValueError outside it and on another convention."""
        if not 0 < retention <= 1:
            raise ValueError(f"Factors: retention expected in (0, 1], the share kept, got {retention!r}")
        reduction = 1 - retention
        if convention == "text":
            pruning, trim = retention, 1 - retention * reduction
        elif convention == "formula":
            pruning = math.sqrt(retention)
            trim = 1.0 if retention == 1 else min(1.0, pruning / reduction)
        else:
            raise ValueError(f"Factors: convention expected 'text' or 'formula', got {convention!r}")
        return cls(retention, reduction, pruning, trim, min(pruning, trim))

    @classmethod
    def from_demand(cls, demand: float, convention: Literal["text", "formula"] = "formula") -> Factors:
        """demand y: in [0, 10]; R = max(0.1 y, 0.01). ValueError outside it."""
        if not 0 <= demand <= 10:
            raise ValueError(f"Factors: demand expected in [0, 10], got {demand!r}")
        return cls.from_retention(max(0.1 * demand, 0.01), convention)
