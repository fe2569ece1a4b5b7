"""The whole path: split, fine-tune dense, prune in training, heal, sparsify, measure, write it down.

A run owns one folder: ``run.json`` (the record), ``settings.json`` (what ``--config`` takes), ``history.json`` (every
step), ``pruned.safetensors``, the plots and what is needed to rebuild the model. Files are written beside their place
and renamed. A run that was interrupted goes on where it stopped; one that is finished starts anew.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .._digest import digest
from ..nn.copies import copy_of
from ..nn.filters import matching_filter, prunable_linears
from ..pruning.masks import MaskSet
from ..pruning.plan import Plan
from ..training import DistillConfig
from ..training.gates import check_plan
from .config import (
    RunConfig,
    check_dense_epochs,
    check_layout,
    check_rounding,
    method_config,
    method_name,
    override,
    pruner_of,
    read_settings,
    schedule,
)
from .dense import fine_tune
from .devices import find_device
from .display import Display
from .folder import TRAINING, check_place, clear, enter, occupied, write_json
from .measuring import check_record, layouts_of, measure, plot, summary
from .robustness import judge, robustness_table
from .sources import Source, default_rate, open_source

__all__ = [
    "RunConfig",
    "RunResult",
    "check_record",
    "layouts_of",
    "override",
    "read_settings",
    "run",
    "run_demo",
    "run_prune",
    "summary",
]

_DEMO_EPOCHS = 4.0
# By default a run has these epochs and, as few texts make few steps of them, these steps.
_EPOCHS, _STEPS = 5.0, 1200
_DENSE_EPOCHS, _DENSE_STEPS = 3, 500


@dataclass(frozen=True)
class RunResult:
    """folder, the record of run.json, and the final table as text. model: the pruned model, sparse where it pays."""

    folder: Path
    record: dict[str, Any]
    table: str
    model: nn.Module


def run_demo(
    *, out: str | Path = "runs", name: str = "demo", data: str = "clinc10", density: float | None = None,
    granularity: Any = "element", layers: Sequence[str] | None = None, method: str = "scores",
    compensation: str = "none", seed: int = 0, epochs: float | None = None, max_seconds: float | None = None,
    layout: str = "auto", data_check: str = "report", robustness: int = 1000, quiet: bool = False,
    config: RunConfig | None = None, value_dtype: str = "float32", activations: str = "float32",
    autocast: Literal["none", "bfloat16"] = "none", device: str = "auto",
) -> RunResult:  # fmt: skip
    """The built-in encoder on a built-in set, from nothing to the table; about five minutes on two cores.

    density: None for what N:M keeps, else 0.1. config: replaces every other setting. Raises ValueError on a setting
    that is wrong, before anything is written.
    """
    if config is None:
        pruning = method_config(
            method, compensation=compensation,
            schedule=schedule(density, granularity), granularity=granularity, seed=seed, max_seconds=max_seconds,
            epochs=_DEMO_EPOCHS if epochs is None else epochs, value_dtype=value_dtype, activations=activations,
            autocast=autocast,
        )  # fmt: skip
        check_rounding(layout, pruning)
        config = RunConfig(pruning=pruning, data=data, layout=layout, seed=seed, prune_layers=tuple(layers or ()),
                           data_check=data_check, robustness=robustness)  # fmt: skip
        if data == "crosswoz_zh":
            pruning = replace(pruning, epochs=12.0 if epochs is None else epochs)
            config = replace(config, dense_epochs=8, pruning=pruning)
    return run(config, out=out, name=name, quiet=quiet, device=device)


def run_prune(
    model: str, train: str | Path | None = None, valid: str | Path | None = None, test: str | Path | None = None, *,
    data: str | Path | None = None, out: str | Path = "runs",
    name: str = "prune", density: float | None = None, granularity: Any = "element",
    layers: Sequence[str] | None = None, method: str = "scores", compensation: str = "none",
    teacher: str | None = None, seed: int = 0, epochs: float | None = None, dense_epochs: int | None = None,
    lr: float | None = None, batch_size: int = 32, max_length: int = 128,
    max_seconds: float | None = None, layout: str = "auto", quiet: bool = False, config: DistillConfig | None = None,
    labels: str | Path | None = None, data_check: str = "report", robustness: int = 1000,
    value_dtype: str = "float32", activations: str = "float32",
    autocast: Literal["none", "bfloat16"] = "none", device: str = "auto",
) -> RunResult:  # fmt: skip
    """Any transformers sequence classifier (hub name or folder; ``"encoder"``: the built-in one) on three TSV or JSONL
    files, of one text or a pair of texts and a label; on three CoNLL files (a word and its label a line) any token
    classifier. data: a folder that holds the three, in their place (:func:`~sparseprune.data.load_folder`).

    The dense model is fine-tuned first unless ``teacher``, the same as ``model``, says that it is a fine-tuned one.
    density: None for what N:M keeps, else 0.1. lr: of both trainings; None for 1e-3 with the built-in encoder,
    with any other by its hidden size (:func:`~sparseprune.runner.sources.default_rate`), half of it, or 3e-5, for the
    dense training. epochs: of pruning and healing, None for 5, or for as many as make 1200 steps, 40 at the most;
    dense_epochs: None for 3, or for as many as make 500 steps, 20 at the most. labels: a file of label names, see
    ``RunConfig``. value_dtype, activations: how inference holds weights and takes activations, which healing rounds
    too. config: replaces density, granularity, method, compensation, epochs, lr, max_seconds, dtypes and seed
    of the pruning.
    """
    check_dense_epochs(dense_epochs, teacher)
    built_in = model == "encoder"
    rate = (1e-3 if built_in else default_rate(teacher or model)) if lr is None else lr
    dense_rate = max(3e-5, rate / 2) if lr is None and not built_in else rate
    pruning = config or method_config(
        method, compensation=compensation,
        schedule=schedule(density, granularity), granularity=granularity, seed=seed,
        epochs=_EPOCHS if epochs is None else epochs, min_steps=_STEPS if epochs is None else 0, lr=rate,
        max_seconds=max_seconds, value_dtype=value_dtype, activations=activations,
        autocast=autocast,
    )  # fmt: skip
    check_rounding(layout, pruning)
    settings = RunConfig(
        pruning=pruning, data=_text(data), train=_text(train), valid=_text(valid), test=_text(test),
        model=None if built_in else model, teacher=teacher, batch_size=batch_size,
        dense_epochs=_DENSE_EPOCHS if dense_epochs is None else dense_epochs,
        min_dense_steps=_DENSE_STEPS if dense_epochs is None else 0,
        dense_lr=dense_rate, max_length=max_length, layout=layout, seed=seed, prune_layers=tuple(layers or ()),
        labels=_text(labels), data_check=data_check, robustness=robustness,
    )  # fmt: skip
    return run(settings, out=out, name=name, quiet=quiet, device=device)


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)


def run(
    config: RunConfig, *, out: str | Path = "runs", name: str = "run", quiet: bool = False, device: str = "auto"
) -> RunResult:
    """Runs ``config`` in the folder ``out/name``; see the module's first lines for what it holds afterwards. device:
    as for :func:`~sparseprune.runner.devices.find_device`; no setting, for a run may go on on another one.

    Raises ValueError or OSError on anything wrong with settings, data, model or place before a thing is written, and
    BlockingIOError where another process runs in that folder.
    """
    folder, where = check_place(out, name), find_device(device)
    _seed(config.seed)  # a classifier on a bare encoder gets its head while it is loaded
    source = open_source(config)
    quality = None if config.data_check == "off" else source.check()
    if quality is not None and config.data_check == "stop":
        quality.raise_if_any()
    _seed(config.seed)
    model = source.make().to(where)
    # A folder or a name on the hub can hold other weights by the time that a stopped run goes on.
    weights = "" if config.model is None else digest(model.state_dict())
    source.latency = {key: value.to(where) for key, value in source.latency.items()}
    filter_fn = matching_filter(model, config.prune_layers)
    # A granularity that does not fit this model fails here, before anything is trained or written.
    linears, settings = prunable_linears(model, filter_fn), config.pruning
    plan = Plan.build(model, linears, settings.granularity, settings.scope, floor=settings.floor)
    check_plan(plan, settings)
    check_layout(config.layout, plan)
    display = Display(quiet)
    with display, occupied(folder, display.say):
        enter(folder, config, source.data.digest(), display.say, weights)
        clock = _Clock()
        display.say(source.data.describe())
        if quality is not None:
            display.say("\n".join(quality.lines()))
        fine_tune(model, source, config, folder, display)
        clock.stage("dense training")
        dense = copy_of(model, "run")
        model, masks, history = _prune(model, dense, source, config, folder, display, filter_fn)
        clock.stage("pruning and healing")
        record = measure(config, source, dense, model, masks, folder, display)
        clock.stage("measuring")
        record["robustness"] = None
        if config.robustness:
            display.say("measuring: typos, missing words, long texts")
            record["robustness"] = judge(source, dense, model, config.robustness)
            clock.stage("robustness")
        record["data_quality"] = None if quality is None else quality.to_list()
        record["history"] = "history.json"
        record["stopped"] = _stopped(history["events"])
        write_json(folder / "history.json", history)
        record["plots"] = plot(folder, history, record, display.say)
        clock.stage("plots")
        record["seconds"] = clock.seconds()
        write_json(folder / "run.json", record)
        clear(folder)
        table = summary(record)
        display.show(table)
        if record["robustness"]:
            display.show(f"\n{robustness_table(record['robustness'])}")
        display.say(f"written to {folder}")
    return RunResult(folder, record, table, model)


def _prune(
    model: nn.Module, teacher: nn.Module, source: Source, config: RunConfig, folder: Path, display: Display,
    filter_fn: Any,
) -> tuple[nn.Module, MaskSet, dict[str, Any]]:  # fmt: skip
    """(the pruned model, its masks, the history); the teacher stays as it is. What the loop held besides is gone when
    this returns.
    """
    pruner = pruner_of(config.pruning)(model, config.pruning, teacher, filter_fn)
    total = pruner.total_steps(source.loaders["train"])
    checkpoint = folder / TRAINING
    resuming = checkpoint.exists()
    display.begin(f"pruning ({method_name(config.pruning)})", total)

    def step(record: dict[str, Any]) -> None:
        nonlocal resuming
        if resuming:
            display.say(f"resuming: {record['step']} of {total} pruning steps are done, epoch {record['epoch'] + 1}")
            resuming = False
        display.step(record)

    history = pruner.fit(
        source.loaders["train"], source.loaders["valid"], nn.CrossEntropyLoss,
        checkpoint=checkpoint, checkpoint_every=max(50, total // 10), callback=step,
    )  # fmt: skip
    if resuming:
        display.say(f"resuming: all {total} pruning steps are done")
    display.end()
    if (stopped := _stopped(history.events)) is not None:
        display.say(f"{stopped}; it ends at its density, but accuracy suffers")
    masks = MaskSet({fqn: mask.cpu() for fqn, mask in pruner.masks.items()})
    return pruner.finalize(), masks, history.to_dict()


def _stopped(events: Sequence[dict[str, Any]]) -> str | None:
    """What the loop noted where its time was over before its steps were, in the words of the command line."""
    said = next((event["event"] for event in events if "max_seconds" in event["event"]), None)
    return None if said is None else said.replace("max_seconds", "--max-seconds")


class _Clock:
    """Seconds of each stage, and of all."""

    def __init__(self) -> None:
        self._began = self._since = time.monotonic()
        self._stages: dict[str, float] = {}

    def stage(self, name: str) -> None:
        """What went by since the last call was this stage."""
        now = time.monotonic()
        self._stages[name], self._since = round(now - self._since, 2), now

    def seconds(self) -> dict[str, float]:
        return {**self._stages, "total": round(time.monotonic() - self._began, 2)}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
