"""What is wrong with a data set before anything is trained on it: duplicates, conflicts, empty texts, leakage."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .loading import Examples, TextData

__all__ = ["DataReport", "Finding", "check_data"]

_SHOWN = 3
_SPECIAL = 4
_WIDTH = 60


@dataclass(frozen=True)
class Finding:
    """``count`` examples of ``split`` with one problem, of ``of`` in it, and the first few of them.

    kind: "duplicates" (further copies of a text with its label), "conflicts" (a text with more than one label), "empty"
    (no character but spaces), "long" (more tokens than are read), "leakage" (also in a split that is trained or chosen
    on), "missing" (classes without a training example).
    """

    kind: str
    split: str
    count: int
    of: int
    what: str
    examples: tuple[str, ...]

    def __str__(self) -> str:
        shown = "; ".join(self.examples)
        return f"data: {self.split}: {self.count} of {self.of} {self.what}" + (f" ({shown})" if shown else "")


@dataclass(frozen=True)
class DataReport:
    """All findings; none is the good case."""

    findings: tuple[Finding, ...]

    @property
    def clean(self) -> bool:
        return not self.findings

    def lines(self) -> list[str]:
        return [str(found) for found in self.findings] or ["data: no duplicates, conflicts, empty texts or leakage"]

    def to_list(self) -> list[dict[str, Any]]:
        return [
            {"kind": f.kind, "split": f.split, "count": f.count, "of": f.of, "examples": list(f.examples)}
            for f in self.findings
        ]

    def raise_if_any(self) -> None:
        """ValueError with all findings, unless there are none."""
        if self.findings:
            raise ValueError(
                f"{' '.join(f'{line}.' for line in self.lines())} Clean the files, or let the run go on with "
                "data_check='report'"
            )


def check_data(
    data: TextData, max_length: int | None = None, count_tokens: Callable[[Sequence[str]], int] | None = None
) -> DataReport:
    """Texts are compared without case and with their spaces joined. max_length, count_tokens: how many tokens of an
    example (a tuple of its texts) are read, and how many it has; without them nothing counts as long.
    """
    found: list[Finding] = []
    keys = {name: [_key(texts, part.tokens) for texts in part.texts] for name, part in data.splits.items()}
    for name, part in data.splits.items():
        found += _inside(name, part, keys[name])
        if max_length is not None and count_tokens is not None:
            # No tokeniser makes more tokens than bytes, but for the few special ones: most texts need no counting.
            sizes = [sum(len(text.encode()) + _SPECIAL for text in texts) for texts in part.texts]
            places = [i for i, size in enumerate(sizes) if size > max_length]
            long = [i for i in places if count_tokens(part.texts[i]) > max_length]
            found += _finding("long", name, part, long, f"longer than the {max_length} tokens that are read")
    for name, before in (("valid", ("train",)), ("test", ("train", "valid"))):
        for other in before:
            known = set(keys[other]) - {_empty_key(data.splits[other])}
            leaked = [i for i, key in enumerate(keys[name]) if key in known]
            found += _finding("leakage", name, data.splits[name], leaked, f"also in {other}")
    used = {label for own in data.train.labels for label in (own if data.train.tokens else [own])}
    missing = [label for i, label in enumerate(data.label_names) if i not in used]
    if missing:
        shown = tuple(missing[:_SHOWN])
        found.append(
            Finding("missing", "train", len(missing), len(data.label_names), "classes without an example", shown)
        )
    return DataReport(tuple(found))


def _inside(name: str, part: Examples, keys: list[Any]) -> list[Finding]:
    labels: dict[Any, set[Any]] = defaultdict(set)
    for key, label in zip(keys, part.labels):
        labels[key].add(tuple(label) if part.tokens else label)
    blank = _empty_key(part)
    empty = [i for i, key in enumerate(keys) if key == blank]
    conflicts = [i for i, key in enumerate(keys) if len(labels[key]) > 1 and key != blank]
    copies, seen = [], Counter[Any]()
    for i, key in enumerate(keys):
        copies += [i] if seen[key] and len(labels[key]) == 1 and key != blank else []
        seen[key] += 1
    return [
        *_finding("empty", name, part, empty, "empty"),
        *_finding("conflicts", name, part, conflicts, "with a text that has other labels elsewhere"),
        *_finding("duplicates", name, part, copies, "copies of another"),
    ]


def _finding(kind: str, split: str, part: Examples, places: list[int], what: str) -> list[Finding]:
    if not places:
        return []
    shown = [" ".join(" | ".join(part.texts[i]).split()) for i in places]
    shown = list(dict.fromkeys(text for text in shown if text))[:_SHOWN]
    cut = tuple(text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..." for text in shown)
    return [Finding(kind, split, len(places), len(part), what, cut)]


def _key(texts: Sequence[str], tokens: bool) -> tuple[str, ...]:
    joined = [" ".join(texts)] if tokens else texts
    return tuple(" ".join(text.casefold().split()) for text in joined)


def _empty_key(part: Examples) -> tuple[str, ...]:
    return ("",) * (1 if part.tokens else len(part.texts[0]))
