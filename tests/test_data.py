"""Loading, vocabulary, augmentation and batching of texts."""

from __future__ import annotations

import json

import pytest
import torch

from sparseprune.data import (
    Augment,
    RowLoader,
    TokenLoader,
    Vocabulary,
    detect_unit,
    hashed_rows,
    load_files,
    load_set,
    read_examples,
    read_names,
)


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "sizes", "labels", "unit"),
    [("clinc10", (15000, 3000, 4500), 10, "word"), ("crosswoz_zh", (3193, 500, 3539), 6, "character")],
)
def test_built_in_sets(name, sizes, labels, unit):
    data = load_set(name)
    assert tuple(len(split) for split in data.splits.values()) == sizes
    assert len(data.label_names) == labels
    assert all(0 <= label < labels for split in data.splits.values() for label in split.labels)
    assert detect_unit(data.train.texts[:200]) == unit


def test_digest_sees_one_changed_label():
    data = load_set("crosswoz_zh").head(20, 10)
    before = data.digest()
    assert before == load_set("crosswoz_zh").head(20, 10).digest()
    data.test.labels[3] = (data.test.labels[3] + 1) % 6
    assert data.digest() != before


def test_head_spreads_over_the_split():
    data = load_set("clinc10").head(50, 20)
    assert (len(data.train), len(data.valid), len(data.test)) == (50, 20, 20)
    assert len(set(data.train.labels)) == 10


def test_names_indices_and_pairs(tmp_path):
    train = write(tmp_path / "a.tsv", "good film\tpos", "bad film\tneg", "", "fine\tpos")
    other = write(
        tmp_path / "b.jsonl", json.dumps({"text": "so so", "label": "neg"}), json.dumps({"text": "ok", "label": 1})
    )
    with pytest.raises(ValueError, match=r"b.jsonl:2: label '1' is not among the 2 known labels"):
        load_files(train, other, train)  # which of the two a number stands for is not said
    data = load_files(train, other, train, label_names=["neg", "pos"])
    assert data.label_names == ["neg", "pos"]
    assert data.train.labels == [1, 0, 1]
    assert data.valid.labels == [0, 1]
    numbered = write(tmp_path / "n.tsv", "a\t0", "b\t2")
    assert load_files(numbered, numbered, numbered).label_names == ["0", "2"]
    pairs = write(tmp_path / "p.jsonl", json.dumps({"premise": "a b", "hypothesis": "c", "label": "yes"}))
    assert load_files(pairs, pairs, pairs).train.texts == [("a b", "c")]
    assert read_examples(numbered, ["x", "y", "z"]).labels == [0, 2]


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        (None, "", FileNotFoundError, "no such file"),
        ("e.tsv", "\n\n", ValueError, "empty"),
        ("w.tsv", "a\tpos\nb\tnever seen\n", ValueError, "w.tsv:2: label 'never seen' is not among the 2 known labels"),
        ("f.tsv", "only text\n", ValueError, "f.tsv:1: expected text<TAB>label"),
        ("l.tsv", "text\t \n", ValueError, "l.tsv:1: the label is empty"),
        ("j.jsonl", "{not json\n", ValueError, "j.jsonl:1: not valid JSON"),
        ("k.jsonl", '{"text": "a"}\n', ValueError, "k.jsonl:1: expected keys"),
        ("b.jsonl", '{"text": "a", "label": true}\n', ValueError, "label expected a name or a whole number, got true"),
        ("f.jsonl", '{"text": "a", "label": 2.0}\n', ValueError, "f.jsonl:1: label '2' is not among the 2 known"),
        ("z.jsonl", '{"text": "a", "label": null}\n', ValueError, "label expected a name or a whole number, got null"),
        ("y.jsonl", '{"text": null, "label": 1}\n', ValueError, "y.jsonl:1: expected a string under text, got null"),
        ("o.tsv", "a\tb\tpos\n", ValueError, "o.tsv:1: expected 1 text"),
        ("m.tsv", "a\tpos\nb\tc\tneg\n", ValueError, "m.tsv:2: expected 1 text(s) as in line 1, got 2"),
        ("t.tsv", "a\tpos\n \tneg\n", ValueError, "t.tsv:2: the text is empty"),
        ("q.tsv", '"a\tb"\tc\tpos\n', ValueError, "q.tsv:1: expected text<TAB>label or text<TAB>text<TAB>label, got 4"),
        ("q.tsv", '"a\n', ValueError, "TSV has no quoting"),
        ("z.tsv", "a\0b\tpos\n", ValueError, "z.tsv:1: expected UTF-8 text, got a NUL byte"),
        ("u.tsv", "a\tpos\n\ufeffb\tneg\n", ValueError, "u.tsv:2: a byte order mark in the middle"),
        ("c.csv", "a,pos\n", ValueError, "c.csv: expected one text"),
        ("r.tsv", "a\tpos\rb\tneg\r", ValueError, "r.tsv: expected lines that end in"),
        ("s.jsonl", '{"text": "a", "label": "pos"}\n{"text": "\\ud800", "label": "pos"}\n', ValueError,
         "s.jsonl:2: half of a surrogate pair"),
        ("s.jsonl", '{"text": "a", "label": "\\udfff"}\n', ValueError, "s.jsonl:1: half of a surrogate pair"),
        ("n.jsonl", '{"text": "a\\u0000", "label": "pos"}\n', ValueError, "n.jsonl:1: expected UTF-8 text, got a NUL"),
        ("d.jsonl", "[" * 100_000, ValueError, "d.jsonl:1: JSON that cannot be read"),
        ("d.jsonl", '{"text": "a", "label": ' + "1" * 5000 + "}", ValueError, "d.jsonl:1: JSON that cannot be read"),
        ("k.jsonl", '{"text": "a", "premise": "b", "hypothesis": "c", "label": "pos"}\n', ValueError,
         "k.jsonl:1: expected one text or pair, got text and premise+hypothesis"),
        ("k.jsonl", '{"text": "a", "label": "pos", "labels": "neg"}\n', ValueError,
         "k.jsonl:1: expected one key label or labels, got both"),
        ("h.tsv", "sentence\tlabel\nb\tneg\n", ValueError, "h.tsv:1: expected an example, got what looks like"),
        ("i.tsv", "a\t99999999\n", ValueError, "i.tsv:1: label '99999999' is not among"),
    ],
)
def test_bad_files_give_one_clear_line(tmp_path, name, text, error, said):
    train = write(tmp_path / "train.tsv", "x\tpos", "y\tneg")
    path = tmp_path / (name or "absent.tsv")
    if name:
        path.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(error) as caught:
        load_files(train, path, train)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le", "gb18030"])
def test_other_encodings_are_refused(tmp_path, encoding):
    path = tmp_path / "other.tsv"
    path.write_bytes("plain\t1\ncaf\u00e9\t1\n".encode(encoding))
    with pytest.raises(ValueError, match=r"other.tsv:[12]: expected UTF-8"):
        load_files(path, path, path)


def test_a_mark_at_the_start_and_dos_line_ends_are_no_part_of_the_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes("\ufeffa b\t1\r\nc\t2\r\n".encode())
    data = load_files(path, path, path)
    assert data.train.texts == [("a b",), ("c",)] and data.label_names == ["1", "2"]


def test_quotes_in_a_tsv_belong_to_the_text(tmp_path):
    path = write(tmp_path / "a.tsv", '"a ""b"" c"\tx', 'd"\ty')
    assert load_files(path, path, path).train.texts == [('"a ""b"" c"',), ('d"',)]


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["2021", "2020"], ["2020", "2021"], [1, 0]),
        (["10", "9", "12345678"], ["9", "10", "12345678"], [1, 0, 2]),
        (["1" * 6000, "2"], ["2", "1" * 6000], [1, 0]),
        (["-1", "1"], ["-1", "1"], [0, 1]),
    ],
)
def test_distinct_labels_are_the_classes(tmp_path, labels, names, indices):
    path = write(tmp_path / "a.tsv", *(f"text {i}\t{label}" for i, label in enumerate(labels)))
    data = load_files(path, path, path)
    assert data.label_names == names and data.train.labels == indices


def test_label_names_from_a_file_are_counted_from_zero(tmp_path):
    path = write(tmp_path / "a.tsv", "a\t2", "b\tx", "c\t0")
    names = read_names(write(tmp_path / "labels.txt", "x", "y", "z", ""))
    assert load_files(path, path, path, label_names=names).train.labels == [2, 0, 0]
    for lines, said in ((["x", "", "y"], "labels.txt:2: expected a label name"), (["x", "x"], "line 1 already")):
        with pytest.raises(ValueError, match=said):
            read_names(write(tmp_path / "labels.txt", *lines))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["x", "y", "x"], "each name once, got 'x' at places 0 and 2"),
        ("xy", "a list of names"),
        ([1, 0], "got 1 at place 0"),
        (["x", ""], "got '' at place 1"),
        ([], "got none"),
    ],
)
def test_label_names_are_distinct_texts(tmp_path, names, said):
    path = write(tmp_path / "a.tsv", "one\t1", "two\t0")
    for read in (lambda: load_files(path, path, path, label_names=names), lambda: read_examples(path, names)):
        with pytest.raises(ValueError, match=said):
            read()


def test_a_file_of_label_names_holds_nothing_else(tmp_path):
    for line, said in (("# our labels", "looks like a comment"), ("0\tno", "fields with a tab")):
        path = write(tmp_path / "labels.txt", line, "yes")
        with pytest.raises(ValueError, match=rf"labels.txt:1: expected a label name alone, got .*{said}"):
            read_names(path)
    assert read_names(write(tmp_path / "labels.txt", "#happy", "#", "not sure")) == ["#happy", "#", "not sure"]


def test_names_that_are_numbers_are_all_names_or_all_places(tmp_path):
    stars = ["1", "2", "3", "4", "5"]

    def read(*labels):
        path = write(tmp_path / "a.tsv", *(f"text {label}\t{label}" for label in labels))
        found = load_files(path, path, path, label_names=stars).train.labels
        assert read_examples(path, stars).labels == found
        return found

    assert read(0, 1, 2, 3, 4) == [0, 1, 2, 3, 4]
    assert read(1, 2, 3, 4, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match=r"got 1, 2, 3, which can be both.*'class 1'"):
        read(1, 2, 3)
    with pytest.raises(ValueError, match="label '0' is not among the 5 known labels"):
        read(5, 0)
    all_five = write(tmp_path / "b.tsv", *(f"text {label}\t{label}" for label in stars))
    few = write(tmp_path / "c.tsv", "x\t2")  # all files together say what it is
    assert load_files(all_five, few, few, label_names=stars).test.labels == [1]
    zero = write(tmp_path / "d.tsv", "x\t0")
    assert load_files(few, few, zero, label_names=stars).train.labels == [2]
    assert load_files(few, few, few, label_names=["0", "1", "2"]).train.labels == [2]  # both say the same


def test_a_header_in_all_files_is_refused_whatever_it_says(tmp_path):
    train = write(tmp_path / "train.tsv", "was gesagt wurde\tAbsicht", "a\tx", "b\ty")
    other = write(tmp_path / "valid.tsv", "was gesagt wurde\tAbsicht", "c\tx")
    with pytest.raises(ValueError, match=r"train.tsv:1: .*names of the columns .*Absicht.*remove that line"):
        load_files(train, other, other)
    write(other, "was gesagt wurde\tAbsicht", "a\tx", "c\tx")  # an example of the training file too
    write(train, "was gesagt wurde\tAbsicht", "a\tx", "b\ty", "d\tx", "e\ty")
    with pytest.raises(ValueError, match=r"train.tsv:1: .*where it is an example, move it further down"):
        load_files(train, other, other)
    fair = write(tmp_path / "fair.tsv", "text\tlabel", "a\tlabel", "b\ty")  # a class that happens to be called so
    assert load_files(fair, fair, fair).label_names == ["label", "y"]


def test_a_first_example_that_two_files_share_is_no_header(tmp_path):
    """One example a file, or one a label in files that share others too: the first line is like the rest of them."""
    one, same = (write(tmp_path / f"{name}.tsv", "good\tup") for name in ("one", "same"))
    assert load_files(one, same, same).train.labels == [0]
    lines = ["good\tup", "bad\tdown", "so so\teven"]
    train, valid, test = (write(tmp_path / f"{name}.tsv", *lines) for name in ("train", "valid", "test"))
    found = load_files(train, valid, test)
    assert found.label_names == ["down", "even", "up"] and len(found.test) == 3
    assert len(load_files(train, one, same).train) == 3
    for path in (one, same):  # the names in use for columns are a header all the same
        write(path, "text\tlabel")
    with pytest.raises(ValueError, match=r"one.tsv:1: .*names of the columns"):
        load_files(train, one, same)


def test_words_by_tabs_or_spaces_with_as_many_columns_in_a_sentence(tmp_path):
    path = write(tmp_path / "a.conll", "New York\tNNP\tB", "is\tVB\tO", "", "-DOCSTART- -X- O", "", "big\tJJ\tO")
    data = load_files(path, path, path)
    assert data.train.texts == [("New York", "is"), ("big",)] and data.label_names == ["B", "O"]
    write(path, "a NN O", "b O")
    with pytest.raises(ValueError, match=r"a.conll:2: expected 3 columns as in the sentence so far, got 2"):
        load_files(path, path, path)
    write(tmp_path / "b.conll", "a O", "", "b NEW")
    write(path, "a O", "", "b B")
    with pytest.raises(ValueError, match=r"b.conll:3: label 'NEW' of 'b' is not among"):
        load_files(path, path, tmp_path / "b.conll")


def test_spaces_that_are_no_ascii_belong_to_words(tmp_path):
    from sparseprune.data.rows import read_sentences

    lines = ("10\u00a0000 O", "San\u3000Marino  B", "   ", "caf\u00e9\u2009! O")
    found = read_sentences(write(tmp_path / "a.conll", *lines))
    assert [row.texts for row in found] == [("10\u00a0000", "San\u3000Marino"), ("caf\u00e9\u2009!",)]
    assert [row.labels for row in found] == [("O", "B"), ("O",)]
    with pytest.raises(ValueError, match=r"b.conll:1: the word is empty"):
        read_sentences(write(tmp_path / "b.conll", "\u00a0 O"))


def test_old_line_ends_before_a_last_new_one_are_no_columns(tmp_path):
    from sparseprune.data.rows import read_sentences

    path = tmp_path / "a.conll"
    path.write_bytes(b"Rome B\ris O\rbig O\n")
    with pytest.raises(ValueError, match=r"a.conll:1: expected lines that end in .* got .r alone in one; convert"):
        read_sentences(path)


def test_comments_of_conll_files_are_no_words(tmp_path):
    from sparseprune.data.rows import read_sentences

    many = ("# id 5 domain=en", "Rome _ _ B", "is _ _ O", "", "# newdoc", "# text = big B", "big _ _ O", "", "# e = 1")
    assert [row.texts for row in read_sentences(write(tmp_path / "a.conll", *many))] == [("Rome", "is"), ("big",)]
    words = ("# O", "1 O", "", "we O", "# O", "", "# B", "", "#\tX", "tag\tB")  # the word itself
    found = read_sentences(write(tmp_path / "b.conll", *words))
    assert [row.texts for row in found] == [("#", "1"), ("we", "#"), ("#",), ("#", "tag")]
    with pytest.raises(ValueError, match=r"c.conll:3: .*could be either.*'newdoc'.*put a tab"):
        read_sentences(write(tmp_path / "c.conll", "a O", "", "# newdoc", "b O"))



def test_large_seeds_and_empty_cuts():
    made = TokenLoader([[4, 5]] * 9, [0] * 9, 2, shuffle=True, seed=2**32 - 1, augment=Augment(mask=0.5))
    assert len(list(made)) == 5
    rows = RowLoader(torch.arange(9.0)[:, None], torch.arange(9), 2, shuffle=True, seed=2**63 - 1)
    assert sorted(int(label) for _, labels in rows for label in labels) == list(range(9))
    with pytest.raises(ValueError, match="at least one example"):
        load_set("crosswoz_zh").head(0, 5)


def test_vocabulary_words_characters_and_round_trip():
    words = Vocabulary.build([("the cat, the dog",), ("The end",)], min_count=1)
    assert words.unit == "word" and words.tokens[4] == "the"
    assert words.encode("the unicorn") == [4, Vocabulary.UNKNOWN]
    assert words.encode(("the", "the")) == [4, Vocabulary.SEPARATOR, 4]
    assert words.encode("") == [Vocabulary.UNKNOWN]
    assert len(words.encode("the " * 50, max_length=8)) == 8
    chinese = Vocabulary.build([("\u9152\u5e97 \u9152",)], min_count=1)
    assert chinese.unit == "character" and chinese.encode("\u5e97\u9152") == [5, 4]
    again = Vocabulary.from_json(words.to_json())
    assert again.tokens == words.tokens and again.unit == words.unit
    assert len(Vocabulary.build([("a a b b c",)], min_count=2, max_size=5)) == 5


def test_texts_alone_are_what_tuples_of_one_are():
    texts = ["play some music", "play the song", "\u64ad\u653e"]
    tuples = [(text,) for text in texts]
    assert Vocabulary.build(texts, min_count=1).tokens == Vocabulary.build(tuples, min_count=1).tokens
    assert "play" in Vocabulary.build(texts).tokens and detect_unit(texts[2:]) == "character"
    assert torch.equal(hashed_rows(texts, 64), hashed_rows(tuples, 64))
    for read in (Vocabulary.build, detect_unit, hashed_rows):
        with pytest.raises(ValueError, match="expected a list of them, got one text"):
            read("play some music")
    with pytest.raises(ValueError, match="width expected at least 1, got 0"):
        hashed_rows(texts, 0)
    with pytest.raises(ValueError, match="max_length expected at least 1, got -1"):
        Vocabulary.build(texts).encode(texts[0], -1)


def loader(**options):
    sequences = [[4 + (i % 7)] * (1 + i % 9) for i in range(103)]
    return TokenLoader(sequences, list(range(103)), batch_size=8, **options)


def test_every_example_once_an_epoch_with_padding_masks():
    made = loader(shuffle=True, seed=3)
    batches = list(made)
    assert len(batches) == len(made) == 13
    assert sorted(torch.cat([b["labels"] for b in batches]).tolist()) == list(range(103))
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.shape == mask.shape and mask.sum(1).max() == ids.shape[1]
        assert torch.equal(ids != 0, mask == 1)
    assert sum(b["input_ids"].numel() for b in batches) < 103 * 9 * 0.75  # similar lengths share a batch


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
    augment = Augment(drop=0.2, swap=0.2, mask=0.2)

    def read(seed, epoch):
        made = loader(shuffle=True, seed=seed, augment=augment)
        made.set_epoch(epoch)
        return [b["input_ids"].tolist() for b in made]

    assert read(1, 2) == read(1, 2)
    assert read(1, 2) != read(1, 3)
    assert read(1, 2) != read(2, 2)
    made = loader(shuffle=True, seed=1, augment=augment)
    list(made)
    list(made)
    assert [b["input_ids"].tolist() for b in made] == read(1, 2)


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_shares_of_all_processes_are_the_batches_of_one(shuffle):
    sequences = [[4 + (i % 7)] * (1 + i % 9) for i in range(103)]
    whole = TokenLoader(sequences, list(range(103)), 24, shuffle, seed=3)
    shares = [TokenLoader(sequences, list(range(103)), 8, shuffle, seed=3, rank=r, world=3) for r in range(3)]
    assert [len(share) for share in shares] == [len(whole)] * 3 == [5] * 3
    for epoch in (0, 4):
        parts = [share.batches(epoch) for share in shares]
        for joint, *three in zip(whole.batches(epoch), *parts, strict=True):
            assert {len(part) for part in three} == {-(-len(joint) // 3)}
            assert sorted({i for part in three for i in part}) == sorted(joint)
            repeated = sum(map(len, three)) - len(joint)
            assert repeated == (0 if len(joint) == 24 else 2)  # 7 are left for the last batch, 3 for each process
    augment = Augment(mask=0.5)
    alike = [[4, 5, 6, 7, 8, 9] for _ in range(48)]
    first, second = (TokenLoader(alike, [0] * 48, 8, augment=augment, rank=r, world=2) for r in range(2))
    assert not torch.equal(next(iter(first))["input_ids"], next(iter(second))["input_ids"])
    with pytest.raises(ValueError, match="expected 0 <= rank < world, got rank 3, world 3"):
        TokenLoader([[1]], [0], rank=3, world=3)


def test_augmentation_keeps_protected_tokens_and_something():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        out = Augment(drop=0.9, swap=0.5, mask=0.5)([1, 7, 8, 2, 9, 2], mask_id=3, generator=generator, protect={1, 2})
        assert [t for t in out if t in (1, 2)] == [1, 2, 2] and any(t not in (1, 2) for t in out)
    assert Augment()([5, 6], 3, generator) == [5, 6]
    with pytest.raises(ValueError, match="drop"):
        Augment(drop=1.0)


def test_loader_refuses_what_it_cannot_batch():
    with pytest.raises(ValueError, match="one label a sequence"):
        TokenLoader([[1]], [0, 1])
    with pytest.raises(ValueError, match="at least one example"):
        TokenLoader([], [])
    with pytest.raises(ValueError, match="empty"):
        TokenLoader([[]], [0])
    with pytest.raises(ValueError, match="token types"):
        TokenLoader([[1]], [0], augment=Augment(drop=0.1), types=[[0]])
    for types in ([[0, 1]], [[0, 1], [0, 1]], [[0], [0]]):  # one too few, one too long, one too short
        with pytest.raises(ValueError, match="expected token types as long as their sequences"):
            TokenLoader([[1, 2], [3]], [0, 1], types=types)
    for bad, kind in (([[1, 2.0]], "float"), ([[[1], [2]]], "list"), ([torch.tensor([1, 2])], "Tensor")):
        with pytest.raises(ValueError, match=f"flat list of whole numbers, got {kind} in one"):
            TokenLoader(bad, [0])
