"""What is wrong with a data set is found, counted and, where asked for, stops a run before it begins."""

from __future__ import annotations

import json

import pytest

from sparseprune.cli import main
from sparseprune.data import check_data, load_files, load_set


@pytest.fixture
def files(tmp_path):
    rows = {
        "train": ["play a song\tmusic", "Play  a song\tmusic", "will it rain\tweather", "will it rain\tmusic",
                  "so sunny\tweather"],
        "valid": ["so sunny\tweather", "a tune\tmusic"],
        "test": ["a tune\tmusic", "a storm comes from the far north\tweather"],
    }  # fmt: skip
    for split, lines in rows.items():
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {split: tmp_path / f"{split}.tsv" for split in rows}


def test_every_problem_is_found_where_it_is(files):
    data = load_files(*files.values(), label_names=["weather", "music", "sport"])
    data.test.texts[1] = ("  ",)
    found = {(f.kind, f.split): f for f in check_data(data).findings}
    assert {key: f.count for key, f in found.items()} == {
        ("duplicates", "train"): 1, ("conflicts", "train"): 2, ("leakage", "valid"): 1, ("leakage", "test"): 1,
        ("empty", "test"): 1, ("missing", "train"): 1,
    }  # fmt: skip
    assert found["leakage", "valid"].examples == ("so sunny",)
    assert "also in train" in str(found["leakage", "valid"]) and "also in valid" in str(found["leakage", "test"])
    assert found["missing", "train"].examples == ("sport",)


def test_long_texts_are_counted_by_the_tokens_that_are_read(files):
    data = load_files(*files.values())
    found = [
        f for f in check_data(data, 4, lambda texts: sum(len(t.split()) for t in texts)).findings if f.kind == "long"
    ]
    assert [(f.split, f.count) for f in found] == [("test", 1)]


def test_a_clean_set_has_nothing_to_report():
    data = load_set("crosswoz_zh").head(3, 1)
    data.valid.texts[0], data.test.texts[0] = ("甲",), ("乙",)
    report = check_data(data)
    assert [f.kind for f in report.findings] in ([], ["missing"])
    kept = [f for f in report.findings if f.kind != "missing"]
    assert not kept


def test_a_run_reports_it_or_stops_before_anything_is_written(files, tmp_path, capsys):
    given = [f"--{split}={path}" for split, path in files.items()]
    command = ["prune", "--model", "encoder", *given, "--out", str(tmp_path / "runs"), "--dense-epochs", "1"]
    assert main([*command, "--data-check", "stop"]) == 2
    said = capsys.readouterr().err
    assert "2 of 5 with a text that has other labels elsewhere" in said and "also in train" in said
    assert not (tmp_path / "runs").exists()
    assert main([*command, "--epochs", "1", "--name", "r"]) == 0
    assert "1 of 5 copies of another (Play a song)" in capsys.readouterr().out
    record = json.loads((tmp_path / "runs" / "r" / "run.json").read_text())
    assert {f["kind"] for f in record["data_quality"]} == {"duplicates", "conflicts", "leakage"}
