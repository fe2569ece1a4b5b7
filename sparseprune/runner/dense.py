"""The dense model first: fine-tuning, which stops and goes on by epoch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import save_checkpoint
from ..pruning.batches import device_of, split_batch
from ..training import evaluate
from ..training.checkpoint import random_state, set_random_state
from ..training.losses import task_loss
from ..training.student_loss import autocasting
from .config import RunConfig
from .display import Display
from .folder import DENSE
from .sources import Source

__all__ = ["fine_tune"]

_MOST_EPOCHS = 20


def fine_tune(model: nn.Module, setup: Source, config: RunConfig, folder: Path, display: Display) -> None:
    """AdamW with a linear rise and fall of the rate; the epoch of the best accuracy on the validation split is kept, of
    equal ones that of the lowest loss. Resumes by epoch. RuntimeError where a loss is not finite.
    """
    if setup.fine_tuned or config.dense_epochs == 0:
        return
    train, valid = setup.loaders["train"], setup.loaders["valid"]
    epochs = max(config.dense_epochs, min(_MOST_EPOCHS, -(-config.min_dense_steps // len(train))))
    total, device = epochs * len(train), device_of(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.dense_lr, weight_decay=0.01)
    path = folder / DENSE
    best: dict[str, Any] = {"accuracy": -1.0, "loss": math.inf, "epoch": 0, "state": None}
    start = 0
    if path.exists():
        start, best = _load(path, model, optimiser, device)
        display.say(f"resuming: {start} of {epochs} dense epochs are done")
    display.begin("dense training", total)
    step = start * len(train)
    for epoch in range(start, epochs):
        model.train()
        train.set_epoch(epoch)
        for raw in train:
            batch = split_batch(raw, device)
            with autocasting(config.pruning.autocast, device):
                logits = batch.run(model)
            loss = task_loss(nn.functional.cross_entropy, logits, batch.targets)
            shown = _finite(loss.item(), f"step {step + 1}", config)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = min((step + 1) / (0.1 * total), (total - step) / (0.9 * total))
            for group in optimiser.param_groups:
                group["lr"] = config.dense_lr * factor
            optimiser.step()
            display.step({"step": step, "epoch": epoch, "loss": shown, "density": 1.0, "sparsity": 0.0})
            step += 1
        found = evaluate(model, valid)
        _finite(found["loss"], f"the end of epoch {epoch + 1}", config)
        if (found["accuracy"], -found["loss"]) > (best["accuracy"], -best["loss"]):
            best = {**found, "epoch": epoch + 1, "state": copy.deepcopy(model.state_dict())}
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1, "best": best,
                 "rng": random_state(device)}  # fmt: skip
        save_checkpoint(path, state)
    model.load_state_dict(best["state"])
    model.eval()
    display.end()
    display.say(
        f"dense: epoch {best['epoch']} of {epochs} kept (validation accuracy {best['accuracy']:.4f}, loss "
        f"{best['loss']:.4f})"
    )


def _finite(loss: float, where: str, config: RunConfig) -> float:
    if not math.isfinite(loss):
        raise RuntimeError(
            f"dense training: expected a finite loss, got {loss} at {where}; lower the learning rate, now "
            f"{config.dense_lr:g}"
        )
    return loss


def _load(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, device: torch.device
) -> tuple[int, dict[str, Any]]:
    """(epochs done, the best state so far); model, optimiser and random numbers go on from where they were."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        set_random_state(saved["rng"], device)
        best = saved["best"]
        figures = {"accuracy": float(best["accuracy"]), "loss": float(best["loss"]), "epoch": int(best["epoch"])}
        return int(saved["epoch"]), {**figures, "state": best["state"]}
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can fail in every way that the reader and the loaders have
        raise ValueError(
            f"{path}: not a readable checkpoint of the dense training ({type(error).__name__}); delete it to train "
            "the dense model again"
        ) from error
