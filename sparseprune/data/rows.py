"""Rows of a TSV, JSONL or CoNLL file as written, before labels become numbers; every fault is one line with file and
line number.

UTF-8, with or without a byte order mark at the start. TSV knows no quoting: quotes belong to the text.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..pruning.columns import TEXT_COLUMNS
from .tables import is_table, table_rows

__all__ = ["Row", "check_no_header", "is_conll", "place_of", "read_names", "read_rows", "read_sentences"]

_LABEL_COLUMNS = {"label", "labels", "class", "category", "target", "intent", "gold_label", "label_id", "y"}
_TEXT_COLUMNS = {key for keys in TEXT_COLUMNS for key in keys} | {"utterance", "query", "review", "content", "x"}
_CONLL = (".conll", ".bio", ".iob")
_JSON_LINES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One example. texts: one text, two of a pair, or the words of a sentence; labels: as written, one, or one a word;
    numbers: the lines of the file they stand in.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    numbers: tuple[int, ...]


def is_conll(path: Path) -> bool:
    """Whether the file's name says that it holds a word and its label a line."""
    return path.suffix.lower() in _CONLL


def place_of(path: Path, number: int) -> str:
    """Where a fault is: the line of a file, or the row of a table, whose first is the one below the columns' names."""
    return f"{path}: row {number}" if is_table(path) else f"{path}:{number}"


def read_rows(path: Path) -> tuple[list[Row], list[str] | None]:
    """(the examples of a TSV or JSONL file or of a table (:mod:`.tables`), as many texts in each; the names of the
    labels in their order, where the file gives them).
    """
    if is_table(path):
        found, names = table_rows(path)
        return _checked([Row(texts, (label,), (number,)) for texts, label, number in found], path), names
    parse = _json_row if path.suffix.lower() in _JSON_LINES else _tab_row
    rows: list[Row] = []
    for number, line in enumerate(_lines_of(path), 1):
        if line.strip():
            texts, label = parse(line, f"{path}:{number}")
            rows.append(Row(texts, (label,), (number,)))
    return _checked(rows, path), None


def _checked(rows: list[Row], path: Path) -> list[Row]:
    unit = "row" if is_table(path) else "line"
    for row in rows:
        where = place_of(path, row.numbers[0])
        for part in (*row.texts, *row.labels):
            _check_characters(part, where)
        if not all(text.strip() for text in row.texts):
            raise ValueError(f"{where}: the text is empty; remove the {unit} or give it a text")
        if len(row.texts) != len(rows[0].texts):
            raise ValueError(
                f"{where}: expected {len(rows[0].texts)} text(s) as in {unit} {rows[0].numbers[0]}, got "
                f"{len(row.texts)}; one text or pairs, not both"
            )
    if not rows:
        raise ValueError(f"{path}: the file is empty; expected one example a line")
    return rows


def read_sentences(path: Path) -> list[Row]:
    """The sentences of a CoNLL file: columns by tabs where a line has one, else by ASCII spaces; as many in each line
    of a sentence. Comments before its first word (``# id 7 domain=en``) are passed over.
    """
    found: list[Row] = []
    words: list[str] = []
    labels: list[str] = []
    numbers: list[int] = []
    columns = 0
    lines = [*_lines_of(path), ""]
    comments = _comments(path, lines)
    for number, line in enumerate(lines, 1):
        if number in comments:
            continue
        fields = _columns(line)
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                found.append(Row(tuple(words), tuple(labels), tuple(numbers)))
            words, labels, numbers, columns = [], [], [], 0
            continue
        where = f"{path}:{number}"
        if "\r" in line:
            raise ValueError(f"{where}: expected lines that end in \\n or \\r\\n, got \\r alone in one; convert it")
        if len(fields) < 2:
            raise ValueError(f"{where}: expected a word and, in the last column, its label, got one column")
        columns = columns or len(fields)
        if len(fields) != columns:
            raise ValueError(f"{where}: expected {columns} columns as in the sentence so far, got {len(fields)}")
        if not fields[0] or not fields[-1]:
            raise ValueError(f"{where}: the {'label' if fields[0] else 'word'} is empty")
        for part in (fields[0], fields[-1]):
            _check_characters(part, where)
        words.append(fields[0])
        labels.append(fields[-1])
        numbers.append(number)
    if not found:
        raise ValueError(f"{path}: the file is empty; expected one word a line")
    return found


def _columns(line: str) -> list[str]:
    if not line.strip():
        return []
    if "\t" in line.strip():
        return [field.strip() for field in line.split("\t")]
    return [field.strip() for field in line.strip(" \t").split(" ") if field]  # no-break spaces belong to words


def _comments(path: Path, lines: list[str]) -> set[int]:
    """Numbers of the lines that are comments: before a sentence's first word, ``# `` and what is no row beside it.

    ValueError where one could be either: the word #, with a label that nothing else has.
    """
    labels = {_columns(line)[-1] for line in lines if line.strip() and not line.startswith("# ")}
    found, waiting = set[int](), list[int]()
    inside = False
    for number, line in enumerate(lines, 1):
        if line.startswith("# ") and not inside:
            waiting.append(number)
            continue
        row = _columns(line)
        for above in waiting:
            fields = _columns(lines[above - 1])
            if (row and len(fields) != len(row)) or ("=" in lines[above - 1] and fields[-1] not in labels):
                found.add(above)
            elif fields[-1] not in labels:
                raise ValueError(
                    f"{path}:{above}: expected a comment or the word # with its label, and this could be either, for "
                    f"no other row has the label {fields[-1]!r}; leave the line out, or put a tab behind the word"
                )
        inside, waiting = bool(row), []
    return found


def read_names(path: Path) -> list[str]:
    """Label names, one a line; the line's place, from 0, is the number that stands for it in the data."""
    lines = _lines_of(path)
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"{path}:{number}: expected a label name, got an empty line")
        if name.startswith("# ") or "\t" in name:  # either would shift or rename the classes
            what = "fields with a tab between" if "\t" in name else "what looks like a comment"
            raise ValueError(f"{path}:{number}: expected a label name alone, got {what} ({name!r}); leave all else out")
        if name in first:
            raise ValueError(f"{path}:{number}: label {name!r} stands in line {first[name]} already")
        first[name] = number
    if not names:
        raise ValueError(f"{path}: the file is empty; expected one label name a line")
    return names


def check_no_header(files: dict[Path, list[Row]]) -> None:
    """ValueError where the first line of a TSV file names its columns: by the names that are in use for them, or as
    :func:`_heads` tells, while its label, no number, occurs nowhere else.
    """
    named = (*_JSON_LINES, *_CONLL)
    tabular = {p: rows for p, rows in files.items() if not is_table(p) and p.suffix.lower() not in named}
    later = {label for rows in tabular.values() for row in rows[1:] for label in row.labels}
    for path, rows in tabular.items():
        texts, labels = rows[0].texts, rows[0].labels
        if labels[0] in later or labels[0].isdecimal():
            continue
        known = labels[0].lower() in _LABEL_COLUMNS and all(text.strip().lower() in _TEXT_COLUMNS for text in texts)
        if known or any(_heads(rows, other) for name, other in tabular.items() if name != path):
            raise ValueError(
                f"{path}:{rows[0].numbers[0]}: expected an example, got what looks like the names of the columns "
                f"({', '.join((*texts, *labels))}); remove that line, or where it is an example, move it further down"
            )


def _heads(rows: list[Row], other: list[Row]) -> bool:
    """Whether the first line is that of the other file too and unlike the examples below it: no more lines are in both
    files, or each other label stands in several lines. A file of one line has an example there, if any.
    """
    (first, *mine), (heading, *theirs) = ([(row.texts, row.labels) for row in each] for each in (rows, other))
    if first != heading or not mine or not theirs:
        return False
    counts = Counter(labels for _, labels in mine)
    return set(mine).isdisjoint(theirs) or min(counts.values()) > 1


def _lines_of(path: Path) -> list[str]:
    if not path.is_file():
        what = "not a file" if path.exists() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected a TSV (text, tab, label), JSONL or CoNLL file")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{number}: expected UTF-8 text, got an invalid byte at offset {error.start}; convert the file"
        ) from None
    if "\r" in text and "\n" not in text:
        raise ValueError(f"{path}: expected lines that end in \\n or \\r\\n, got \\r alone; convert the file")
    lines = [line.rstrip("\r") for line in text.split("\n")]
    for number, line in enumerate(lines, 1):
        _check_characters(line, f"{path}:{number}")
    return lines


def _check_characters(text: str, where: str) -> None:
    """What would be taken for text and break later, or stand for another encoding or two files in one."""
    if "\0" in text:
        raise ValueError(f"{where}: expected UTF-8 text, got a NUL byte (is it UTF-16?); convert the file")
    if text.startswith("\ufeff"):
        raise ValueError(f"{where}: a byte order mark in the middle (were two files joined?); remove it")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: half of a surrogate pair, which is no character; remove it")


def _tab_row(line: str, where: str) -> tuple[tuple[str, ...], str]:
    fields = line.split("\t")
    if len(fields) not in (2, 3):
        hint = "; TSV has no quoting, use JSONL for texts with tabs or line ends" if '"' in line else ""
        raise ValueError(
            f"{where}: expected text<TAB>label or text<TAB>text<TAB>label, got {len(fields)} field(s){hint}"
        )
    if not fields[-1].strip():
        raise ValueError(f"{where}: the label is empty; expected a name or a number in the last field")
    return tuple(fields[:-1]), fields[-1].strip()


def _json_row(line: str, where: str) -> tuple[tuple[str, ...], str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg}); expected one object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets a thousand deep
        raise ValueError(f"{where}: JSON that cannot be read ({error}); expected one flat object a line") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    found = [keys for keys in TEXT_COLUMNS if all(key in row for key in keys)]
    if {"label", "labels"} <= row.keys():
        raise ValueError(f"{where}: expected one key label or labels, got both; leave one of them out")
    label = row.get("label", row.get("labels"))
    label = int(label) if isinstance(label, float) and label.is_integer() else label
    if not found or not {"label", "labels"} & row.keys():
        wanted = '"text" (or "text_a" and "text_b") and "label" (a name or a whole number)'
        raise ValueError(f"{where}: expected keys {wanted}, got {sorted(row)}")
    if len(found) > 1:
        raise ValueError(f"{where}: expected one text or pair, got {' and '.join('+'.join(keys) for keys in found)}")
    if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
        raise ValueError(f"{where}: label expected a name or a whole number, got {json.dumps(label)}; leave it out")
    texts = tuple(row[key] for key in found[0])
    if wrong := [json.dumps(text) for text in texts if not isinstance(text, str)]:
        raise ValueError(f"{where}: expected a string under {' and '.join(found[0])}, got {wrong[0]}; leave it out")
    return texts, str(label).strip()
