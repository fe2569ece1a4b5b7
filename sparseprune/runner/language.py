"""A causal language model on a folder: pruned in one shot, measured, written for us and for transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from .._files import replacing, write_text
from ..bench import describe
from ..data.tables import is_table, read_columns
from ..integrations.folder import save_pretrained
from ..integrations.transformers import language_model
from ..language import Speed, check_length, perplexity, speed_table, token_windows, tokens_per_second
from ..nn import sparsify_
from ..nn.copies import copy_of
from ..pruning import make_granularity, prune_
from .config import final_density
from .devices import describe_device, find_device
from .folder import check_place, occupied, write_json

__all__ = ["KIND", "MODEL_FOLDER", "check_record", "prune_language_model", "read_text", "summary"]

KIND = "language model"
MODEL_FOLDER = "model"  # of a run: for transformers
_RECORD, _SETTINGS, _PICTURE = "run.json", "settings.json", "tradeoff.png"
_SHOWN = (
    ("perplexity", "perplexity"), ("loss", "loss"), ("bytes", "bytes on disk"),
    ("prompt_tokens_per_second", "prompt, tokens/s"), ("new_tokens_per_second", "generation, tokens/s"),
)  # fmt: skip
_DENSITY = 0.5
_PROMPT = 128  # tokens, at most, of the one that is timed
_HELD_OUT = 0.2  # of the text, where none is given to judge on


def read_text(path: str | Path) -> str:
    """A file of plain text in UTF-8, or the column ``text`` of a table (.csv, .parquet, .arrow) or of a folder by
    ``datasets.Dataset.save_to_disk``. ValueError where there is no text, and on a row that has none.
    """
    place = Path(path).expanduser()
    if is_table(place):
        columns, _ = read_columns(place)
        if "text" not in columns:
            raise ValueError(f"{path}: expected a column 'text', got {', '.join(columns)}")
        for number, row in enumerate(columns["text"], 1):
            if not isinstance(row, str):
                got = type(row).__name__
                raise ValueError(f"{path}: row {number}: expected a text under text, got {got}; leave the row out")
        text = "\n".join(columns["text"])
    elif place.is_file():
        try:
            text = place.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got an invalid byte at offset {error.start}") from None
    else:
        raise FileNotFoundError(f"{path}: no such file; expected plain text, or a folder by Dataset.save_to_disk")
    if not text.strip():
        raise ValueError(f"{path}: expected text, got none")
    return text


def prune_language_model(
    model: str, text: str | Path, *, judged_on: str | Path | None = None, out: str | Path = "runs",
    name: str = "language", gguf_file: str | None = None, criterion: str = "admm", density: float | None = None,
    granularity: str = "element", context: int = 256, windows: int = 32, judged_windows: int = 32,
    value_dtype: str = "float32", layout: str = "auto", device: str = "auto", new_tokens: int = 32, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Prunes a causal language model (hub name or folder) with ``windows`` windows of ``context`` tokens of ``text``,
    and leaves in ``out/name``: ``pruned.safetensors``, ``model/`` for transformers, ``run.json`` with perplexity, speed
    and bytes, dense and pruned, and a picture. Returns the record.

    density: None for what N:M keeps, else 0.5. judged_on: text for the perplexity; without it the last fifth of
    ``text``, which is then not used to prune. An unfinished run of the same folder starts again, and says so. Errors as
    those of the parts.
    """
    say: Callable[[str], None] = (lambda line: None) if quiet else lambda line: print(line, flush=True)
    folder, where = check_place(out, name), find_device(device)
    density = final_density(density, granularity, _DENSITY)
    material, others = read_text(text), None if judged_on is None else read_text(judged_on)
    settings = {
        "kind": KIND, "model": str(model), "text": str(text),
        "judged_on": None if judged_on is None else str(judged_on),
        "gguf_file": gguf_file, "criterion": criterion, "density": density, "granularity": granularity,
        "context": context, "windows": windows, "judged_windows": judged_windows,
        "value_dtype": value_dtype, "layout": layout,
        "device": str(where), "new_tokens": new_tokens,
    }  # fmt: skip
    with occupied(folder, say):
        if (folder / _RECORD).exists():
            say(f"{folder}: the finished run here is replaced")
            (folder / _RECORD).unlink()
        elif (folder / _SETTINGS).exists():
            say(f"{folder}: an unfinished run is here; one-shot pruning keeps no checkpoint, so it starts again")
        write_text(folder / _SETTINGS, json.dumps(settings, indent=2) + "\n")
        record = _run(folder, settings, material, others, say)
        write_json(folder / _RECORD, record)
    say(summary(record))
    return record


def _run(
    folder: Path, settings: dict[str, Any], material: str, others: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    began = time.perf_counter()
    dense, tokenizer = language_model(settings["model"], settings["gguf_file"])
    dense.to(settings["device"]).requires_grad_(False)
    calibration, judged = _windows(tokenizer, material, others, settings)
    needs_data = settings["criterion"] not in ("magnitude", "random")
    reads = f"prunes with {calibration.numel():,} tokens" if needs_data else "prunes by its weights alone"
    say(f"{settings['model']}: {reads}, is judged on {judged.numel():,}{'' if needs_data else ' tokens'}")
    check_length("the speed at the end", dense, min(_PROMPT, judged.shape[1]), settings["new_tokens"])
    before = perplexity(dense, judged)
    say(f"dense: {before}")
    model = copy_of(dense, "prune")
    batches = list(calibration.to(settings["device"]).split(4)) if needs_data else None
    granularity: Any = make_granularity(settings["granularity"])
    sparsity = 1 - settings["density"] if granularity.fixed_sparsity is None else None
    report = prune_(model, sparsity, criterion=settings["criterion"], granularity=granularity, data=batches)
    after = perplexity(model, judged)
    say(f"pruned: {after}")
    model.requires_grad_(False)
    sparse = sparsify_(model, layout=settings["layout"], tokens=(1, 128), value_dtype=settings["value_dtype"])
    runs_sparse = perplexity(model, judged)
    checkpoint.save(model, folder / "pruned.safetensors", settings["value_dtype"])
    _write_folder(model, tokenizer, folder / MODEL_FOLDER, settings["value_dtype"])
    prompt = judged[0, :_PROMPT]
    speeds = tokens_per_second({"dense": dense, "pruned": model}, prompt, new_tokens=settings["new_tokens"])
    say(speed_table(speeds))
    stored = (folder / "pruned.safetensors").stat().st_size
    full = sum(p.numel() * p.element_size() for p in dense.parameters())
    record = {
        "kind": KIND, "settings": settings, "seconds": time.perf_counter() - began,
        "density": report.density, "pruned_parameters": report.total, "parameters": report.parameters,
        "sparse_layers": len(sparse.converted), "layers": report.to_dict()["layers"],
        "dense": {"perplexity": before.value, "loss": before.loss, "bytes": full, **_speed(speeds["dense"])},
        "pruned": {"perplexity": after.value, "loss": after.loss, "bytes": stored, **_speed(speeds["pruned"])},
        "perplexity_as_it_runs": runs_sparse.value, "tokens": before.tokens, "machine": describe(),
        "threads": torch.get_num_threads(), "device": describe_device(torch.device(settings["device"])),
    }  # fmt: skip
    _draw(folder, record, say)
    return record


def _windows(tokenizer: Any, material: str, others: str | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    context, ids = settings["context"], torch.tensor(tokenizer(material)["input_ids"])
    if others is None:
        cut = int(len(ids) * (1 - _HELD_OUT)) // context * context
        ids, rest = ids[:cut], ids[cut:]
    else:
        rest = torch.tensor(tokenizer(others)["input_ids"])
    return token_windows(ids, context, settings["windows"]), token_windows(rest, context, settings["judged_windows"])


def _speed(found: Speed) -> dict[str, float]:
    return {"prompt_tokens_per_second": found.prompt, "new_tokens_per_second": found.generation}


def _write_folder(model: Any, tokenizer: Any, folder: Path, value_dtype: str) -> None:
    save_pretrained(model, folder, value_dtype)
    tokenizer.save_pretrained(folder)


def _draw(folder: Path, record: dict[str, Any], say: Callable[[str], None]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        say(f"no picture: it needs matplotlib ({error}); pip install 'sparseprune[plot]'")
        return

    figure = Figure(figsize=(9, 3))
    axes = figure.subplots(1, 3)
    for axis, (key, title) in zip(
        axes,
        (("perplexity", "perplexity"), ("new_tokens_per_second", "tokens a second"), ("bytes", "bytes on disk")),
    ):
        axis.bar(
            ["dense", "pruned"], [record[which][key] for which in ("dense", "pruned")], color=["#7a8794", "#c8452f"]
        )
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(folder / _PICTURE) as unfinished:
        figure.savefig(unfinished, dpi=120, bbox_inches="tight", format="png")


def check_record(record: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """``record`` where it has all that :func:`summary` shows; ValueError, naming ``source``, where it has not."""
    numbers = [record.get(key) for key in ("density", "pruned_parameters", "parameters", "sparse_layers", "threads")]
    numbers.append(record.get("perplexity_as_it_runs"))
    for which in ("dense", "pruned"):
        side = record.get(which)
        numbers += [side.get(key) if isinstance(side, dict) else None for key, _ in _SHOWN]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and n >= 0 for n in numbers):
        raise ValueError(f"{source}: expected the run.json of a language model's run, got another record")
    return record


def summary(record: dict[str, Any]) -> str:
    """The record as a table: dense beside pruned, and pruned / dense."""
    lines = [f"{'':<24}{'dense':>14}{'pruned':>14}{'ratio':>8}"]
    for key, label in _SHOWN:
        before, after = record["dense"][key], record["pruned"][key]
        shown = "{:>14,.0f}" if key == "bytes" else "{:>14.4g}"
        lines.append(f"{label:<24}{shown.format(before)}{shown.format(after)}{after / before if before else 0:>8.3f}")
    share = record["pruned_parameters"] / max(1, record["parameters"])
    lines.append(
        f"density {record['density']:.4f} of {record['pruned_parameters']:,} weights ({share:.3f} of all parameters); "
        f"{record['sparse_layers']} layers run sparse, perplexity {record['perplexity_as_it_runs']:.4g} as it runs; "
        f"{record['threads']} threads"
    )
    return "\n".join(lines)
