"""Compensation: what pruning removed, given back in part, inside the same budget of parameters.

After pruning a Linear computes ``x S^T + b`` with sparse S instead of ``x W^T + b``. Three remedies, each fitted to the
layer's own inputs and judged on held-out ones:

- *bias shift*: the mean of what is missing goes into the bias;
- *survivors*: the kept weights are refitted by least squares, so that they stand in for the removed ones (the
  optimal brain surgeon's update of all survivors at once);
- *low rank*: ``y += (x A^T) B^T`` with A `[r, K]` and B `[N, r]`, the truncated SVD of the removed part, weighted by
  the inputs. Its ``r (N + K)`` parameters come off the kept weights, so that it must beat spending them there.
"""

from .layer import Compensation, compensate
from .model import CompensationReport, compensate_
from .refit import refit_survivors

__all__ = ["Compensation", "CompensationReport", "compensate", "compensate_", "refit_survivors"]
