"""Reads labelled texts from the built-in sets and from TSV, JSONL or CoNLL files; every fault in a file is one clear
line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["SETS", "Examples", "TextData", "load_files", "load_set", "read_examples"]

#: Built-in sets: name -> language (ISO 639-1).
SETS = {"clinc10": "en", "crosswoz_zh": "zh"}

_TEXT_KEYS = (
    ("text",), ("sentence",), ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question", "answer"),
)  # fmt: skip


_CONLL = (".conll", ".bio", ".iob")


@dataclass(frozen=True)
class Examples:
    """One split. ``texts[i]``: a tuple of one text, or two for sentence pairs; ``labels[i]`` indexes label names.

    ``tokens``: every word has a label; ``texts[i]`` are then the words of a sentence, ``labels[i]`` a list as long.
    """

    texts: list[tuple[str, ...]]
    labels: list[Any]
    source: str
    tokens: bool = False

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class TextData:
    """The three splits of one data set with the names of its labels."""

    name: str
    train: Examples
    valid: Examples
    test: Examples
    label_names: list[str]

    @property
    def splits(self) -> dict[str, Examples]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def digest(self) -> str:
        """sha256 over label names, texts and labels of all splits, in hexadecimal."""
        digest = hashlib.sha256()
        rows = {name: [split.texts, split.labels] for name, split in self.splits.items()}
        digest.update(json.dumps([self.label_names, rows], ensure_ascii=False).encode())
        return digest.hexdigest()

    def head(self, train: int | None = None, other: int | None = None) -> TextData:
        """A smaller set: ``train`` training examples and ``other`` of each other split, spread over the files."""

        def cut(split: Examples, limit: int | None) -> Examples:
            if limit is None or limit >= len(split):
                return split
            chosen = [i * len(split) // limit for i in range(limit)]
            return replace(split, texts=[split.texts[i] for i in chosen], labels=[split.labels[i] for i in chosen])

        return TextData(
            self.name, cut(self.train, train), cut(self.valid, other), cut(self.test, other), self.label_names
        )


def load_set(name: str) -> TextData:
    """A set that ships with the package (see ``SETS`` and data/ATTRIBUTION.md). ValueError on another name."""
    if name not in SETS:
        raise ValueError(
            f"data set expected one of {', '.join(SETS)}, got {name!r}; or pass train, valid and test files"
        )
    folder = Path(__file__).resolve().parent / "sets" / name
    names = folder.joinpath("labels.txt").read_text(encoding="utf-8").split("\n")
    data = load_files(
        folder / "train.tsv", folder / "dev.tsv", folder / "test.tsv", label_names=[n for n in names if n], name=name
    )
    return data


def load_files(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    label_names: Sequence[str] | None = None,
    name: str | None = None,
) -> TextData:
    """Reads three files, each TSV or JSONL, or all three CoNLL (.conll, .bio, .iob: a word a line, its label in the
    last column, an empty line between sentences). Labels are names or indices, taken from the training file unless
    given.

    Raises FileNotFoundError on a missing file, ValueError with file and line on anything else that is wrong in one.
    """
    paths = {"train": Path(train), "valid": Path(valid), "test": Path(test)}
    if any(_is_conll(path) for path in paths.values()):
        return _load_conll(paths, label_names, name)
    raw = {split: _read_rows(path) for split, path in paths.items()}
    names = list(label_names) if label_names is not None else _names_of(raw["train"])
    indices = label_names is None and all(n.isdecimal() for n in names)
    if indices:
        names = [str(i) for i in range(max(map(int, names)) + 1)]
    arity = len(raw["train"][0][1])
    splits = {
        split: _examples(rows, names, str(path), arity)
        for (split, rows), path in zip(raw.items(), (train, valid, test))
    }
    return TextData(name or Path(train).stem, splits["train"], splits["valid"], splits["test"], names)


def _is_conll(path: Path) -> bool:
    return path.suffix.lower() in _CONLL


def _load_conll(paths: dict[str, Path], label_names: Sequence[str] | None, name: str | None) -> TextData:
    for path in paths.values():
        if not _is_conll(path):
            raise ValueError(f"{path}: expected a CoNLL file ({', '.join(_CONLL)}) as the others are")
    raw = {split: _read_sentences(path) for split, path in paths.items()}
    names = list(label_names or sorted({label for _, _, labels in raw["train"] for label in labels}))
    splits = {split: _sentences(rows, names, str(paths[split])) for split, rows in raw.items()}
    return TextData(name or paths["train"].stem, splits["train"], splits["valid"], splits["test"], names)


def _read_sentences(path: Path) -> list[tuple[int, tuple[str, ...], list[str]]]:
    """(number of the first line, words, labels as written) of each sentence."""
    found: list[tuple[int, tuple[str, ...], list[str]]] = []
    start = 0
    words: list[str] = []
    labels: list[str] = []
    for number, line in enumerate([*_lines_of(path), ""], 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                found.append((start, tuple(words), labels))
            words, labels = [], []
            continue
        if len(fields) < 2:
            raise ValueError(f"{path}:{number}: expected a word and, in the last column, its label, got one column")
        start = start if words else number
        words.append(fields[0])
        labels.append(fields[-1])
    if not found:
        raise ValueError(f"{path}: the file is empty; expected one word a line")
    return found


def _sentences(rows: list[tuple[int, tuple[str, ...], list[str]]], names: list[str], source: str) -> Examples:
    index = {name: i for i, name in enumerate(names)}
    for number, words, labels in rows:
        for i, (word, label) in enumerate(zip(words, labels)):
            if label not in index:
                where = f"{source}:{number + i}"
                raise ValueError(f"{where}: label {label!r} of {word!r} is not among the {len(names)} known labels")
    labelled = [[index[label] for label in labels] for _, _, labels in rows]
    return Examples([words for _, words, _ in rows], labelled, source, tokens=True)


def read_examples(path: str | Path, label_names: Sequence[str]) -> Examples:
    """Reads one file whose labels are among ``label_names``, by name or index (CoNLL: by name)."""
    if _is_conll(Path(path)):
        return _sentences(_read_sentences(Path(path)), list(label_names), str(path))
    rows = _read_rows(Path(path))
    return _examples(rows, list(label_names), str(path), len(rows[0][1]))


def _lines_of(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a TSV (text, tab, label), JSONL or CoNLL file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got an invalid byte at offset {error.start}") from None
    return [line.rstrip("\r") for line in text.split("\n")]


def _read_rows(path: Path) -> list[tuple[int, tuple[str, ...], str]]:
    """(line number, texts, label as written) of each non-blank line."""
    json_lines = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    rows: list[tuple[int, tuple[str, ...], str]] = []
    for number, line in enumerate(_lines_of(path), 1):
        if line.strip():
            texts, label = _json_row(line, f"{path}:{number}") if json_lines else _tab_row(line, f"{path}:{number}")
            rows.append((number, texts, label))
    if not rows:
        raise ValueError(f"{path}: the file is empty; expected one example a line")
    return rows


def _tab_row(line: str, where: str) -> tuple[tuple[str, ...], str]:
    fields = line.split("\t")
    if len(fields) not in (2, 3):
        raise ValueError(f"{where}: expected text<TAB>label or text<TAB>text<TAB>label, got {len(fields)} field(s)")
    if not fields[-1].strip():
        raise ValueError(f"{where}: the label is empty; expected a name or an index in the last field")
    return tuple(fields[:-1]), fields[-1].strip()


def _json_row(line: str, where: str) -> tuple[tuple[str, ...], str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    keys = next((keys for keys in _TEXT_KEYS if all(key in row for key in keys)), None)
    label = row.get("label")
    if keys is None or isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        wanted = '"text" (or "text_a" and "text_b") and "label" (a name or an index)'
        raise ValueError(f"{where}: expected keys {wanted}, got {sorted(row)}")
    texts = tuple(row[key] for key in keys)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: expected a string under {' and '.join(keys)}")
    return texts, str(label).strip()


def _names_of(rows: list[tuple[int, tuple[str, ...], str]]) -> list[str]:
    written = {label for _, _, label in rows}
    return sorted(written, key=int) if all(label.isdecimal() for label in written) else sorted(written)


def _examples(rows: list[tuple[int, tuple[str, ...], str]], names: list[str], source: str, arity: int) -> Examples:
    index = {name: i for i, name in enumerate(names)}
    labels = []
    for number, texts, label in rows:
        if len(texts) != arity:
            raise ValueError(f"{source}:{number}: expected {arity} text(s) as in the training file, got {len(texts)}")
        found = index.get(label)
        if found is None and label.isdecimal() and int(label) < len(names):
            found = int(label)
        if found is None:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{source}:{number}: label {label!r} is not among the {len(names)} known labels ({known})")
        labels.append(found)
    return Examples([texts for _, texts, _ in rows], labels, source)
