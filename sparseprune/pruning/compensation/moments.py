"""The inputs of a layer, and the outputs wanted of it, as least-squares problems need them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments"]


@dataclass
class Moments:
    """Of inputs x `[T, K]`: mean `[K]`, second moment `[K, K]` about zero; and the rows themselves, with the outputs
    wanted `[T, N]`, where these are not what a dense weight gives.
    """

    mean: Tensor
    second: Tensor
    rows: Tensor
    wanted: Tensor | None

    @classmethod
    def of(cls, inputs: Tensor, wanted: Tensor | None) -> Moments:
        x = inputs.float()
        return cls(x.mean(0), x.T @ x / len(x), x, None if wanted is None else wanted.float())

    def goal(self, weight: Tensor, h: Tensor, centred: bool) -> Tensor:
        """The dense `[N, K]` to come near in the metric h of :meth:`fitted`: the weight itself, or the one that gives
        the outputs wanted best, by least squares, drawn to the weight in use by the damping.
        """
        if self.wanted is None:
            return weight
        x, y = (self.rows - self.mean, self.wanted - self.wanted.mean(0)) if centred else (self.rows, self.wanted)
        spare = h.diagonal() - x.square().mean(0)  # the damping
        return torch.linalg.solve(h, (y.T @ x / len(x) + weight * spare).T).T

    def shift(self, goal: Tensor, effective: Tensor) -> Tensor:
        """The bias shift `[N]` that makes the means of the outputs right."""
        if self.wanted is None:
            return (goal - effective) @ self.mean
        return self.wanted.mean(0) - effective @ self.mean

    def fitted(self, centred: bool, damping: float) -> Tensor:
        """The matrix H of the least-squares problem, symmetric and positive definite."""
        h = self.second - torch.outer(self.mean, self.mean) if centred else self.second
        level = h.diagonal().mean().clamp_min(torch.finfo(h.dtype).tiny)
        return h + damping * level * torch.eye(len(h), dtype=h.dtype, device=h.device)

    def error(self, weight: Tensor, effective: Tensor, shift: Tensor | None) -> float:
        """Mean over the inputs of ||y - effective x - shift||^2 for the outputs wanted, by default weight x."""
        if self.wanted is not None:
            given = self.rows @ effective.T + (0 if shift is None else shift)
            return float((self.wanted - given).square().sum(1).mean())
        missing = weight - effective
        total = ((missing @ self.second) * missing).sum()
        if shift is not None:
            total = total - 2 * shift @ (missing @ self.mean) + shift @ shift
        return float(total)
