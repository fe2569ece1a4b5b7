"""The cut of a set to few texts, and which runs are made."""

from types import SimpleNamespace

import pytest

from sparseprune.data import load_set


@pytest.fixture
def small_sets(benchmarks):
    from benchmarks import small_sets

    return small_sets


def rows(tsv):
    return [line.split("\t") for line in tsv.splitlines()]


def test_a_set_is_cut_to_some_classes_and_so_many_texts(small_sets):
    data = load_set("clinc10")
    found = {split: rows(tsv) for split, tsv in small_sets.cut(data, 4, 300, seed=2).items()}
    classes = {label for _, label in found["test"]}
    assert len(classes) == 4 and all({label for _, label in part} == classes for part in found.values())
    assert len(found["train"]) == 300 and len(found["valid"]) == 500
    named = [data.label_names[y] for y in data.test.labels]
    assert len(found["test"]) == sum(name in classes for name in named)  # all of them
    assert len({text for text, _ in found["train"]}) > 290
    of = {text[0]: data.label_names[y] for text, y in zip(data.train.texts, data.train.labels)}
    assert all(of[text] == label for text, label in found["train"])
    assert small_sets.cut(data, 4, 300, seed=2)["train"] == "".join(f"{t}\t{y}\n" for t, y in found["train"])
    assert small_sets.cut(data, 4, 300, seed=3)["train"] != small_sets.cut(data, 4, 300, seed=2)["train"]
    with pytest.raises(SystemExit, match="4 classes have 6000 training texts, 6001 are asked for"):
        small_sets.cut(data, 4, 6001, seed=2)


def test_what_is_done_is_not_repeated_and_kept_as_a_share(small_sets, tmp_path, monkeypatch, capsys):
    made = []

    def fake(model, train, valid, test, **settings):
        made.append((model, train.read_text().count("\n"), settings["method"], settings["seed"]))
        pruned = 0.9 if settings["seed"] else 0.8
        record = dict.fromkeys(("density", "data_hash", "mask_hash", "machine"))
        accuracy = {"dense": {"test": {"accuracy": 1.0}}, "pruned": {"test": {"accuracy": pruned}}}
        seconds = {"dense training": 30.0, "pruning": 90.0, "total": 121.0}
        return SimpleNamespace(record={**record, **accuracy, "seconds": seconds})

    monkeypatch.setattr(small_sets, "run_prune", fake)
    place = ["--model", "encoder", "--cache", str(tmp_path), "--out", str(tmp_path / "found.jsonl"), "--texts", "70"]
    small_sets.main([*place, "--seeds", "0", "--methods", "scores", "magnitude"])
    small_sets.main([*place, "--seeds", "0", "1"])
    assert made == [("encoder", 70, "scores", 0), ("encoder", 70, "magnitude", 0), ("encoder", 70, "scores", 1)]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split()[:5] == ["clinc10", "6", "70", "scores", "2"] and "85.0 % (80.0 to 90.0)" in last
    assert last.split()[-1] == "2"
