"""Tables of text and label: the same examples from CSV, Parquet, Arrow and folders of datasets as from a TSV file."""

from __future__ import annotations

import csv
import json

import pytest

from sparseprune.cli import main
from sparseprune.data import load_files, load_folder, tables
from sparseprune.runner import RunConfig, run_prune
from sparseprune.runner.language import read_text

ROWS = {
    "train": [('he said "yes", twice', "pos"), ("no\tway", "neg"), ("maybe so", "pos"), ("über", "neg")],
    "validation": [("yes, yes", "pos"), ("no", "neg")], "test": [("so", "pos"), ("way", "neg")],
}  # fmt: skip


def write_csv(path, rows, names=("text", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([names, *rows])


def examples(data):
    return {name: (split.texts, [data.label_names[i] for i in split.labels]) for name, split in data.splits.items()}


@pytest.fixture
def expected(tmp_path):
    for name, rows in ROWS.items():
        lines = [json.dumps({"text": text, "labels": label}) for text, label in rows]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return examples(load_files(*(tmp_path / f"{name}.jsonl" for name in ROWS)))


def test_csv(tmp_path, expected):
    folder = tmp_path / "csv"
    folder.mkdir()
    for name, rows in ROWS.items():
        write_csv(folder / f"{name}.csv", rows)
    data = load_folder(folder)
    assert examples(data) == expected and data.name == "csv"
    assert RunConfig(data=str(folder)).data == str(folder)
    assert read_text(folder / "test.csv") == "so\nway"


def test_parquet_and_arrow_and_their_names_of_labels(tmp_path, expected):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    info = {"info": {"features": {"label": {"names": ["pos", "neg"], "_type": "ClassLabel"}}}}
    folder = tmp_path / "files" / "data"
    folder.mkdir(parents=True)
    for name, rows in ROWS.items():
        table = pyarrow.table({"text": [t for t, _ in rows], "label": [["pos", "neg"].index(n) for _, n in rows]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
        if name == "test":
            place = str(folder / "test.arrow")
            with pyarrow.OSFile(place, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as w:
                w.write_table(table)
        elif name == "train":
            parquet.write_table(table, folder / "train-00000-of-00001.parquet")
        else:
            place = str(folder / "dev.arrow")
            with pyarrow.OSFile(place, "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as w:
                w.write_table(table)
    data = load_folder(tmp_path / "files")
    assert examples(data) == expected and data.label_names == ["pos", "neg"]
    (folder / "test.arrow").write_bytes(b"ARROW1 and no more")
    with pytest.raises(ValueError, match=r"test.arrow: expected arrow, got a file that cannot be read so"):
        load_folder(tmp_path / "files")


def test_folders_of_datasets(tmp_path, expected):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    made = {
        name: datasets.Dataset.from_dict({"text": [t for t, _ in rows], "label": [n for _, n in rows]}, features)
        for name, rows in ROWS.items()
    }
    datasets.DatasetDict(made).save_to_disk(str(tmp_path / "saved"))
    data = load_folder(tmp_path / "saved")
    assert examples(data) == expected and data.label_names == ["pos", "neg"]
    assert examples(load_files(*(tmp_path / "saved" / name for name in ROWS))) == expected
    with pytest.raises(ValueError, match="expected three splits, got one data set"):
        load_folder(tmp_path / "saved" / "train")
    unlabelled = made["test"].cast_column("label", datasets.Value("int64")).map(lambda row: {"label": -1})
    datasets.DatasetDict({**made, "test": unlabelled.cast(features)}).save_to_disk(str(tmp_path / "glue"))
    with pytest.raises(ValueError, match="row 1: label -1 expected from 0 to 1; a split without labels has -1"):
        load_folder(tmp_path / "glue")


def test_a_table_is_read_once(tmp_path, monkeypatch):
    read = []
    plain = tables.read_columns
    monkeypatch.setattr(tables, "read_columns", lambda path: read.append(path) or plain(path))
    for name, rows in ROWS.items():
        write_csv(tmp_path / f"{name}.csv", rows)
    assert load_folder(tmp_path).label_names == ["neg", "pos"]
    assert sorted(path.stem for path in read) == sorted(ROWS)


def test_a_row_without_a_text_or_a_label_is_named(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    place = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"text": ["so", "way"], "label": [1.0, 0.0]}), place)
    assert load_files(place, place, place).label_names == ["0", "1"]
    for label in (0.5, None, float("nan")):
        parquet.write_table(pyarrow.table({"text": ["so", "way"], "label": [1.0, label]}), place)
        with pytest.raises(ValueError, match=r"train.parquet: row 2: label expected a name or a whole number, got"):
            load_files(place, place, place)
    parquet.write_table(pyarrow.table({"text": ["so", None], "label": [0, 1]}), place)
    said = "train.parquet: row 2: expected a text under text, got NoneType; leave the row out"
    with pytest.raises(ValueError, match=said):
        read_text(place)
    with pytest.raises(ValueError, match=said):
        load_files(place, place, place)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the file is empty; expected the names of the columns"), ("text,label\n", "the table is empty"),
        ("a,pos\n", r"expected one text or pair .* and one column label or labels, got a, pos"),
        ("Text,Label\na,pos\n", "got Text, Label; rename those that are meant"),
        ("text;label\na;pos\n", "got text;label; put commas between them"),
        ("text,label\nhello\n", r"row 1 expected 2 fields \(text, label\), got 1"),
        ("text,sentence,label\na,b,1\n", "expected one text or pair"), ('text,label\n"open,1\n', "expected CSV, got"),
        ("text,label\nhello,\n", "row 1: label expected a name or a whole number, got ''"),
        ("text,label\n ,pos\n", "train.csv: row 1: the text is empty; remove the row"),
        ("text,text,label\na,b,pos\n", "expected one column text, got 2; rename the others"),
        ("text,label,label\na,pos,neg\n", "expected one column label, got 2"),
    ],
)  # fmt: skip
def test_wrong_tables_say_where(tmp_path, content, said):
    path = tmp_path / "train.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_files(path, path, path)
    assert "train.csv" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_label_that_only_another_table_has_is_named_by_its_row(tmp_path):
    train, valid = tmp_path / "train.csv", tmp_path / "valid.csv"
    train.write_text("text,label\na,pos\nb,neg\n")
    valid.write_text('text,label\n"two\nlines",pos\n\nb,other\n')
    with pytest.raises(ValueError, match=r"valid.csv: row 2: label 'other' is not among the 2 known labels"):
        load_files(train, valid, train)


def test_a_csv_file_may_hold_long_texts_and_other_columns_twice(tmp_path):
    path, before = tmp_path / "train.csv", csv.field_size_limit()
    long = "word " * 40_000
    path.write_text(f"note,text,note,label\n1,{long},2,pos\n3,short,4,neg\n")
    assert load_files(path, path, path).train.texts == [(long,), ("short",)]
    assert read_text(path) == f"{long}\nshort" and csv.field_size_limit() == before


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_of_a_table_that_stand_twice(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / f"train.{kind}"

    def save(*names):
        columns = [pyarrow.array(values) for values in (["a", "b"], ["pos", "neg"], ["c", "d"], ["e", "f"])]
        table = pyarrow.Table.from_arrays(columns, names=list(names))
        if kind == "parquet":
            parquet.write_table(table, path)
            return
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)

    save("text", "label", "note", "note")
    assert load_files(path, path, path).train.texts == [("a",), ("b",)]
    save("text", "label", "text", "note")
    with pytest.raises(ValueError, match="expected one column text, got 2; rename the others"):
        load_files(path, path, path)


def test_folders_without_the_three_splits(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="no such folder; expected one with train, validation and test"):
        load_folder(tmp_path / "none")
    write_csv(tmp_path / "train.csv", ROWS["train"])
    with pytest.raises(ValueError, match=r"expected train, validation and test, got train.csv; split the data"):
        load_folder(tmp_path)
    write_csv(tmp_path / "train-2.csv", ROWS["train"])
    with pytest.raises(ValueError, match=r"train expected in one file, got train-2.csv, train.csv; join them"):
        load_folder(tmp_path)
    assert main(["prune", "--model", "encoder", "--data", str(tmp_path / "none")]) == 2
    assert "expected one of clinc10, crosswoz_zh or a folder with train" in capsys.readouterr().err


def test_a_run_on_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEPRUNE_CACHE", "0")
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ROWS:
        write_csv(folder / f"{name}.csv", [(f"{w} {i % 7} times", w) for i in range(40) for w in ("yes", "no")])
    record = run_prune(
        "encoder", data=folder, out=tmp_path / "runs", epochs=1, dense_epochs=1, robustness=0, quiet=True,
        layout="dense",
    ).record  # fmt: skip
    assert record["data"] == "set" and record["pruned"]["test"]["accuracy"] > 0.9
    assert record["config"]["data"] == str(folder)
