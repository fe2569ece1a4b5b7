"""The whole path: split, fine-tune dense, prune adversarially, heal, sparsify, measure, write it down.

A run owns one folder: ``run.json`` (the record), ``history.json`` (every step), ``pruned.safetensors``, the plots and
what is needed to rebuild the model. Files are written beside their place and renamed. A run that was interrupted goes
on where it stopped; one that is finished starts anew.
"""

from __future__ import annotations

import copy
import json
import math
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from ._config import Config
from ._files import replacing, write_text
from .bench import describe, interleave
from .data import SETS, Augment, Examples, TextData, TokenLoader, Vocabulary, load_files, load_set
from .display import Display
from .encoder import TextEncoder
from .gan import GANConfig, GANPruner, evaluate
from .gan.losses import IGNORED, task_loss
from .nn import sparsify_, use_linears_
from .nn.filters import matching_filter, prunable_linears
from .pruning.granularity import Heads, Neurons, Plan
from .pruning.masks import MaskSet
from .pruning.schedules import Constant, RetentionSchedule, Schedule
from .pruning.structures import shrink_

__all__ = ["RunConfig", "RunResult", "run", "run_demo", "run_prune"]

LAYOUTS = ("auto", "csr", "bsr", "nm", "dense")


@dataclass(frozen=True)
class RunConfig(Config):
    """One run. data: a built-in set, or None with the three files given. model: None for the built-in encoder, else a
    transformers hub name or folder. teacher: a fine-tuned classifier (folder or name) that saves the dense training.

    dense_epochs, dense_lr, batch_size: the dense fine-tuning. drop, swap, mask: token augmentation. layout: "auto",
    "csr", "bsr", "nm", or "dense" to leave the Linears alone. latency_batch: examples in the batch that is timed.
    prune_layers: shell patterns of the names of the Linears to prune; none: all but the head. train_limit and
    other_limit cut the splits, for trials.
    """

    gan: GANConfig = field(default_factory=GANConfig)
    data: str | None = "clinc10"
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    model: str | None = None
    teacher: str | None = None
    hidden: int = 256
    ffn: int = 1024
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    max_length: int | None = None
    batch_size: int = 64
    dense_epochs: int = 4
    dense_lr: float = 1e-3
    drop: float = 0.05
    swap: float = 0.0
    mask: float = 0.05
    layout: str = "auto"
    latency_batch: int = 64
    prune_layers: tuple[str, ...] = ()
    train_limit: int | None = None
    other_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        files = (self.train, self.valid, self.test)
        if self.data is None and None in files:
            raise ValueError(
                "RunConfig: without data all of train, valid and test expected, each a TSV, JSONL or CoNLL file"
            )
        if self.data is not None and self.data not in SETS:
            raise ValueError(
                f"RunConfig: data expected one of {', '.join(SETS)}, got {self.data!r}; or give three files"
            )
        if self.data is not None and files != (None, None, None):
            raise ValueError("RunConfig: either data or the files train, valid and test, got both")
        if self.layout not in LAYOUTS:
            raise ValueError(f"RunConfig: layout expected one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        for name in ("hidden", "ffn", "layers", "heads", "batch_size", "latency_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"RunConfig: {name} expected >= 1, got {getattr(self, name)!r}")
        if not (self.dense_epochs >= 0 and self.dense_lr > 0 and math.isfinite(self.dense_lr)):
            raise ValueError(
                f"RunConfig: dense_epochs >= 0 and dense_lr > 0 expected, got {self.dense_epochs!r}, {self.dense_lr!r}"
            )
        if self.hidden % self.heads:
            raise ValueError(f"RunConfig: heads ({self.heads}) must divide hidden ({self.hidden})")
        Augment(self.drop, self.swap, self.mask)


@dataclass(frozen=True)
class RunResult:
    """folder, the record of run.json, and the final table as text. model: the pruned model, sparse where it pays."""

    folder: Path
    record: dict[str, Any]
    table: str
    model: nn.Module


@dataclass
class _Setup:
    """Everything that depends on where model and data come from."""

    data: TextData
    make: Callable[[], nn.Module]
    loaders: dict[str, TokenLoader]
    latency: dict[str, Tensor]
    save_parts: Callable[[Path], None]
    source: str
    fine_tuned: bool = False


def run_demo(
    *, out: str | Path = "runs", name: str = "demo", data: str = "clinc10", density: float = 0.1,
    granularity: Any = "element", layers: Sequence[str] | None = None, method: str = "scores",
    compensation: str = "none", seed: int = 0, epochs: float | None = None, max_seconds: float | None = None,
    layout: str = "auto", quiet: bool = False, config: RunConfig | None = None,
) -> RunResult:  # fmt: skip
    """The built-in encoder on a built-in set, from nothing to the table; about five minutes on two cores.

    config: replaces every other setting. Raises ValueError on a setting that is wrong, before anything is written.
    """
    if config is None:
        gan = GANConfig(
            method=method,  # type: ignore[arg-type]
            compensation=compensation,  # type: ignore[arg-type]
            schedule=_schedule(density), granularity=granularity, seed=seed, max_seconds=max_seconds,
            epochs=_DEMO_EPOCHS if epochs is None else epochs,
        )  # fmt: skip
        config = RunConfig(gan=gan, data=data, layout=layout, seed=seed, prune_layers=tuple(layers or ()))
        if data == "crosswoz_zh":
            config = replace(config, dense_epochs=8, gan=replace(gan, epochs=12.0 if epochs is None else epochs))
    return run(config, out=out, name=name, quiet=quiet)


def run_prune(
    model: str, train: str | Path, valid: str | Path, test: str | Path, *, out: str | Path = "runs",
    name: str = "prune", density: float = 0.1, granularity: Any = "element", layers: Sequence[str] | None = None,
    method: str = "scores", compensation: str = "none", teacher: str | None = None, seed: int = 0,
    epochs: float = 5.0, dense_epochs: int = 3, lr: float = 3e-5, batch_size: int = 32, max_length: int = 128,
    max_seconds: float | None = None, layout: str = "auto", quiet: bool = False, config: GANConfig | None = None,
) -> RunResult:  # fmt: skip
    """Any transformers sequence classifier (hub name or folder; ``"encoder"``: the built-in one) on three TSV or JSONL
    files, of one text or a pair of texts and a label; on three CoNLL files (a word and its label a line) any token
    classifier.

    The dense model is fine-tuned first unless ``teacher`` names a fine-tuned one, from whose weights the student then
    starts. config: replaces density, granularity, method, compensation, epochs, lr, max_seconds and seed of the
    pruning.
    """
    gan = config or GANConfig(
        method=method,  # type: ignore[arg-type]
        compensation=compensation,  # type: ignore[arg-type]
        schedule=_schedule(density), granularity=granularity, seed=seed, epochs=epochs,
        lr=1e-3 if model == "encoder" else lr, max_seconds=max_seconds,
    )  # fmt: skip
    built_in = model == "encoder"
    settings = RunConfig(
        gan=gan, data=None, train=str(train), valid=str(valid), test=str(test), model=None if built_in else model,
        teacher=teacher, batch_size=batch_size, dense_epochs=dense_epochs, dense_lr=1e-3 if built_in else lr,
        max_length=max_length, layout=layout, seed=seed, prune_layers=tuple(layers or ()),
    )  # fmt: skip
    return run(settings, out=out, name=name, quiet=quiet)


_DEMO_EPOCHS = 4.0


def _schedule(density: float) -> Schedule:
    """The article's schedule ending at this density; ValueError unless it is in (0, 1]."""
    if not (isinstance(density, int | float) and 0 < density <= 1):
        raise ValueError(f"density expected in (0, 1], the share of the weights kept, got {density!r}")
    return Constant(1.0) if density == 1 else RetentionSchedule(r0=min(0.1, 1 - density), z_min=density)


def run(config: RunConfig, *, out: str | Path = "runs", name: str = "run", quiet: bool = False) -> RunResult:
    """Runs ``config`` in the folder ``out/name``; see the module's first lines for what it holds afterwards."""
    if not name or name in (".", "..") or Path(name).name != name:
        raise ValueError(f"run: name expected a plain folder name, got {name!r}")
    setup = _text_encoder(config) if config.model is None else _transformer(config)
    _seed(config.seed)
    model = setup.make()
    filter_fn = matching_filter(model, config.prune_layers)
    # A granularity that does not fit this model fails here, before anything is trained or written.
    linears, gan = prunable_linears(model, filter_fn), config.gan
    Plan.build(model, linears, gan.granularity, gan.scope, floor=gan.floor)
    folder = Path(out) / name
    _enter(folder, config)
    began = time.monotonic()
    seconds: dict[str, float] = {}
    display = Display(quiet)

    def stage(what: str, since: float) -> float:
        now = time.monotonic()
        seconds[what] = round(now - since, 2)
        return now

    with display:
        display.say(f"{setup.data.name}: " + ", ".join(f"{len(s)} {n}" for n, s in setup.data.splits.items()))
        clock = time.monotonic()
        _fine_tune(model, setup, config, folder, display)
        clock = stage("dense training", clock)
        dense = copy.deepcopy(model)
        pruner = GANPruner(model, config.gan, teacher=copy.deepcopy(model), filter_fn=filter_fn)
        total = pruner.total_steps(setup.loaders["train"])
        display.begin(f"pruning ({config.gan.method})", total)
        history = pruner.fit(
            setup.loaders["train"], setup.loaders["valid"], nn.CrossEntropyLoss,
            checkpoint=folder / "training.ckpt", checkpoint_every=max(50, total // 10), callback=display.step,
        )  # fmt: skip
        model = pruner.finalize()
        display.end()
        clock = stage("pruning and healing", clock)
        masks = MaskSet({fqn: mask.cpu() for fqn, mask in pruner.masks.items()})
        record = _measure(config, setup, dense, model, masks, folder, display)
        clock = stage("measuring", clock)
        record["history"] = "history.json"
        _write_json(folder / "history.json", history.to_dict())
        made = plot(folder, history.to_dict(), record)
        record["plots"] = made
        if not made:
            display.say("no plots: matplotlib is not installed; pip install 'sparseprune[plot]'")
        stage("plots", clock)
        record["seconds"] = {**seconds, "total": round(time.monotonic() - began, 2)}
        _write_json(folder / "run.json", record)
        for leftover in ("training.ckpt", "dense.ckpt"):
            folder.joinpath(leftover).unlink(missing_ok=True)
        table = summary(record)
        display.show(table)
        display.say(f"written to {folder}")
    return RunResult(folder, record, table, model)


def _read(config: RunConfig) -> TextData:
    if config.data is not None:
        data = load_set(config.data)
    else:
        assert config.train is not None and config.valid is not None and config.test is not None
        data = load_files(config.train, config.valid, config.test)
    data = data.head(config.train_limit, config.other_limit)
    if len(data.label_names) < 2:
        raise ValueError(f"{data.train.source}: expected two labels or more, got {data.label_names}")
    return data


def _text_encoder(config: RunConfig) -> _Setup:
    if config.teacher is not None:
        raise ValueError("teacher: the built-in encoder is trained here; name a model to use a teacher")
    data = _read(config)
    if data.train.tokens:
        raise ValueError(f"{data.train.source}: the built-in encoder labels whole texts, not words; name a model")
    vocabulary = Vocabulary.build(data.train.texts)
    longest = max(len(vocabulary.encode(t, 512)) for t in data.train.texts)
    limit = config.max_length or min(128, max(8, longest))

    def loader(split: Examples, train: bool) -> TokenLoader:
        return TokenLoader(
            [vocabulary.encode(t, limit) for t in split.texts], split.labels, config.batch_size if train else 64, train,
            config.seed, Augment(config.drop, config.swap, config.mask) if train else None, vocabulary.PAD,
            vocabulary.MASK, protect={vocabulary.SEPARATOR},
        )  # fmt: skip

    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary), "num_labels": len(data.label_names), "hidden": config.hidden, "ffn": config.ffn,
        "layers": config.layers, "heads": config.heads, "max_length": limit, "dropout": config.dropout,
    }  # fmt: skip

    def save_parts(folder: Path) -> None:
        write_text(folder / "vocabulary.json", vocabulary.to_json())
        _write_json(folder / "encoder.json", {**settings, "labels": data.label_names})

    loaders = {"train": loader(data.train, True), **_plain(data, loader)}
    return _Setup(data, lambda: TextEncoder(**settings), loaders, _latency_batch(loaders["test"], config.latency_batch),
                  save_parts, "built-in encoder")  # fmt: skip


def _plain(data: TextData, loader: Callable[[Examples, bool], TokenLoader]) -> dict[str, TokenLoader]:
    return {
        "train_plain": loader(data.train, False),
        "valid": loader(data.valid, False),
        "test": loader(data.test, False),
    }


def _transformer(config: RunConfig) -> _Setup:
    try:
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"model {config.model!r} needs transformers; pip install 'sparseprune[hf]'") from error
    data = _read(config)
    source = config.teacher or config.model
    assert source is not None
    labels = dict(enumerate(data.label_names))
    words = data.train.tokens
    kind = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **({"add_prefix_space": True} if words else {}))
        model = kind.from_pretrained(
            source, num_labels=len(labels), id2label=labels, label2id={n: i for i, n in labels.items()},
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"model {source!r} cannot be loaded as a {'token' if words else 'sequence'} classifier of {len(labels)} "
            f"labels: {first}"
        ) from error
    if words and not tokenizer.is_fast:
        raise ValueError(f"model {source!r}: labels of words need a fast tokenizer, which knows where its tokens lie")
    use_linears_(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    limit = config.max_length or min(128, getattr(tokenizer, "model_max_length", 128))
    hidden = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    changes = Augment(config.drop, config.swap, config.mask if hidden is not None else 0.0)

    def loader(split: Examples, train: bool) -> TokenLoader:
        if words:
            found = tokenizer(
                [list(text) for text in split.texts], is_split_into_words=True, truncation=True, max_length=limit
            )
            labels_of = [_token_labels(found.word_ids(i), own) for i, own in enumerate(split.labels)]
            return TokenLoader(
                found["input_ids"], labels_of, config.batch_size if train else 64, train, config.seed,
                pad_id=tokenizer.pad_token_id,
            )  # fmt: skip
        columns = [list(column) for column in zip(*split.texts)]
        found = tokenizer(*columns, truncation=True, max_length=limit)
        types = found.get("token_type_ids") if len(columns) == 2 else None
        augment = changes if train and types is None else None
        return TokenLoader(
            found["input_ids"], split.labels, config.batch_size if train else 64, train, config.seed, augment,
            tokenizer.pad_token_id, hidden or 0, set(tokenizer.all_special_ids), types,
        )  # fmt: skip

    def save_parts(folder: Path) -> None:
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    loaders = {"train": loader(data.train, True), **_plain(data, loader)}
    return _Setup(data, lambda: model, loaders, _latency_batch(loaders["test"], config.latency_batch), save_parts,
                  str(source), fine_tuned=config.teacher is not None)  # fmt: skip


def _token_labels(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Each word's label for its first token, IGNORED for the others and for special tokens."""
    before: list[int | None] = [None, *word_ids]
    return [IGNORED if w is None or w == last else labels[w] for last, w in zip(before, word_ids)]


def _latency_batch(loader: TokenLoader, size: int) -> dict[str, Tensor]:
    """``size`` test examples spread evenly over the split, padded to the longest of them."""
    chosen = [i * len(loader.sequences) // size for i in range(min(size, len(loader.sequences)))]
    batch = loader.collate(sorted(set(chosen)))
    return {key: value for key, value in batch.items() if key != "labels"}


def _enter(folder: Path, config: RunConfig) -> None:
    """Makes the folder; leftovers of an interrupted run of the same configuration stay, all others go."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings.json"
    wanted = config.to_json()
    unfinished = (
        settings.exists() and settings.read_text(encoding="utf-8") == wanted and not (folder / "run.json").exists()
    )
    if not unfinished:
        for leftover in ("training.ckpt", "dense.ckpt", "run.json", "history.json"):
            folder.joinpath(leftover).unlink(missing_ok=True)
        write_text(settings, wanted)


def _fine_tune(model: nn.Module, setup: _Setup, config: RunConfig, folder: Path, display: Display) -> None:
    """AdamW with a linear rise and fall of the rate; the best epoch on the validation split is kept. Resumes by
    epoch.
    """
    if setup.fine_tuned or config.dense_epochs == 0:
        return
    train, valid = setup.loaders["train"], setup.loaders["valid"]
    total = config.dense_epochs * len(train)
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.dense_lr, weight_decay=0.01)
    path = folder / "dense.ckpt"
    best: dict[str, Any] = {"accuracy": -1.0, "state": None}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["rng"])
        start, best = saved["epoch"], saved["best"]
    display.begin("dense training", total)
    step = start * len(train)
    for epoch in range(start, config.dense_epochs):
        model.train()
        train.set_epoch(epoch)
        for batch in train:
            labels = batch.pop("labels")
            out = model(**batch)
            logits = out if isinstance(out, Tensor) else out.logits
            loss = task_loss(nn.functional.cross_entropy, logits, labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            factor = min((step + 1) / (0.1 * total), (total - step) / (0.9 * total))
            for group in optimiser.param_groups:
                group["lr"] = config.dense_lr * factor
            optimiser.step()
            display.step({"step": step, "epoch": epoch, "loss": loss.item(), "density": 1.0, "sparsity": 0.0})
            step += 1
        found = evaluate(model, valid)
        if found["accuracy"] > best["accuracy"]:
            best = {"accuracy": found["accuracy"], "state": copy.deepcopy(model.state_dict())}
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "epoch": epoch + 1, "best": best,
                 "rng": torch.get_rng_state()}  # fmt: skip
        _write_torch(path, state)
    model.load_state_dict(best["state"])
    model.eval()
    display.end()


def _measure(
    config: RunConfig, setup: _Setup, dense: nn.Module, model: nn.Module, masks: MaskSet, folder: Path, display: Display
) -> dict[str, Any]:
    """Both models on the three splits, in bytes and in time; ``model`` becomes sparse where that pays."""
    from . import checkpoint

    names = {"train": "train_plain", "valid": "valid", "test": "test"}
    display.say("measuring: three splits, bytes, latency")
    layers = {fqn: masks.kept_of(fqn) / max(1, math.prod(masks.shape(fqn))) for fqn in masks}
    # A layer with a low-rank term is sparse already, and holds what it kept as it is.
    linears = [m for m in (model.get_submodule(fqn) for fqn in masks) if isinstance(m, nn.Linear)]
    ranks = {fqn: len(m.low_rank_a) for fqn, m in model.named_modules() if getattr(m, "low_rank_a", None) is not None}
    factors = sum(rank * sum(masks.shape(fqn)) for fqn, rank in ranks.items())
    pruned_weights = {id(layer.weight) for layer in linears}
    pruned_parameters = sum(
        int(torch.count_nonzero(p)) if id(p) in pruned_weights else p.numel() for p in model.parameters()
    )
    dense_parameters = sum(p.numel() for p in dense.parameters())
    checkpoint.save(dense, folder / "dense.safetensors")
    dense_bytes = (folder / "dense.safetensors").stat().st_size
    (folder / "dense.safetensors").unlink()
    tokens = setup.latency["input_ids"].numel()
    masked = copy.deepcopy(model)
    if _shrinks(config.gan.granularity):
        display.say(str(shrink_(model)))
    report = None
    if config.layout != "dense" and linears:
        report = sparsify_(model, layout=config.layout, tokens=tokens)
    checkpoint.save(model, folder / "pruned.safetensors")
    setup.save_parts(folder)
    dense.eval()
    model.eval()
    masked.eval()

    def call(which: nn.Module) -> Callable[[], object]:
        return lambda: which(**setup.latency)

    with torch.inference_mode():
        timing = interleave(
            {"dense": call(dense), "masked": call(masked), "pruned": call(model)}, rounds=15, min_time=0.05
        )
        drift = float((_logits(model(**setup.latency)) - _logits(masked(**setup.latency))).abs().max())
    figures: dict[str, dict[str, Any]] = {}
    for which, network in (("dense", dense), ("pruned", model)):
        figures[which] = {split: evaluate(network, setup.loaders[loader]) for split, loader in names.items()}
        figures[which]["latency_ms"] = timing.time(which).median * 1e3
    figures["dense"] |= {"bytes": dense_bytes, "parameters": dense_parameters}
    size = (folder / "pruned.safetensors").stat().st_size
    figures["pruned"] |= {"bytes": size, "parameters": pruned_parameters}
    ratio = timing.ratio("pruned", "dense")
    return {
        "name": folder.name,
        "seed": config.seed,
        "config": config.to_dict(),
        "versions": {"sparseprune": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": describe(),
        "cpu": describe()["cpu"],
        "model": setup.source,
        "data": setup.data.name,
        "labels": len(setup.data.label_names),
        "data_hash": setup.data.digest(),
        "mask_hash": masks.mask_hash(),
        "density": (masks.kept + factors) / masks.total,
        "prunable_parameters": masks.total,
        "layers": layers,
        "ranks": ranks,
        "layouts": None if report is None else report.to_dict(),
        "latency_batch": list(setup.latency["input_ids"].shape),
        "latency_spread_ms": {n: [1e3 * timing.time(n).low, 1e3 * timing.time(n).high] for n in timing.samples},
        "masked_latency_ms": timing.time("masked").median * 1e3,
        "sparse_against_masked": drift,
        "dense": figures["dense"],
        "pruned": figures["pruned"],
        "speedup": ratio.median,
        "speedup_spread": [ratio.low, ratio.high],
        "accuracy_kept": figures["pruned"]["test"]["accuracy"] / figures["dense"]["test"]["accuracy"],
    }  # fmt: skip


def _shrinks(granularity: Any) -> bool:
    """Whether whole heads or neurons go, so that the matrices can be cut."""
    specs = granularity.values() if isinstance(granularity, dict) else [granularity]
    parts = [part for spec in specs for part in (getattr(spec, "first", spec),)]
    return any(part in ("heads", "neurons") or isinstance(part, Heads | Neurons) for part in parts)


def _logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


def summary(record: dict[str, Any]) -> str:
    """The final table as text: dense beside pruned, with the ratio pruned / dense (latency: dense / pruned)."""
    dense, pruned = record["dense"], record["pruned"]
    rows: list[tuple[str, str, str, str]] = [("", "dense", "pruned", "ratio")]
    for split in ("train", "valid", "test"):
        for key in ("loss", "accuracy"):
            a, b = dense[split][key], pruned[split][key]
            rows.append((f"{split} {key}", f"{a:.4f}", f"{b:.4f}", f"{b / a:.3f}" if a else "-"))
    for key, label in (("parameters", "parameters kept"), ("bytes", "bytes on disk")):
        rows.append((label, f"{dense[key]:,}", f"{pruned[key]:,}", f"{pruned[key] / dense[key]:.3f}"))
    batch = "x".join(map(str, record["latency_batch"]))
    verdict = f"{record['speedup']:.2f} " + ("times faster" if record["speedup"] >= 1 else "times: dense wins")
    latency = [f"{figures['latency_ms']:.2f}" for figures in (dense, pruned)]
    rows.append((f"latency of {batch} tokens, ms", latency[0], latency[1], verdict))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"{r[0]:<{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}  {r[3]:>{widths[3]}}" for r in rows]
    lines.insert(1, "-" * len(lines[0]))
    machine = record["machine"]
    kept = f"density {record['density']:.4f} of {record['prunable_parameters']:,} weights in the pruned Linears"
    kept += f"; test accuracy kept {record['accuracy_kept']:.1%}"
    where = f"{machine['cpu']}, {machine['threads']} threads, load {machine['load_1min']}, torch {machine['torch']}"
    return "\n".join([*lines, kept, where])


def plot(folder: Path, history: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Draws curves.png, layers.png and tradeoff.png; returns their names, none where matplotlib is absent."""
    try:
        from .plots import draw
    except ImportError:
        return []
    return draw(folder, history, record)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain_number))


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _write_torch(path: Path, value: Any) -> None:
    with replacing(path) as unfinished:
        torch.save(value, unfinished)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
