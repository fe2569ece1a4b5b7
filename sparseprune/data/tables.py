"""Tables of text and label: CSV with the names of its columns, Parquet, Arrow, and folders of Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..pruning.columns import TEXT_COLUMNS

__all__ = ["TABLES", "find_splits", "is_table", "read_columns", "table_rows"]

#: Endings of the files that are read here.
TABLES = (".csv", ".parquet", ".arrow")
_KNOWN = (*TABLES, ".tsv", ".jsonl", ".json", ".ndjson", ".conll", ".bio", ".iob")
_LABELS = ("label", "labels")
#: Columns that are read; another may stand twice.
_USED = {*_LABELS, *(key for keys in TEXT_COLUMNS for key in keys)}
_LONGEST_FIELD = 2**31 - 1
_SPLITS = {"train": ("train",), "valid": ("validation", "valid", "dev", "val"), "test": ("test",)}


def is_table(path: Path) -> bool:
    """Whether this is a file or a folder that :func:`read_columns` reads."""
    return path.suffix.lower() in TABLES or path.is_dir()


def read_columns(path: Path) -> tuple[dict[str, list[Any]], list[str] | None]:
    """(values by column, the names that the numbers under ``label`` stand for, where the file says so).

    ImportError with the remedy where the package for it is missing, ValueError on what is no such file.
    """
    if path.is_dir():
        return _saved(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one of {', '.join(TABLES)} or a folder of datasets")
    return _csv(path) if path.suffix.lower() == ".csv" else _arrow(path)


def table_rows(path: Path) -> tuple[list[tuple[tuple[str, ...], str, int]], list[str] | None]:
    """([(texts, label as written, number of the row from 1)], names of the labels in their order, or None)."""
    columns, names = read_columns(path)
    keys = [keys for keys in TEXT_COLUMNS if all(key in columns for key in keys)]
    labels = [key for key in _LABELS if key in columns]
    if len(keys) != 1 or len(labels) != 1:
        wanted = ", ".join("+".join(each) for each in TEXT_COLUMNS)
        other = len(columns) == 1 and any(sign in next(iter(columns)) for sign in ";\t|")
        remedy = "put commas between them" if other else "rename those that are meant, or others of these names"
        got = ", ".join(columns)
        raise ValueError(
            f"{path}: expected one text or pair ({wanted}) and one column label or labels, got {got}; {remedy}"
        )
    rows = []
    for number, (*texts, label) in enumerate(zip(*(columns[key] for key in keys[0]), columns[labels[0]]), 1):
        where = f"{path}: row {number}"
        if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            under = " and ".join(keys[0])
            raise ValueError(f"{where}: expected a text under {under}, got {wrong[0]}; leave the row out")
        label = int(label) if isinstance(label, float) and label.is_integer() else label  # of a column with gaps
        if names is not None and isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < len(names):
                raise ValueError(
                    f"{where}: label {label} expected from 0 to {len(names) - 1}; a split without labels has -1: take "
                    "another one"
                )
            label = names[label]
        if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
            raise ValueError(f"{where}: label expected a name or a whole number, got {label!r}")
        rows.append((tuple(texts), str(label).strip(), number))
    if not rows:
        raise ValueError(f"{path}: the table is empty; expected one example a row")
    return rows, names


def find_splits(folder: Path) -> dict[str, Path]:
    """train, valid and test in a folder: those of ``DatasetDict.save_to_disk``, or files that are named so
    (``train.csv``, ``data/validation-00000-of-00001.parquet``). Errors say which were expected and what is there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected one with train, validation and test")
    if (folder / "state.json").is_file():
        raise ValueError(
            f"{folder}: expected three splits, got one data set; save a DatasetDict, or pass three folders as --train, "
            "--valid and --test"
        )
    places = sorted(p for base in (folder, folder / "data") if base.is_dir() for p in base.iterdir())
    places = [p for p in places if (p / "state.json").is_file() or (p.is_file() and p.suffix.lower() in _KNOWN)]
    found: dict[str, Path] = {}
    for split, names in _SPLITS.items():
        own = [p for p in places if p.stem.lower().replace("_", "-").partition("-")[0].partition(".")[0] in names]
        if len(own) > 1:
            raise ValueError(
                f"{folder}: {split} expected in one file, got {', '.join(p.name for p in own)}; join them, or pass "
                "--train, --valid and --test"
            )
        if own:
            found[split] = own[0]
    if len(found) < len(_SPLITS):
        there = ", ".join(p.name for p in places) or "no data file"
        raise ValueError(
            f"{folder}: expected train, validation and test, got {there}; split the data (train_test_split of datasets)"
        )
    return found


def _csv(path: Path) -> tuple[dict[str, list[Any]], None]:
    """As RFC 4180: the first row names the columns, quotes hold commas and line ends."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_fields(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got an invalid byte at offset {error.start}") from None
    except csv.Error as error:
        raise ValueError(f"{path}: expected CSV, got {error}") from None
    rows = [row for row in rows if row]
    if not rows:
        raise ValueError(f"{path}: the file is empty; expected the names of the columns, then one example a row")
    names, body = [name.strip() for name in rows[0]], rows[1:]
    _check_once(names, path)
    for number, row in enumerate(body, 1):
        if len(row) != len(names):
            raise ValueError(f"{path}: row {number} expected {len(names)} fields ({', '.join(names)}), got {len(row)}")
    return {name: [row[i] for row in body] for i, name in enumerate(names)}, None


def _fields(file: TextIO) -> Iterator[list[str]]:
    """The rows of a CSV file, whose fields may be as long as they like: the reader's limit is one of the process."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield from csv.reader(file, strict=True)
    finally:
        csv.field_size_limit(before)


def _check_once(names: Sequence[str], path: Path) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1 and name in _USED]
    if twice:
        raise ValueError(f"{path}: expected one column {twice[0]}, got {names.count(twice[0])}; rename the others")


def _arrow(path: Path) -> tuple[dict[str, list[Any]], list[str] | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{path}: needs the package pyarrow ({error}); pip install pyarrow") from None
    try:
        if path.suffix.lower() == ".parquet":
            table = pyarrow.parquet.ParquetFile(path).read()
        else:
            with pyarrow.memory_map(str(path)) as source:
                stream = source.read(6) != b"ARROW1"
                source.seek(0)
                table = (pyarrow.ipc.open_stream if stream else pyarrow.ipc.open_file)(source).read_all()
                return _table(table, path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: expected {path.suffix[1:]}, got a file that cannot be read so: {error}") from None
    return _table(table, path)


def _table(table: Any, path: Path) -> tuple[dict[str, list[Any]], list[str] | None]:
    _check_once(table.column_names, path)
    columns = {name: column.to_pylist() for name, column in zip(table.column_names, table.columns)}
    return columns, _class_names(table.schema.metadata)


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str] | None:
    """The names of the labels as datasets writes them down in a file."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return None
    found = [features[key].get("names") for key in _LABELS if isinstance(features.get(key), dict)]
    return _names(found[0]) if found else None


def _names(found: Sequence[Any] | None) -> list[str] | None:
    return [str(name) for name in found] if found else None


def _saved(folder: Path) -> tuple[dict[str, list[Any]], list[str] | None]:
    """A folder by ``Dataset.save_to_disk``."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{folder}: a folder of datasets needs the package ({error}); pip install datasets") from None
    try:
        found: Any = datasets.load_from_disk(str(folder))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder}: expected a folder by Dataset.save_to_disk: {error}") from None
    names = getattr(found, "column_names", None)
    if not isinstance(names, list):
        raise ValueError(f"{folder}: expected one data set, got the splits {', '.join(found)}; name one of its folders")
    label = next((found.features[key] for key in _LABELS if key in names), None)
    return {name: list(found[name]) for name in names}, _names(getattr(label, "names", None))
