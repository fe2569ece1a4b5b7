"""The discriminator: tells the teacher's features from the student's, row by row, and the losses of the two sides."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .config import DiscriminatorConfig

__all__ = ["Discriminator", "adversarial_loss", "discriminator_loss", "gradient_penalty", "pair_accuracy"]


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


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """real, fake: `[M]`, scores of the teacher's and the student's features; returns a scalar to minimise.

    hinge (Lim and Ye 2017), lsgan (Mao et al. 2017), wgan-gp (Gulrajani et al. 2017, without its penalty), relativistic
    (Jolicoeur-Martineau 2019; row i of both sides is the same token, so the pairs are natural).
    """
    if kind == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if kind == "lsgan":
        return 0.5 * ((real - 1).square().mean() + fake.square().mean())
    if kind == "wgan-gp":
        return fake.mean() - real.mean()
    return F.softplus(fake - real).mean()


def adversarial_loss(kind: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The student's side of the same game; ``real`` is read by the relativistic loss alone."""
    if kind == "lsgan":
        return 0.5 * (fake - 1).square().mean()
    if kind == "relativistic":
        assert real is not None
        return F.softplus(real.detach() - fake).mean()
    return -fake.mean()


def gradient_penalty(
    critic: Discriminator, real: Tensor, fake: Tensor, condition: Tensor | None, tap: Tensor, generator: torch.Generator
) -> Tensor:
    """mean (||grad D|| - 1)^2 on lines between real and fake rows `[M, features]` (Gulrajani et al. 2017, equation
    3).
    """
    mix = torch.rand(real.shape[0], 1, generator=generator).to(real)
    between = (mix * real + (1 - mix) * fake).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between, condition, tap).sum(), between, create_graph=True)
    return (slope.norm(dim=-1) - 1).square().mean()


def pair_accuracy(real: Tensor, fake: Tensor) -> float:
    """P(D(teacher) > D(student)) over the rows, ties half; the same measure for every loss."""
    return float((real > fake).double().mean() + 0.5 * (real == fake).double().mean())
