"""The discriminator: tells the teacher's features from the student's, row by row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .config import DiscriminatorConfig

__all__ = ["Discriminator"]


class Discriminator(nn.Module):
    """A float32 MLP. features: `[M, features]`, condition: `[M, condition]` or None, tap: int64 `[M]`; returns `[M]`.

    ``depth`` hidden layers of ``width`` units with LeakyReLU 0.2; ``tap`` says which layer a row came from.
    """

    def __init__(self, config: DiscriminatorConfig, features: int, condition: int, taps: int):
        super().__init__()
        self.tap = nn.Embedding(taps, 16)
        wrap = spectral_norm if config.norm == "spectral" else (lambda layer: layer)
        layers: list[nn.Module] = []
        size = features + condition + 16
        for _ in range(config.depth):
            layers.append(wrap(nn.Linear(size, config.width)))
            if config.norm == "layer":
                layers.append(nn.LayerNorm(config.width))
            layers.append(nn.LeakyReLU(0.2))
            size = config.width
        self.net = nn.Sequential(*layers, wrap(nn.Linear(size, 1)))

    def forward(self, features: Tensor, condition: Tensor | None, tap: Tensor) -> Tensor:
        parts = [features] if condition is None else [features, condition]
        return self.net(torch.cat([*parts, self.tap(tap)], dim=-1).float()).squeeze(-1)
