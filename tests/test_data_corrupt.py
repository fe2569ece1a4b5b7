"""Typos and missing words: as many as asked for, the same for one seed, and labels that stay with their words."""

from __future__ import annotations

import pytest

from sparseprune.data import Examples, load_set
from sparseprune.data.corrupt import drop_words, longest, typos


@pytest.fixture(scope="module")
def english():
    return load_set("clinc10").head(other=300).test


def words(split):
    return [word for (text,) in split.texts for word in text.split()]


def test_typos_change_the_share_of_long_words_that_was_asked_for(english):
    changed = typos(english, 0.3)
    pairs = [(a, b) for (t,), (u,) in zip(english.texts, changed.texts) for a, b in zip(t.split(), u.split())]
    long = [a != b for a, b in pairs if len(a) >= 3]
    assert 0.2 < sum(long) / len(long) <= 0.33  # a slip may change nothing: two equal neighbours, the same letter
    assert all(a == b for a, b in pairs if len(a) < 3) and changed.labels == english.labels
    assert typos(english, 0.3).texts == changed.texts != typos(english, 0.3, seed=1).texts
    assert typos(english, 0.0).texts == [(" ".join(t.split()),) for (t,) in english.texts]


def test_words_go_missing_and_one_stays(english):
    fewer = drop_words(english, 0.3)
    assert len(words(fewer)) == pytest.approx(0.7 * len(words(english)), rel=0.06)
    assert all(text for (text,) in drop_words(english, 1.0).texts)
    assert all(len(text.split()) == 1 for (text,) in drop_words(english, 1.0).texts)


def test_texts_without_spaces_lose_and_change_characters():
    chinese = load_set("crosswoz_zh").head(other=50).test
    fewer, other = drop_words(chinese, 0.5), typos(chinese, 0.5)
    size = sum(len(t) for (t,) in chinese.texts)
    assert sum(len(t) for (t,) in fewer.texts) == pytest.approx(0.5 * size, rel=0.15)
    assert [len(t) for (t,) in other.texts] == [len(t) for (t,) in chinese.texts]
    same = sum(a == b for (t,), (u,) in zip(chinese.texts, other.texts) for a, b in zip(t, u))
    assert 0.4 * size < same < 0.65 * size


def test_labels_of_words_stay_with_them():
    split = Examples([("ann", "lives", "in", "rome")] * 40, [[1, 0, 0, 2]] * 40, "x", tokens=True)
    label = dict(zip(split.texts[0], split.labels[0]))
    fewer = drop_words(split, 0.5)
    assert any(len(t) < 4 for t in fewer.texts)
    assert all([label[word] for word in texts] == labels for texts, labels in zip(fewer.texts, fewer.labels))
    assert [len(t) for t in typos(split, 1.0).texts] == [4] * 40


def test_the_longest_share_keeps_its_order():
    split = Examples([("aa",), ("aaaa",), ("a",), ("aaa",)], [0, 1, 2, 3], "x")
    assert longest(split, 0.5).labels == [1, 3] and longest(split, 0.01).labels == [1]
