"""A classifier that is taken as it is says which of its outputs is which label: the data follow it."""

from __future__ import annotations

import json

import pytest

from sparseprune.runner import RunConfig
from sparseprune.runner.sources import open_source

transformers = pytest.importorskip("transformers")


def teacher(folder, *names, kind="BertForSequenceClassification"):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    told = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    getattr(transformers, kind)(transformers.BertConfig(vocab_size=6, **told, **size)).save_pretrained(folder)
    return str(folder)


def config(tmp_path, model, *lines, suffix="tsv", labels=None, **options):
    path = tmp_path / f"data.{suffix}"
    path.write_text("\n".join(lines) + "\n")
    return RunConfig(model=model, data=None, train=str(path), valid=str(path), test=str(path), labels=labels, **options)


def read(source):
    train = source.data.train
    return source.data.label_names, train.labels, source.loaders["test"].labels


def test_labels_are_numbered_as_the_teacher_numbers_them(tmp_path):
    model = teacher(tmp_path / "model", "positive", "negative")
    rows = ("a\tnegative", "a a\tpositive", "a a a\tnegative")
    source = open_source(config(tmp_path, model, *rows, teacher=model))
    assert read(source) == (["positive", "negative"], [1, 0, 1], [1, 0, 1])
    source.save_parts(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "positive", "1": "negative"}
    (tmp_path / "labels.txt").write_text("negative\npositive\n")  # what numbers in the data stand for
    numbers, named = ("a\t0", "a a\t1", "a a a\t0"), str(tmp_path / "labels.txt")
    assert read(open_source(config(tmp_path, model, *numbers, labels=named, teacher=model))) == read(source)
    assert read(open_source(config(tmp_path, model, *numbers, teacher=model)))[:2] == (["0", "1"], [0, 1, 0])
    assert read(open_source(config(tmp_path, model, *rows, dense_epochs=0))) == read(source)


def test_labels_of_words_and_a_class_that_the_data_lack(tmp_path):
    model = teacher(tmp_path / "model", "O", "I", "B", kind="BertForTokenClassification")
    found = open_source(config(tmp_path, model, "a O", "a B", "", "a B", suffix="conll", teacher=model))
    assert (found.data.label_names, found.data.train.labels) == (["O", "I", "B"], [[0, 2], [2]])


def test_labels_of_other_names_are_refused_where_nothing_is_trained(tmp_path):
    model = teacher(tmp_path / "model", "positive", "negative")
    for options, who in (({"teacher": model}, "teacher"), ({"dense_epochs": 0}, "model")):
        with pytest.raises(ValueError, match=rf"{who} .*trained on \(positive, negative\), got bad, good in the data"):
            open_source(config(tmp_path, model, "a\tgood", "a a\tbad", **options))
    assert read(open_source(config(tmp_path, model, "a\tgood", "a a\tbad")))[:2] == (["bad", "good"], [1, 0])
    unnamed = teacher(tmp_path / "unnamed", "LABEL_0", "LABEL_1")
    assert read(open_source(config(tmp_path, unnamed, "a\tgood", "a a\tbad", teacher=unnamed)))[1] == [1, 0]
