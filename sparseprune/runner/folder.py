"""A run's folder: one process at a time, whole files, and what a run that was cut short left to go on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from .._arguments import check_folder
from .._files import holding, in_home, remove_unfinished, write_text
from .config import RunConfig, differences

__all__ = ["DENSE", "RECORDS", "TRAINING", "check_place", "clear", "enter", "occupied", "write_json"]

#: Checkpoints of the dense training and of the pruning; both go when the run is finished.
DENSE, TRAINING = "dense.ckpt", "training.ckpt"

_RECORD, _SETTINGS, _DATA, _HISTORY = "run.json", "settings.json", "data.digest", "history.json"
#: What tells of the run and is no part of the model.
RECORDS = (_RECORD, _SETTINGS, _HISTORY)
_PICTURES = ("curves.png", "layers.png", "tradeoff.png", "robustness.png")
_WRITTEN = (DENSE, TRAINING, *RECORDS, _DATA, "dense.safetensors", "pruned.safetensors", "vocabulary.json",
            "encoder.json", *_PICTURES)  # fmt: skip


def check_place(out: str | Path, name: str) -> Path:
    """The folder ``out/name``, of which nothing is made yet. ValueError on a name that leads elsewhere, OSError where
    nothing can be written.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"run: name expected a plain folder name, without separators, got {name!r}")
    folder = in_home(out) / name
    check_folder(folder, "out")
    return folder


def occupied(folder: Path, say: Callable[[str], None]) -> AbstractContextManager[None]:
    """Makes the folder and holds it; BlockingIOError where another process does."""
    return holding(folder, "wait for it, or give this run another --name", say)


def enter(folder: Path, config: RunConfig, data: str, say: Callable[[str], None], model: str = "") -> None:
    """Writes the settings, and tells what becomes of what was there. The checkpoints of an unfinished run of the same
    settings, ``data`` and ``model``, digests, stay; those of any other go. model: of the one that is given, if any.
    """
    for name in _WRITTEN:
        remove_unfinished(folder / name)
    settings, digest, wanted = folder / _SETTINGS, folder / _DATA, config.to_json()
    finished = (folder / _RECORD).exists()
    before = digest.read_bytes().split() if digest.exists() else []
    same = before == f"{data} {model}".encode().split()
    agree = settings.exists() and settings.read_bytes() == wanted.encode()
    if agree and same and not finished:
        if not any((folder / name).exists() for name in (DENSE, TRAINING)):
            say(f"{folder}: an unfinished run of these settings, without a checkpoint yet; it starts again")
        return
    if finished:
        say(f"{folder}: the finished run here is replaced")
    elif any((folder / name).exists() for name in (DENSE, TRAINING)):
        own = before[:1] == [data.encode()]
        what = "other data" if not own else "another model" if agree else "other settings"
        say(f"{folder}: the unfinished run here had {what} and is replaced{_what_differs(settings, config)}")
    for leftover in (TRAINING, DENSE, _RECORD, _HISTORY, *_PICTURES):
        folder.joinpath(leftover).unlink(missing_ok=True)
    write_text(digest, f"{data} {model}".strip())
    write_text(settings, wanted)


def _what_differs(settings: Path, config: RunConfig) -> str:
    try:
        old = RunConfig.from_json(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f" (its {settings.name} cannot be read: {' '.join(str(error).split())})"
    found = differences(old, config)
    return f" ({'; '.join(found)})" if found else ""


def clear(folder: Path) -> None:
    """Removes what only an unfinished run needs."""
    for leftover in (TRAINING, DENSE, _DATA):
        folder.joinpath(leftover).unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=_plain_number))


def _plain_number(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
