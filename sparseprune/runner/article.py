"""The article's own programme: ``nn.Linear(128, 10)`` on a text set, cross-entropy, Adam at 0.001, pruned by a GAN.

Train, validation and test split; the factors of a retention in both conventions; the recurrence as the schedule; the
lines that the article prints; losses of all three splits, dense and pruned. Beside the GAN the same by learned scores
and by magnitude, so that one sees what the adversary did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .. import __version__
from ..bench import describe
from ..data import SETS, RowLoader, check_data, hashed_rows, load_set
from ..pruning.factors import Factors
from ..pruning.granularity import Block, Element, Granularity
from ..pruning.schedules import RetentionSchedule
from ..training import evaluate
from .config import method_config, pruner_of
from .devices import describe_device, find_device
from .folder import check_place, occupied, write_json

__all__ = ["FEATURES", "METHODS", "ArticleResult", "article_schedule", "article_table", "run_article"]

FEATURES = 128
METHODS = ("gan", "scores", "magnitude")
Convention = Literal["text", "formula"]
Mode = Literal["bounded", "literal", "consistent"]


@dataclass(frozen=True)
class ArticleResult:
    """folder, the record of run.json, the table as text."""

    folder: Path
    record: dict[str, Any]
    table: str


def article_schedule(update: float, mode: Mode = "bounded") -> RetentionSchedule:
    """The recurrence that ends at the update parameter, from r = 0.1 as far as that converges.

    "bounded": z_min is the update parameter. "literal": the same, and the window ends with the first density at or
    below it. "consistent": z_min = U - U^2, whose fixed point is U; needs U < 1/2.
    """
    if not 0 < update < 1:
        raise ValueError(f"article: the update parameter expected in (0, 1), got {update:g}; choose a lower retention")
    if mode == "consistent":
        if update >= 0.5:
            raise ValueError(f"article: mode 'consistent' needs an update parameter below 0.5, got {update:g}")
        return RetentionSchedule(r0=max(0.1, min(1 - update, 1.5 * update)), z_min=update - update * update, mode=mode)
    return RetentionSchedule(r0=min(0.1, 1 - update), z_min=update, mode=mode)


def run_article(
    *, data: str = "clinc10", retentions: Sequence[float] = (0.1, 0.01), convention: Convention = "text",
    mode: Mode = "bounded", methods: Sequence[str] = METHODS, epochs: int = 4, batch_size: int = 64, seed: int = 0,
    every: int = 100, out: str | Path = "runs", name: str = "article", quiet: bool = False, device: str = "auto",
) -> ArticleResult:  # fmt: skip
    """Trains the dense Linear for ``epochs`` epochs, then prunes a copy of it for as many by each method and retention.

    The density of a step is U, on its way to the update parameter of the convention: under "text" single weights are
    kept; under "formula" that share of the input features, whole columns, for the rows are the classes, which all
    stay. The trim factor rescales the survivors once, when the masks are final; the rest of the run heals.
    every: a line each so many batches; each epoch ends with one. Every batch is in history.json, everything else in
    run.json. ValueError on what cannot be, before anything is written.
    """
    if data not in SETS:
        raise ValueError(f"article: data expected one of {', '.join(SETS)}, got {data!r}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"article: methods expected from {', '.join(METHODS)}, got {unknown or 'none'}")
    if epochs < 1 or every < 1:
        raise ValueError(f"article: epochs and every expected >= 1, got {epochs} and {every}")
    if not retentions:
        raise ValueError("article: expected a retention or more, got none")
    plans = [_Retention.of(retention, convention, mode) for retention in retentions]
    folder, where = check_place(out, name), find_device(device)
    say: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    began = time.monotonic()
    with occupied(folder, say):
        found = load_set(data)
        say(found.describe())
        quality = check_data(found)
        say("\n".join(quality.lines()))
        loaders = {
            split: RowLoader(hashed_rows(part.texts, FEATURES), torch.tensor(part.labels), batch_size)
            for split, part in found.splits.items()
        }
        train = RowLoader(loaders["train"].x, loaders["train"].y, batch_size, shuffle=True, seed=seed)
        torch.manual_seed(seed)
        dense = nn.Linear(FEATURES, len(found.label_names)).to(where)
        say(f"dense: nn.Linear({FEATURES}, {len(found.label_names)}), cross-entropy, Adam at 0.001")
        history: dict[str, Any] = {"dense": _train(dense, train, epochs, _Lines(say, every, len(train)))}
        record: dict[str, Any] = {
            "kind": "article", "name": name, "data": found.name, "data_hash": found.digest(), "seed": seed,
            "convention": convention, "mode": mode, "epochs": epochs, "batch_size": batch_size,
            "versions": {"sparseprune": __version__, "torch": torch.__version__}, "machine": describe(),
            "device": describe_device(where),
            "data_quality": quality.to_list(), "dense": _measured(dense, loaders), "retentions": [],
        }  # fmt: skip
        for plan in plans:
            say(plan.told())
            entry = plan.to_dict()
            for method in methods:
                say(f"pruning by {'the GAN' if method == 'gan' else method}, retention {plan.retention:g}")
                pruned, steps = _prune(dense, plan, method, train, loaders["valid"], epochs, seed, say, every)
                entry["pruned"][method] = _measured(pruned, loaders)
                history[f"{method} {plan.retention:g}"] = steps
                say(f"pruning is finished: density {entry['pruned'][method]['density']:.4f}")
            record["retentions"].append(entry)
        record["seconds"] = round(time.monotonic() - began, 2)
        write_json(folder / "history.json", history)
        write_json(folder / "run.json", record)
        table = article_table(record)
        say(table)
        say(f"{record['seconds']:.0f} seconds; written to {folder}")
    return ArticleResult(folder, record, table)


@dataclass(frozen=True)
class _Retention:
    """One retention, its factors in both conventions, and what is made of them."""

    retention: float
    text: Factors
    formula: Factors
    used: Factors
    convention: str
    schedule: RetentionSchedule

    @classmethod
    def of(cls, retention: float, convention: Convention, mode: Mode) -> _Retention:
        text, formula = (Factors.from_retention(retention, convention=c) for c in ("text", "formula"))
        used = Factors.from_retention(retention, convention=convention)
        schedule = article_schedule(used.update, mode)
        schedule.final_density  # noqa: B018  # raises where the recurrence settles on none
        return cls(retention, text, formula, used, convention, schedule)

    def granularity(self, classes: int) -> Granularity:
        return Element() if self.convention == "text" else Block(classes, 1)

    def densities(self) -> list[float]:
        """U after each step of the recurrence."""
        end, steps = self.schedule.final_density, 1
        while self.schedule.densities(steps)[-1] > 1.01 * end:
            steps += 1
        return self.schedule.densities(steps)

    def told(self) -> str:
        lines = [f"retention {self.retention:g}, reduction {self.used.reduction:g}"]
        for name, f in (("text", self.text), ("formula", self.formula)):
            mark = "  <- used" if name == self.convention else ""
            lines.append(f"  {name:<8} pruning {f.pruning:.6f}  trim {f.trim:.6f}  update {f.update:.6f}{mark}")
        falls = " ".join(f"{u:.4f}" for u in self.densities())
        return "\n".join([*lines, f"  U by the recurrence ({self.schedule.mode}): {falls}"])

    def to_dict(self) -> dict[str, Any]:
        return {
            "retention": self.retention, "text": self.text.to_dict(), "formula": self.formula.to_dict(),
            "densities": self.densities(), "pruned": {},
        }  # fmt: skip


class _Lines:
    """The article's lines: Epoch, Loss, U, for a batch now and then and for every epoch."""

    def __init__(self, say: Callable[[str], None], every: int, batches: int):
        self.say, self.every, self.batches = say, every, batches
        self._losses: list[float] = []

    def step(self, number: int, loss: float, density: float, more: str = "") -> None:
        self._losses.append(loss)
        epoch, batch = divmod(number, self.batches)
        if (batch + 1) % self.every == 0:
            self.say(f"  Epoch {epoch + 1} batch {batch + 1:>4}  Loss {loss:.4f}  U {density:.4f}{more}")
        if batch + 1 == self.batches:
            mean = math.fsum(self._losses) / len(self._losses)
            self.say(f"Epoch {epoch + 1}  Loss {mean:.4f}  U {density:.4f}{more}")
            self._losses = []


def _train(model: nn.Linear, loader: RowLoader, epochs: int, lines: _Lines) -> list[dict[str, float]]:
    optimiser, compute = torch.optim.Adam(model.parameters(), lr=0.001), nn.CrossEntropyLoss()
    steps: list[dict[str, float]] = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for x, y in loader:
            x, y = x.to(model.weight.device), y.to(model.weight.device)
            optimiser.zero_grad(set_to_none=True)
            loss = compute(model(x), y)
            loss.backward()
            optimiser.step()
            lines.step(len(steps), loss.item(), 1.0)
            steps.append({"loss": loss.item(), "density": 1.0})
    return steps


def _prune(
    dense: nn.Linear, plan: _Retention, method: str, train: RowLoader, valid: RowLoader, epochs: int, seed: int,
    say: Callable[[str], None], every: int,
) -> tuple[nn.Module, list[dict[str, Any]]]:  # fmt: skip
    model = nn.Linear(dense.in_features, dense.out_features).to(dense.weight.device)
    model.load_state_dict(dense.state_dict())
    config = method_config(
        method, schedule=plan.schedule, granularity=plan.granularity(dense.out_features), epochs=float(epochs),
        lr=0.001, weight_decay=0.0, ce=1.0, rescale=plan.used.trim, seed=seed,
    )  # fmt: skip
    lines = _Lines(say, every, len(train))

    def line(step: dict[str, Any]) -> None:
        more = f"  D accuracy {step['discriminator_accuracy']:.2f}" if "discriminator_accuracy" in step else ""
        lines.step(step["step"], step["ce"], step["density"], more)

    pruner = pruner_of(config)(model, config)
    history = pruner.fit(train, valid, nn.CrossEntropyLoss, callback=line)
    return pruner.finalize(), history.steps


def _measured(model: nn.Module, loaders: dict[str, RowLoader]) -> dict[str, Any]:
    weight = model.get_parameter("weight")
    found: dict[str, Any] = {split: evaluate(model, loader) for split, loader in loaders.items()}
    return {**found, "density": int(weight.count_nonzero()) / weight.numel()}


def article_table(record: dict[str, Any]) -> str:
    """Losses of the three splits and test accuracy: dense, then each retention and method."""
    rows = [["", "density", "train loss", "valid loss", "test loss", "test accuracy"]]

    def row(name: str, found: dict[str, Any]) -> None:
        losses = [f"{found[split]['loss']:.4f}" for split in ("train", "valid", "test")]
        rows.append([name, f"{found['density']:.4f}", *losses, f"{found['test']['accuracy']:.4f}"])

    row("dense", record["dense"])
    for entry in record["retentions"]:
        for method, found in entry["pruned"].items():
            row(f"{method}, retention {entry['retention']:g}", found)
    widths = [max(len(r[i]) for r in rows) for i in range(6)]
    lines = ["  ".join([f"{r[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(r[1:], widths[1:]))]) for r in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
