"""The losses of the game: one table from a kind to both sides of it; the gradient penalty; what is watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LOSSES", "Loss", "adversarial_loss", "discriminator_loss", "gradient_penalty", "loss_of", "pair_accuracy"]


@dataclass(frozen=True)
class Loss:
    """Both sides of one game, of scores `[M]`; each returns a scalar to minimise.

    discriminator: of (real, fake). student: of (real, fake) too; without ``pairs`` it does not read real, and may be
    given fake's place for it. ``penalty``: the discriminator's slope is to be held to 1 by the gradient penalty.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    student: Callable[[Tensor, Tensor], Tensor]
    pairs: bool = False
    penalty: bool = False


#: By ``DiscriminatorConfig.loss``: hinge (Lim and Ye 2017), lsgan (Mao et al. 2017), wgan-gp (Gulrajani et al. 2017),
#: relativistic (Jolicoeur-Martineau 2019; row i of both sides is the same token, so the pairs are natural).
LOSSES: dict[str, Loss] = {
    "hinge": Loss(
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda real, fake: -fake.mean(),
    ),
    "lsgan": Loss(
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda real, fake: 0.5 * (fake - 1).square().mean(),
    ),
    "wgan-gp": Loss(
        lambda real, fake: fake.mean() - real.mean(),
        lambda real, fake: -fake.mean(),
        penalty=True,
    ),
    "relativistic": Loss(
        lambda real, fake: F.softplus(fake - real).mean(),
        lambda real, fake: F.softplus(real.detach() - fake).mean(),
        pairs=True,
    ),
}


def loss_of(kind: str) -> Loss:
    """ValueError on a kind that is not in ``LOSSES``."""
    if kind not in LOSSES:
        raise ValueError(f"loss expected one of {', '.join(LOSSES)}, got {kind!r}")
    return LOSSES[kind]


def discriminator_loss(kind: str, real: Tensor, fake: Tensor) -> Tensor:
    """real, fake: `[M]`, scores of the teacher's and the student's features; returns a scalar to minimise, without the
    gradient penalty. ValueError on an unknown kind.
    """
    return loss_of(kind).discriminator(real, fake)


def adversarial_loss(kind: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The student's side of the same game; real: `[M]`, needed where the loss compares pairs. ValueError on an unknown
    kind, and where real is missing.
    """
    loss = loss_of(kind)
    if loss.pairs and real is None:
        raise ValueError(f"adversarial_loss: {kind!r} compares pairs, expected the teacher's scores too, got none")
    return loss.student(fake if real is None else real, fake)


def gradient_penalty(
    critic: nn.Module, real: Tensor, fake: Tensor, condition: Tensor | None, tap: Tensor, generator: torch.Generator
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
