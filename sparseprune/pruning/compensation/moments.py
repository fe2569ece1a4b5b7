"""The inputs of a layer, and the outputs wanted of it, as least-squares problems need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "root_of"]


@dataclass
class Moments:
    """Of inputs x `[T, K]`: mean `[K]`, float64; covariance `[K, K]`; and the rows themselves, about the mean. Where
    the outputs wanted are not what a dense weight gives, those rows `[T, N]` about their mean `[N]`, float64.

    Sums are of rows about the mean: a mean that is large beside what varies would leave of a second moment about zero
    nothing but rounding.
    """

    mean: Tensor
    covariance: Tensor
    rows: Tensor
    wanted: Tensor | None
    wanted_mean: Tensor | None

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor | None) -> Moments:
        x, mean = _centred(inputs.float())
        y, wanted_mean = (None, None) if wanted is None else _centred(wanted.float())
        return cls(mean, x.T @ x / len(x), x, y, wanted_mean)

    def lengths(self) -> Tensor:
        """The root mean square `[K]` of each input."""
        return (self.covariance.diagonal() + self.mean.square()).sqrt().float()

    def system(self, weight: Tensor, centred: bool, damping: float) -> tuple[Tensor, Tensor]:
        """(H `[K, K]`, the dense `[N, K]` to come near in its metric). H: the covariance, or the second moment about
        zero, with ``damping`` times its mean diagonal on the diagonal. The goal: the weight itself, or the one that
        gives the outputs wanted best, by least squares, drawn to the weight in use by the damping.
        """
        h = self.covariance.clone() if centred else self.covariance + _product(self.mean, self.mean)
        level = float(h.diagonal().mean())
        spare = damping * (level if level > torch.finfo(h.dtype).tiny else 1.0)  # of inputs that do not vary: plain
        h.diagonal().add_(spare)
        if self.wanted is None or self.wanted_mean is None:
            return h, weight
        cross = self.wanted.T @ self.rows / len(self.rows)
        if not centred:
            cross += _product(self.wanted_mean, self.mean)
        return h, torch.cholesky_solve((cross + spare * weight).T, root_of(h, damping)).T

    def shift(self, goal: Tensor, effective: Tensor) -> Tensor:
        """The bias shift `[N]` that makes the means of the outputs right."""
        return self._missed(goal, effective).float()

    def error(self, weight: Tensor, effective: Tensor, shift: Tensor | None) -> float:
        """Mean over the inputs of ||y - effective x - shift||^2 for the outputs wanted, by default weight x."""
        missed = self._missed(weight, effective)
        if shift is not None:
            missed = missed - shift
        if self.wanted is not None:
            spread = (self.wanted - self.rows @ effective.T).square().sum(1).mean()
        else:
            missing = weight - effective
            spread = ((missing @ self.covariance) * missing).sum()
        return float(spread) + float(missed.square().sum())

    def _missed(self, weight: Tensor, effective: Tensor) -> Tensor:
        """By how much the mean `[N]` of the outputs is missed, float64."""
        if self.wanted_mean is None:
            return (weight - effective).double() @ self.mean
        return self.wanted_mean - effective.double() @ self.mean


def root_of(h: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of H; ValueError where the damping was too little for one."""
    root, info = torch.linalg.cholesky_ex(h)
    if int(info):
        raise ValueError(
            f"compensate: second moments of the inputs expected positive definite with damping {damping:g}; raise "
            "damping (0.01 by default), or give more inputs"
        )
    return root


def _centred(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows about their mean, the mean in float64). Taken off in two steps, so that what float32 rounds is the
    distance from the mean and not the mean.
    """
    about = rows.mean(0, dtype=torch.float64).float()
    rows = rows - about
    rest = rows.mean(0, dtype=torch.float64)
    return rows.sub_(rest.float()), about.double() + rest


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.outer(a.float(), b.float())
