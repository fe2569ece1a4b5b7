"""What a fresh discriminator finds between a pruner's teacher and another model: how honest, and how near, they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..nn.copies import copy_of
from ..pruning.batches import split_batch
from ..pruning.intake import training_data
from ..training import DistillPruner
from .config import DiscriminatorConfig
from .game import Game, new_game
from .losses import pair_accuracy
from .seeds import seeded

__all__ = ["null_test", "probe"]


def null_test(
    pruner: DistillPruner, loader: Any, steps: int = 200, cue: str | None = None,
    discriminator: DiscriminatorConfig | None = None, tokenizer: Any = None,
) -> float:  # fmt: skip
    """Accuracy of a fresh discriminator between the teacher and an unpruned copy of it, on rows it was not trained on.

    Without a planted cue it must stay at 0.5: whatever it found would be an artefact of the pipeline, not of pruning.
    cue: "dropout" (the copy runs with its dropout on) or "pad" (padding counts as tokens in the copy alone) must be
    found out.
    """
    if cue not in (None, "dropout", "pad"):
        raise ValueError(f'null_test: cue expected None, "dropout" or "pad", got {cue!r}')
    twin = copy_of(pruner.teacher, "null_test")
    twin.train(cue == "dropout")
    return _accuracy("null_test", pruner, twin, loader, steps, cue == "pad", discriminator, tokenizer)


def probe(
    pruner: DistillPruner, loader: Any, steps: int = 200, discriminator: DiscriminatorConfig | None = None,
    tokenizer: Any = None,
) -> float:  # fmt: skip
    """Accuracy of a fresh discriminator between the teacher and the model as it is now: 0.5 where it finds nothing.

    The mechanism check: whatever the run did, how much of its difference from the teacher is left to be seen.
    """
    training = pruner.model.training
    pruner.model.eval()
    try:
        return _accuracy("probe", pruner, pruner.model, loader, steps, False, discriminator, tokenizer)
    finally:
        pruner.model.train(training)


def _accuracy(
    who: str, pruner: DistillPruner, twin: nn.Module, loader: Any, steps: int, pad: bool,
    discriminator: DiscriminatorConfig | None, tokenizer: Any,
) -> float:  # fmt: skip
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{who}: steps expected a whole number >= 1, got {steps!r}; an untrained verdict says nothing")
    batches = _forever(training_data(loader, pruner.model, tokenizer, who), who)
    settings = dataclasses.replace(discriminator or DiscriminatorConfig(), mode="trained")
    seed, device = pruner.config.seed, pruner.device
    game: Game | None = None
    verdicts: list[float] = []
    with seeded(seed, device):
        for step in range(steps + max(1, steps // 4)):
            batch = split_batch(next(batches), device, twin)
            with torch.no_grad():
                real, entry = pruner.reader(pruner.teacher, batch)[1:]
                fake, _ = pruner.reader(twin, batch)[1:]
            mask = batch.mask
            if game is None:
                game = new_game(settings, 0.0, seed, real, fake, entry, mask, device)
            rows = game.rows(real, fake, entry, mask)
            if pad and mask is not None:
                count = int(len(rows.fake) / len(fake))
                padded = [game.rows([r], [f], None, None) for r, f in zip(real, fake)]
                rows.fake = torch.cat([p.fake[torch.randperm(len(p.fake))[:count]] for p in padded])
                rows.fake, rows.real = rows.fake[: len(rows.real)], rows.real[: len(rows.fake)]
            if step < steps:
                game.monitor.reset()
                game.train_critic(rows, progress=1.0)
            else:
                game.critic.eval()
                with torch.no_grad():
                    on_real = game.critic(rows.real, rows.condition, rows.tap)
                    on_fake = game.critic(rows.fake, rows.condition, rows.tap)
                verdicts.append(pair_accuracy(on_real, on_fake))
    return sum(verdicts) / len(verdicts)


def _forever(loader: Iterable[Any], who: str) -> Iterator[Any]:
    count = 0
    while True:
        before = count
        for batch in loader:
            count += 1
            yield batch
        if count == before:
            got = f"one that ended after {count}, as an iterator does; pass a list or a DataLoader" if count else "none"
            raise ValueError(f"{who}: expected batches that can be read again and again, got {got}")
