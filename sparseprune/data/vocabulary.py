"""A vocabulary built from the training split: words for English, characters for Chinese."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

__all__ = ["Vocabulary", "detect_unit", "in_parts"]

Unit = Literal["word", "character"]

_WORD = re.compile(r"\w+|[^\w\s]")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")


def in_parts(texts: Iterable[Sequence[str] | str], who: str) -> Iterator[tuple[str, ...]]:
    """Each example as a tuple of its texts; a text alone is a tuple of one."""
    if isinstance(texts, str):
        raise ValueError(f"{who}: texts expected a list of them, got one text; pass [text]")
    return ((parts,) if isinstance(parts, str) else tuple(parts) for parts in texts)


def detect_unit(texts: Iterable[Sequence[str] | str]) -> Unit:
    """``"character"`` where more than a fifth of the non-space characters are Han characters, else ``"word"``."""
    han = total = 0
    for parts in in_parts(texts, "detect_unit"):
        for text in parts:
            han += len(_HAN.findall(text))
            total += sum(not c.isspace() for c in text)
    return "character" if total and han > total / 5 else "word"


class Vocabulary:
    """Token <-> id. Ids 0 to 3 are padding, unknown, separator (between the two texts of a pair) and mask."""

    PAD, UNKNOWN, SEPARATOR, MASK = 0, 1, 2, 3
    SPECIAL = ("<pad>", "<unk>", "<sep>", "<mask>")

    def __init__(self, tokens: Sequence[str], unit: Unit):
        if unit not in ("word", "character"):
            raise ValueError(f'Vocabulary: unit expected "word" or "character", got {unit!r}')
        if tuple(tokens[: len(self.SPECIAL)]) != self.SPECIAL:
            raise ValueError(f"Vocabulary: the first tokens expected {self.SPECIAL}, got {list(tokens)[:4]}")
        self.tokens, self.unit = list(tokens), unit
        self._index = {token: i for i, token in enumerate(self.tokens)}

    @classmethod
    def build(
        cls, texts: Sequence[Sequence[str] | str], unit: Unit | None = None, min_count: int = 2,
        max_size: int | None = 20000,
    ) -> Vocabulary:  # fmt: skip
        """Counts the tokens of ``texts`` (texts, or tuples of one or two); keeps those seen ``min_count`` times, most
        frequent first, ties in code-point order."""
        texts = list(in_parts(texts, "Vocabulary.build"))
        chosen: Unit = unit if unit is not None else detect_unit(texts)
        counts: Counter[str] = Counter()
        for parts in texts:
            for text in parts:
                counts.update(_split(text, chosen))
        kept = sorted((t for t, c in counts.items() if c >= min_count), key=lambda t: (-counts[t], t))
        room = None if max_size is None else max(0, max_size - len(cls.SPECIAL))
        return cls([*cls.SPECIAL, *kept[:room]], chosen)

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, texts: Sequence[str] | str, max_length: int = 64) -> list[int]:
        """The ids of one text, or of two with a separator between them; at least one id, at most ``max_length``."""
        if max_length < 1:
            raise ValueError(f"Vocabulary.encode: max_length expected at least 1, got {max_length}")
        ids: list[int] = []
        for i, text in enumerate((texts,) if isinstance(texts, str) else texts):
            if i:
                ids.append(self.SEPARATOR)
            ids += [self._index.get(token, self.UNKNOWN) for token in _split(text, self.unit)]
        return ids[:max_length] or [self.UNKNOWN]

    def to_json(self) -> str:
        return json.dumps({"unit": self.unit, "tokens": self.tokens}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        raw = json.loads(text)
        if not isinstance(raw, dict) or set(raw) != {"unit", "tokens"}:
            raise ValueError('Vocabulary: expected a JSON object with "unit" and "tokens"')
        return cls(raw["tokens"], raw["unit"])


def _split(text: str, unit: Unit) -> list[str]:
    text = text.lower()
    return [c for c in text if not c.isspace()] if unit == "character" else _WORD.findall(text)
