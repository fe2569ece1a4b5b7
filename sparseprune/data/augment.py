"""Token-level augmentation: dropped, swapped and masked tokens, drawn from one seeded generator."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """Probabilities per token: ``drop`` removes it, ``swap`` exchanges it with its right neighbour, ``mask`` hides it.

    At least one token always stays; tokens whose id is in ``protect`` (separators, [CLS]) stay as they are.
    """

    drop: float = 0.0
    swap: float = 0.0
    mask: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop", "swap", "mask"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"Augment: {name} expected a probability in [0, 1), got {getattr(self, name)!r}")

    @property
    def active(self) -> bool:
        return bool(self.drop or self.swap or self.mask)

    def __call__(
        self, ids: list[int], mask_id: int, generator: torch.Generator, protect: Collection[int] = ()
    ) -> list[int]:
        """A changed copy of ``ids`` (length >= 1)."""
        if not self.active:
            return list(ids)
        draws = torch.rand(3, len(ids), generator=generator).tolist()
        out = list(ids)
        for i in range(len(out) - 1):
            if draws[1][i] < self.swap and out[i] not in protect and out[i + 1] not in protect:
                out[i], out[i + 1] = out[i + 1], out[i]
        out = [mask_id if draws[2][i] < self.mask and token not in protect else token for i, token in enumerate(out)]
        kept = [token for i, token in enumerate(out) if draws[0][i] >= self.drop or token in protect]
        if any(token not in protect for token in kept):
            return kept
        first = next((i for i, token in enumerate(out) if token not in protect), 0)
        return [token for i, token in enumerate(out) if i == first or token in protect]
