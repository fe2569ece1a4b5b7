"""Texts as people write them: with typos and missing words. For judging a model, not for training it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .loading import Examples
from .vocabulary import detect_unit

__all__ = ["drop_words", "longest", "typos"]


def typos(split: Examples, share: float, seed: int = 0) -> Examples:
    """In ``share`` of the words of three letters or more a slip: two neighbours swapped, a letter left out, doubled or
    taken from elsewhere in the split. Texts without spaces (Chinese, Japanese): that share of the characters replaced
    by others of the split.
    """
    rng, letters = random.Random(seed), _letters(split)

    def word(own: str) -> str:
        if len(own) < 3 or rng.random() >= share:
            return own
        i = rng.randrange(len(own) - 1)
        slip = rng.randrange(4)
        if slip == 0:
            return own[:i] + own[i + 1] + own[i] + own[i + 2 :]
        return own[:i] + ("", own[i] * 2, rng.choice(letters))[slip - 1] + own[i + 1 :]

    def character(own: str) -> str:
        return rng.choice(letters) if not own.isspace() and rng.random() < share else own

    return _each(split, word, character)


def drop_words(split: Examples, share: float, seed: int = 0) -> Examples:
    """``share`` of the words left out, one of each text at least stays; of texts without spaces, the characters. Where
    words have labels, those of the missing ones go too.
    """
    rng = random.Random(seed)
    if split.tokens:
        kept = [_kept(len(words), share, rng) for words in split.texts]
        texts = [tuple(words[i] for i in own) for words, own in zip(split.texts, kept)]
        return replace(split, texts=texts, labels=[[own[i] for i in k] for own, k in zip(split.labels, kept)])
    spaced = detect_unit(split.texts[:200]) == "word"

    def cut(text: str) -> str:
        parts = text.split() if spaced else list(text)
        return (" " if spaced else "").join(parts[i] for i in _kept(len(parts), share, rng)) if parts else text

    return replace(split, texts=[tuple(cut(text) for text in texts) for texts in split.texts])


def longest(split: Examples, share: float) -> Examples:
    """The ``share`` of the split with the longest texts, in the order of the split: a set that is unlike the rest."""
    sizes = [sum(len(text) for text in texts) for texts in split.texts]
    count = max(1, round(share * len(split)))
    chosen = sorted(sorted(range(len(split)), key=lambda i: (-sizes[i], i))[:count])
    return replace(split, texts=[split.texts[i] for i in chosen], labels=[split.labels[i] for i in chosen])


def _each(split: Examples, word: Callable[[str], str], character: Callable[[str], str]) -> Examples:
    if split.tokens:
        return replace(split, texts=[tuple(word(own) for own in words) for words in split.texts])
    if detect_unit(split.texts[:200]) == "word":
        changed = [tuple(" ".join(word(own) for own in text.split()) for text in texts) for texts in split.texts]
    else:
        changed = [tuple("".join(character(own) for own in text) for text in texts) for texts in split.texts]
    return replace(split, texts=changed)


def _kept(count: int, share: float, rng: random.Random) -> list[int]:
    kept = [i for i in range(count) if rng.random() >= share]
    return kept or ([rng.randrange(count)] if count else [])


def _letters(split: Examples) -> list[str]:
    found = {letter for texts in split.texts[:500] for text in texts for letter in text if not letter.isspace()}
    return sorted(found) or ["x"]
