"""Labelled texts from the built-in sets and from TSV, JSONL or CoNLL files, checked whole before anything is done with
them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._files import in_home
from .rows import Row, check_no_header, is_conll, place_of, read_names, read_rows, read_sentences
from .tables import find_splits

__all__ = ["SETS", "Examples", "TextData", "load_files", "load_folder", "load_set", "read_examples"]

#: Built-in sets: name -> language (ISO 639-1).
SETS = {"clinc10": "en", "crosswoz_zh": "zh"}


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

    def describe(self) -> str:
        """One line: how many examples each split has, and which classes there are."""
        sizes = ", ".join(f"{len(split)} {name}" for name, split in self.splits.items())
        shown = ", ".join(self.label_names[:6]) + (", ..." if len(self.label_names) > 6 else "")
        return f"{self.name}: {sizes}; {len(self.label_names)} labels ({shown})"

    def digest(self) -> str:
        """sha256 over label names, texts and labels of all splits, in hexadecimal."""
        digest = hashlib.sha256()
        rows = {name: [split.texts, split.labels] for name, split in self.splits.items()}
        digest.update(json.dumps([self.label_names, rows], ensure_ascii=False).encode())
        return digest.hexdigest()

    def head(self, train: int | None = None, other: int | None = None) -> TextData:
        """A smaller set: ``train`` training examples and ``other`` of each other split, at least one, spread over the
        files.
        """
        if any(limit is not None and limit < 1 for limit in (train, other)):
            raise ValueError(f"head: expected at least one example of each split, got {train!r} and {other!r}")

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
    train, valid, test = (folder / f"{split}.tsv" for split in ("train", "dev", "test"))
    return load_files(train, valid, test, label_names=read_names(folder / "labels.txt"), name=name)


def load_files(
    train: str | Path,
    valid: str | Path,
    test: str | Path,
    label_names: Sequence[str] | None = None,
    name: str | None = None,
) -> TextData:
    """Reads three files, each TSV or JSONL, or all three CoNLL (.conll, .bio, .iob: a word a line, its label in the
    last column, an empty line between sentences).

    label_names: labels in the files are these names, or their places from 0 (CoNLL: names only); where a name is the
    number of another place, all labels are names or all are places. None: the distinct labels of the training file,
    numbers in their order and names in code-point order (of a data set that names its labels those, in its order); a
    label that only another file has is an error.

    Raises FileNotFoundError on a missing file, ValueError with file and line on anything else that is wrong in one, and
    on names that are no texts or stand twice.
    """
    paths = {"train": in_home(train), "valid": in_home(valid), "test": in_home(test)}
    tokens = any(is_conll(path) for path in paths.values())
    for path in paths.values():
        if tokens and not is_conll(path):
            raise ValueError(f"{path}: expected a CoNLL file (.conll, .bio, .iob) as the others are")
    read = {split: (read_sentences(path), None) if tokens else read_rows(path) for split, path in paths.items()}
    rows = {split: found for split, (found, _) in read.items()}
    check_no_header({paths[split]: found for split, found in rows.items()})
    if not tokens:
        texts = len(rows["train"][0].texts)
        for split, found in rows.items():
            if len(found[0].texts) != texts:
                where = place_of(paths[split], found[0].numbers[0])
                raise ValueError(
                    f"{where}: expected {texts} text(s) as in the training file, got {len(found[0].texts)}"
                )
    given = None if label_names is None else _checked_names(label_names)
    names = given or read["train"][1] or _distinct(rows["train"])
    index = _index(names, [row for found in rows.values() for row in found], given is not None and not tokens)
    splits = {split: _examples(found, index, names, str(paths[split]), tokens) for split, found in rows.items()}
    return TextData(name or paths["train"].stem, splits["train"], splits["valid"], splits["test"], names)


def load_folder(folder: str | Path, label_names: Sequence[str] | None = None) -> TextData:
    """Reads a folder with three splits: of ``datasets.DatasetDict.save_to_disk``, or three files named train,
    validation and test, of any kind that :func:`load_files` and :mod:`.tables` read. Errors as there.
    """
    place = in_home(folder)
    splits = find_splits(place)
    return load_files(splits["train"], splits["valid"], splits["test"], label_names, name=place.resolve().name)


def read_examples(path: str | Path, label_names: Sequence[str]) -> Examples:
    """Reads one file whose labels are among ``label_names``, by name or place from 0 (CoNLL: by name), as
    :func:`load_files` has it.
    """
    path, names = in_home(path), _checked_names(label_names)
    tokens = is_conll(path)
    rows = read_sentences(path) if tokens else read_rows(path)[0]
    check_no_header({path: rows})
    return _examples(rows, _index(names, rows, not tokens), names, str(path), tokens)


def _checked_names(given: Sequence[str]) -> list[str]:
    """ValueError on names that labels in a file cannot be told apart by."""
    if isinstance(given, str):
        raise ValueError(f"label_names: expected a list of names, got the text {given!r}; pass [{given!r}, ...]")
    names = list(given)
    if not names:
        raise ValueError("label_names: expected a name or more, got none; leave label_names out")
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"label_names: expected texts, got {name!r} at place {i}; write it as the files do")
        if first.setdefault(name, i) != i:
            raise ValueError(
                f"label_names: expected each name once, got {name!r} at places {first[name]} and {i}; leave one out"
            )
    return names


def _distinct(rows: list[Row]) -> list[str]:
    written = {label for row in rows for label in row.labels}
    if all(label.isascii() and label.isdecimal() for label in written):
        return sorted(written, key=lambda label: (len(label.lstrip("0")), label.lstrip("0"), label))  # as numbers
    return sorted(written)


def _index(names: list[str], rows: list[Row], places: bool) -> dict[str, int]:
    """Number by label as written; ``places``: the number itself counts too. Where names are the numbers of other places
    ("1" to "5"), ``rows`` say which of the two all labels are; ValueError where they can be either.
    """
    by_name = {name: i for i, name in enumerate(names)}
    by_place = {str(i): i for i in range(len(names))} if places else {}
    if all(by_place.get(name, i) == i for name, i in by_name.items()):
        return {**by_place, **by_name}
    written = {label for row in rows for label in row.labels}
    named, placed = written <= by_name.keys(), written <= by_place.keys()
    if named and placed and any(by_name[label] != by_place[label] for label in written):
        shown = ", ".join(sorted(written)[:8]) + (", ..." if len(written) > 8 else "")
        raise ValueError(
            f"label_names: expected labels that are either names or places from 0, got {shown}, which can be both, of "
            f"other classes; give names that are no numbers (such as 'class {names[0]}'), or write those into the files"
        )
    return by_place if placed and not named else by_name


def _examples(rows: list[Row], index: dict[str, int], names: list[str], source: str, tokens: bool) -> Examples:
    for row in rows:
        for i, label in enumerate(row.labels):
            if label not in index:
                of = f" of {row.texts[i]!r}" if tokens else ""
                known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
                raise ValueError(
                    f"{place_of(Path(source), row.numbers[i])}: label {label!r}{of} is not among the {len(names)} "
                    f"known labels ({known})"
                )
    labels = [[index[label] for label in row.labels] for row in rows]
    return Examples([row.texts for row in rows], labels if tokens else [own[0] for own in labels], source, tokens)
