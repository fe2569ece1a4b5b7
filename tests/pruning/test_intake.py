"""Every form of data that users have gives the batches that one would write by hand; what cannot be says what to do."""

from __future__ import annotations

import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import sparseprune as sp
from sparseprune.language import perplexity
from sparseprune.pruning import intake
from sparseprune.pruning.batches import as_tensors, split_batch
from sparseprune.pruning.intake import calibration_data, check_same_rows, text_ids, training_data
from sparseprune.pruning.processes import Processes
from sparseprune.pruning.reading import collect_inputs
from sparseprune.training import evaluate, predictions

transformers = pytest.importorskip("transformers")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "bird", "sees", "old", "house"]
TEXTS = ["the cat sees", "a dog", "the old house sees a bird", "bird", "a cat", "the dog sees the cat"]
LABELS = [0, 1, 2, 2, 0, 1]
CPU = torch.device("cpu")


class Names:
    """Looks like a datasets.Dataset."""

    def __init__(self, **columns):
        self.columns_, self.column_names = columns, list(columns)

    def __len__(self):
        return len(next(iter(self.columns_.values())))

    def __getitem__(self, key):
        return self.columns_[key] if isinstance(key, str) else {n: c[key] for n, c in self.columns_.items()}


class Frame:
    """Looks like a DataFrame."""

    def __init__(self, **columns):
        self.columns_, self.columns = columns, list(columns)

    def __getitem__(self, key):
        return self.columns_[key]

    def __len__(self):
        return len(next(iter(self.columns_.values())))

    def to_dict(self):
        return self.columns_


class Examples(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("words") / "vocab.txt"
    place.write_text("\n".join(WORDS), encoding="utf-8")
    return transformers.BertTokenizer(str(place))


def bert(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3,
             "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip
    return transformers.BertForSequenceClassification(transformers.BertConfig(**{**sizes, **changes})).eval()


def by_hand(tokenizer, texts=TEXTS, labels=LABELS):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return {**batch, "labels": torch.tensor(labels)}


def same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and torch.equal(batch[name], value), name


def tokenised(tokenizer, **more):
    found = tokenizer(TEXTS)
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"],
            "token_type_ids": found["token_type_ids"], "idx": [7] * 6, **more}  # fmt: skip


def forms(tokenizer):
    """name -> the same six labelled texts; whether a tokenizer is needed."""
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)]
    ready = tokenised(tokenizer, label=LABELS)
    ragged = [dict(zip(ready, values)) for values in zip(*ready.values())]
    return {
        "data set of text": (Names(text=TEXTS, label=LABELS), True),
        "labels by the other name": (Names(sentence=TEXTS, labels=LABELS), True),
        "data set of ids": (Names(**ready), False),
        "data set of tensors": (Names(**{n: [torch.tensor(v) for v in c] for n, c in ready.items()}), False),
        "data frame": (Frame(text=TEXTS, label=LABELS), True),
        "dict of columns": ({"text": TEXTS, "label": LABELS}, True),
        "dict of ids": (ready, False),
        "rows": (rows, True),
        "rows of ids": (ragged, False),
        "texts and labels": ((TEXTS, LABELS), True),
        "texts and a tensor": ((TEXTS, torch.tensor(LABELS)), True),
        "texts, each with its label": (list(zip(TEXTS, LABELS)), True),
        "map-style data set": (Examples(rows), True),
        "names of labels": ((TEXTS, [f"LABEL_{n}" for n in LABELS]), True),
        "loader of text": (DataLoader(rows, batch_size=6), True),
        "loader of pairs": (DataLoader(list(zip(TEXTS, LABELS)), batch_size=6), True),
        "batches": ([by_hand(tokenizer)], False),
    }


FORMS = list(forms(lambda texts, **_: {k: [[1]] * 6 for k in ("input_ids", "attention_mask", "token_type_ids")}))


@pytest.mark.parametrize("name", FORMS)
def test_labelled_data_in_every_form(tokenizer, name):
    data, needs = forms(tokenizer)[name]
    loader = training_data(data, bert(), tokenizer if needs else None, "fit")
    (batch,) = list(loader)
    same(dict(batch), by_hand(tokenizer))
    assert len(loader) == 1
    model = bert()
    found = evaluate(model, data, tokenizer=tokenizer if needs else None)
    assert found == pytest.approx(evaluate(model, [by_hand(tokenizer)]), rel=1e-5)
    logits, targets = predictions(model, data, tokenizer=tokenizer if needs else None)
    assert targets.tolist() == LABELS and logits.shape == (6, 3)


@pytest.mark.parametrize("name", FORMS)
def test_data_to_measure_in_every_form(tokenizer, name):
    data, needs = forms(tokenizer)[name]
    given = tokenizer if needs else None
    one, other = bert(), bert()
    options = {"criterion": "wanda", "criterion_options": {"min_tokens": 1}}
    sp.prune_(one, 0.5, data=data, tokenizer=given, **options)
    sp.prune_(other, 0.5, data=[by_hand(tokenizer)], **options)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters()))
    read = collect_inputs(one, ["classifier"], forms(tokenizer)[name][0], tokenizer=given)
    torch.testing.assert_close(read, collect_inputs(other, ["classifier"], [by_hand(tokenizer)]))


def test_texts_without_labels(tokenizer):
    expected = {k: v for k, v in by_hand(tokenizer).items() if k != "labels"}
    for data in (TEXTS, tuple(TEXTS), Names(text=TEXTS), (text for text in TEXTS), DataLoader(TEXTS, batch_size=6)):
        (batch,) = calibration_data(data, bert(), tokenizer)
        same(batch, expected)
    first, second = calibration_data(TEXTS * 2, bert(), tokenizer)
    assert len(first["input_ids"]) == 8 and len(second["input_ids"]) == 4
    pairs = [("the cat", "a dog"), ("bird", "the old house")]
    (batch,) = training_data((pairs, [0, 1]), bert(), tokenizer)
    want = tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    same(batch, {**want, "labels": torch.tensor([0, 1])})
    assert int(batch["token_type_ids"].sum()) == 7


def test_what_a_model_cannot_take_is_cut_and_what_it_does_not_read_is_left_out(tokenizer):
    (batch,) = calibration_data(["cat " * 40], bert(), tokenizer)
    assert batch["input_ids"].shape == (1, 16)

    class Plain(nn.Module):
        def forward(self, input_ids):
            return input_ids

    (batch,) = calibration_data(TEXTS, Plain(), tokenizer)
    assert list(batch) == ["input_ids"]


def test_a_tokenizer_without_a_pad_token():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert made.pad_token_id is None
    (batch,) = training_data((TEXTS, LABELS), bert(pad_token_id=4), made)
    assert batch["input_ids"][1].tolist() == [6, 8, 4, 4, 4, 4]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"PreTrainedTokenizerFast\(tokenizer_object"):
        training_data((TEXTS, LABELS), bert(), words)


def test_labels_of_tokens_and_of_several_classes(tokenizer):
    ids = [[5, 6, 7], [8]]
    (batch,) = training_data({"input_ids": ids, "labels": [[0, -100, 2], [1]]}, bert())
    assert batch["labels"].tolist() == [[0, -100, 2], [1, -100, -100]]
    (batch,) = training_data({"input_ids": ids, "labels": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]}, bert())
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (2, 3)
    (batch,) = training_data({"input_ids": ids, "labels": [0.5, -1.5]}, bert(num_labels=1))
    assert batch["labels"].tolist() == [0.5, -1.5]


def test_labels_of_tokens_are_as_many_as_they():
    model = transformers.BertForTokenClassification(bert().config).eval()
    for labels in ([[1, 0, 1], [1, 0]], [[1, 0, 1], 0]):
        with pytest.raises(ValueError, match=r"labels of row 1 expected one a token, 3, got (2|int); those of"):
            evaluate(model, {"input_ids": [[1, 2, 3], [4, 5, 6]], "labels": labels})
    assert evaluate(model, {"input_ids": [[1, 2, 3], [4, 5]], "labels": [[1, 0, 1], [1, 0]]})["accuracy"] <= 1


def test_tensors_and_their_data_sets():
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    for data in (TensorDataset(x, y), (x, y), (x, y.tolist()), [(row, int(n)) for row, n in zip(x, y)]):
        batches = list(training_data(data, model, batch_size=4))
        assert [len(inputs) for inputs, _ in batches] == [4, 4, 2]
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), x)
        assert torch.equal(torch.cat([targets for _, targets in batches]), y)
    pruner = sp.DistillPruner(model, sp.DistillConfig(schedule=sp.CubicSchedule(0.5), epochs=2))
    assert pruner.total_steps(TensorDataset(x, y), batch_size=4) == 6
    pruner.fit(TensorDataset(x, y), (x, y), batch_size=4)
    assert len(pruner.history.steps) == 6
    assert calibration_data(x, model) is x and calibration_data((x, x), model) == (x, x)


def test_features_of_unlike_length_are_not_filled_up():
    rows = [(torch.randn(4), 0), (torch.randn(3), 1)]
    with pytest.raises(ValueError, match=r"inputs expected rows of one shape, got \[3\] and \[4\]"):
        list(training_data(rows, nn.Sequential(nn.Linear(4, 3))))


def test_the_order_is_a_function_of_seed_and_epoch(tokenizer):
    loader = training_data((TEXTS * 20, LABELS * 20), bert(), tokenizer, "fit", 7, True, 3)
    first, second = ([b["input_ids"].tolist() for b in loader] for _ in range(2))
    assert first != second and len(loader) == len(first) == 18
    loader.set_epoch(0)
    assert [b["input_ids"].tolist() for b in loader] == first
    assert max(len({*map(len, batch)}) for batch in first) == 1
    seen = sorted(tuple(i for i in row if i) for batch in first for row in batch)
    assert seen == sorted(tuple(ids) for ids in tokenizer(TEXTS * 20)["input_ids"])


class Of(Processes):
    """One of several processes, without the others."""

    def __init__(self, index, size, others=()):
        super().__init__(active=False)
        self.index, self.size, self.others = index, size, list(others)

    def extremes(self, value, device):
        return min(value, *self.others, value), max(value, *self.others, value)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(tokenizer, shuffle, world):
    """Of batches world times as large each reads every world-th row, as many as the others."""
    data = {"input_ids": [[i % 13] * (i % 5 + 1) for i in range(58)], "label": [i % 3 for i in range(58)]}
    joint = training_data(data, bert(), batch_size=4 * world, shuffle=shuffle, seed=3)
    shares = [
        training_data(data, bert(), batch_size=4, shuffle=shuffle, seed=3, processes=Of(i, world)) for i in range(world)
    ]
    for epoch in (0, 1, 0):
        for loader in (joint, *shares):
            loader.set_epoch(epoch)
        batches = [list(loader) for loader in (joint, *shares)]
        lengths = {len(loader) for loader in (joint, *shares)} | {len(each) for each in batches}
        assert lengths == {-(-58 // (4 * world))}
        for whole, *parts in zip(*batches, strict=True):
            assert len({len(part["labels"]) for part in parts}) == 1
            rows = len(whole["labels"])
            for i, part in enumerate(parts):
                places = [(j * world + i) % rows for j in range(len(part["labels"]))]
                width = part["input_ids"].shape[1]
                assert torch.equal(part["labels"], whole["labels"][places])
                assert torch.equal(part["input_ids"], whole["input_ids"][places][:, :width])
    loader = DataLoader(TensorDataset(torch.ones(4, 3), torch.ones(4)))
    assert training_data(loader, bert(), processes=Of(1, 2)) is loader


def test_processes_share_a_stream(tokenizer):
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)][:5]

    class Coming(IterableDataset):
        def __iter__(self):
            yield from rows

    for data in (Coming, lambda: iter(rows)):
        found = [[b["labels"].tolist() for b in training_data(data(), bert(), tokenizer, "x", 2, processes=Of(i, 2))]
                 for i in range(2)]  # fmt: skip
        first, second = ([LABELS[i] for i in places] for places in ([0, 2, 4], [1, 3, 4]))
        assert found == [[first[:2], first[2:]], [second[:2], second[2:]]]
        loader = training_data(data(), bert(), tokenizer, "x", 2, processes=Of(0, 2))
        with pytest.raises(ValueError, match="expected the same ones in each, got others; pass all rows everywhere"):
            check_same_rows(loader, Of(0, 2, [5]), "x", CPU)
        assert [b["labels"].tolist() for b in loader] == found[0]  # what was looked at is there to be read


def test_a_share_of_a_share_is_refused(tokenizer):
    def seen(data):
        found = []
        processes = Of(0, 2)
        processes.extremes = lambda value, device: found.append(value) or (value, value)
        check_same_rows(training_data(data, bert(), tokenizer, processes=processes), processes, "x", CPU)
        return found[0]

    whole = seen((TEXTS, LABELS))
    assert seen((TEXTS, LABELS)) == whole and seen([by_hand(tokenizer)]) == -1
    others = [(TEXTS[:3], LABELS[:3]), (TEXTS[::-1], LABELS[::-1]), (TEXTS, [0, *LABELS[1:-1], 0])]
    assert len({whole, *map(seen, others)}) == 4
    check_same_rows(training_data((TEXTS, LABELS), bert(), tokenizer), Of(0, 1, [5]), "x", CPU)  # alone


def test_a_bad_row_of_one_process_does_not_keep_the_others_waiting(tokenizer):
    """It is raised when they have exchanged what they saw, which all of them wait for."""
    exchanged = []
    processes = Of(0, 2)
    processes.extremes = lambda value, device: exchanged.append(value) or (value, value)

    class Coming(IterableDataset):
        def __iter__(self):
            yield {"text": "a b", "label": 0}

    loader = training_data(Coming(), bert(), tokenizer, "x", 2, processes=processes)
    loader.form.tokenizer = lambda *texts, **options: None
    with pytest.raises(ValueError, match="tokenizer expected"):
        check_same_rows(loader, processes, "x", CPU)
    assert exchanged == [-2]


def test_batches_of_a_data_set_without_a_length():
    class Batches(IterableDataset):
        def __iter__(self):
            yield {"input_ids": torch.ones(2, 3, dtype=torch.int64), "labels": torch.tensor([0, 1])}

    class Reader:
        def __getitem__(self, index):
            raise AssertionError("it was not to be asked")

        def __iter__(self):
            yield from Batches()

    for data in (Batches(), Reader()):
        assert training_data(data, bert()) is data
        assert calibration_data(data, bert()) is data


@pytest.mark.parametrize("size", [1, 2, 3])
def test_collated_texts_of_any_size(tokenizer, size):
    rows = list(zip(TEXTS, LABELS))[: 3 * size]
    loader = DataLoader(rows, batch_size=size)
    found = [batch["labels"].tolist() for batch in training_data(loader, bert(), tokenizer)]
    assert found == [[label for _, label in rows[i : i + size]] for i in range(0, len(rows), size)]
    assert len(list(calibration_data(loader, bert(), tokenizer))) == len(found)


def test_arrays_as_numpy_makes_them():
    whole = numpy.arange(12.0).reshape(3, 4)
    for array in (whole[::-1], whole.astype(">f8"), whole.astype(">i2"), whole[:, ::2], numpy.float64(3.0)):
        made = as_tensors(numpy.asarray(array))
        assert made.tolist() == numpy.asarray(array).tolist()
    whole.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_tensors(whole).tolist() == whole.tolist()


@pytest.mark.parametrize("kind", ["distill", "gan"])
def test_the_trainers_take_texts(tokenizer, kind):
    """Rows and the loader that one would write by hand end at the same weights."""
    results = []
    for data in ((TEXTS, LABELS), training_data((TEXTS, LABELS), bert(), tokenizer, "x", 3, True)):
        model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        config = {"schedule": sp.CubicSchedule(0.5), "epochs": 4.0}
        pruner = (sp.GANPruner(model, sp.GANConfig(**config)) if kind == "gan"
                  else sp.DistillPruner(model, sp.DistillConfig(**config)))  # fmt: skip
        pruner.fit(data, (TEXTS, LABELS), tokenizer=tokenizer, batch_size=3)
        results.append(pruner.finalize())
        if kind == "gan":
            assert 0 <= pruner.probe((TEXTS, LABELS), steps=2, tokenizer=tokenizer) <= 1
    assert len(pruner.history.steps) == 8
    assert all(torch.equal(a, b) for a, b in zip(results[0].parameters(), results[1].parameters()))


def test_compensation_and_the_gradual_pruner_take_texts(tokenizer):
    dense, model = bert(), bert()
    sp.prune_(model, 0.5)
    assert "classifier" not in sp.compensate_(model, dense, TEXTS * 4, ranks=(), tokenizer=tokenizer).layers
    pruner = sp.Pruner(bert(), sp.PruneConfig(criterion="wanda", criterion_options={"min_tokens": 1}, end=2),
                       data=TEXTS, tokenizer=tokenizer)  # fmt: skip
    pruner.prepare()
    pruner.step()
    pruner.step()
    assert pruner.density == pytest.approx(0.1)


def test_perplexity_of_texts_is_that_of_their_ids(tokenizer):
    config = transformers.LlamaConfig(vocab_size=13, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=24)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.tensor([i for text in TEXTS for i in tokenizer(text)["input_ids"]])
    expected = perplexity(model, ids, 8)
    for data in (TEXTS, Names(text=TEXTS, label=LABELS)):
        assert perplexity(model, data, 8, tokenizer=tokenizer) == expected
    assert torch.equal(text_ids("the cat", tokenizer, "x"), torch.tensor([2, 5, 7, 3]))
    with pytest.raises(ValueError, match="expected a text, got NoneType in row 1; leave the row out"):
        perplexity(model, {"text": ["the cat", None]}, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="of one kind, got str in row 0 and NoneType in row 1; leave out the rows"):
        perplexity(model, ["the cat", None], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="column of text, got columns label"):
        perplexity(model, Names(label=[1]), tokenizer=tokenizer)


def test_a_loader_keeps_what_the_trainer_asks_of_it(tokenizer):
    """A shuffling loader's generator is what a resume goes by."""
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader([{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)], 2, shuffle=True, generator=generator)
    made = training_data(loader, bert(), tokenizer)
    assert made.generator is generator and made.sampler is loader.sampler and len(made) == 3
    assert training_data(loader, bert()) is loader

    def endless():
        yield from loader

    class Unsized:
        __iter__ = staticmethod(endless)

    assert not hasattr(training_data(Unsized(), bert(), tokenizer), "__len__")


def test_a_batch_of_ids_is_not_cut_and_single_values_go_with_it(tokenizer, monkeypatch):
    """Rows of a tensor are tensors: a thousand of them for a batch that is complete as it is."""

    class Scaled(nn.Module):
        def forward(self, input_ids, attention_mask, token_type_ids, scale=1.0):
            return input_ids * scale

    want = by_hand(tokenizer)
    one = {"scale": 0.5, "epoch": torch.tensor(3), "text": TEXTS}
    monkeypatch.setattr(intake, "listed", lambda values: pytest.fail("cut into rows"))
    for data in ([{**want, **one}], DataLoader([{**want, **one}], batch_size=None)):
        (batch,) = training_data(data, Scaled(), tokenizer)
        assert batch.pop("scale") == 0.5
        same(batch, want)
    monkeypatch.undo()
    (batch,) = training_data([{**one, "labels": torch.tensor(LABELS)}], Scaled(), tokenizer)
    assert batch.pop("scale") == 0.5
    same(batch, want)
    with pytest.raises(ValueError, match=r"a single one in 'epoch'; pass \[row\], or of a batch \[batch\]"):
        training_data({**want, "epoch": torch.tensor(3)}, bert())
    unlabelled = {k: v for k, v in want.items() if k != "labels"}
    for data in ({**unlabelled, "output_attentions": False}, {**unlabelled, "inputs_embeds": None}):
        assert calibration_data(data, bert()) is data
        results = []
        for given in (data, [want]):
            results.append(bert())
            sp.prune_(results[-1], 0.5, criterion="wanda", criterion_options={"min_tokens": 1}, data=given)
        assert all(torch.equal(p, q) for p, q in zip(results[0].parameters(), results[1].parameters()))


def test_arrays_are_tensors(tokenizer):
    want = by_hand(tokenizer)
    arrays = {name: value.numpy() for name, value in want.items()}
    model = bert()
    expected = evaluate(model, [want])
    small = {**arrays, "labels": arrays["labels"].astype("int8")}
    for data in (arrays, [arrays], [small], (numpy.array(TEXTS), numpy.array(LABELS)), DataLoader([arrays], None)):
        assert evaluate(model, data, tokenizer=tokenizer) == pytest.approx(expected, rel=1e-5)
    results = []
    for data in ([want], arrays, [arrays], numpy.array(TEXTS), numpy.array(TEXTS, dtype=object)):
        results.append(bert())
        options = {"criterion": "wanda", "criterion_options": {"min_tokens": 1}}
        sp.prune_(results[-1], 0.5, data=data, tokenizer=tokenizer, **options)
        assert all(torch.equal(p, q) for p, q in zip(results[0].parameters(), results[-1].parameters()))
    x, y = torch.randn(10, 4), torch.arange(10) % 3
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    forms = [
        (x.double().numpy(), y.numpy()), (x.tolist(), y.tolist()), [(row, n) for row, n in zip(x.numpy(), y.numpy())],
        [(x.double().numpy(), y.int().numpy())],
    ]  # fmt: skip
    for data in forms:
        assert evaluate(layers, data) == pytest.approx(evaluate(layers, [(x, y)]), rel=1e-5)
    read = [collect_inputs(layers, ["0"], data)["0"] for data in (x, TensorDataset(x), Examples(list(x)))]
    read += [collect_inputs(layers, ["0"], data)["0"] for data in (x.numpy(), [x.numpy()], x.double().numpy())]
    assert all(torch.equal(found, x) for found in read)


def test_loaders_of_other_kinds(tokenizer):
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)]
    want = by_hand(tokenizer)
    for loader in (DataLoader(Examples(rows), 6, num_workers=1), DataLoader(Examples(rows), 6, collate_fn=list)):
        (batch,) = training_data(loader, bert(), tokenizer)
        same(batch, want)
    with pytest.raises(ValueError, match="expected batches, got single rows; give the loader a batch_size"):
        list(training_data(DataLoader(Examples(rows), batch_size=None), bert(), tokenizer))


def test_a_data_frame_with_gaps_and_columns_alone(tokenizer):
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"text": TEXTS, "label": LABELS}, index=range(10, 16))
    named = table.assign(label=pandas.Categorical([f"LABEL_{n}" for n in LABELS]))
    for data in (table, (table.text, table.label), named, table.assign(label=table.label.astype("Int64"))):
        (batch,) = training_data(data, bert(), tokenizer)
        same(batch, by_hand(tokenizer))
    gaps = table.label.where(table.label < 2)
    for label in (gaps, gaps.astype("Int64")):
        with pytest.raises(ValueError, match="label of row 2 expected a number, got none; leave the row out"):
            training_data(table.assign(label=label), bert(), tokenizer)

    class Column:
        __len__, __getitem__ = TEXTS.__len__, TEXTS.__getitem__

        def __iter__(self):
            return iter(TEXTS)

    for data in (table.text, Column()):
        (batch,) = calibration_data(data, bert(), tokenizer)
        same(batch, {k: v for k, v in by_hand(tokenizer).items() if k != "labels"})


def test_labels_in_a_table_with_gaps_are_floats(tokenizer):
    for labels in ([float(n) for n in LABELS], numpy.array(LABELS, dtype=float), torch.tensor(LABELS).double()):
        (batch,) = training_data((TEXTS, labels), bert(), tokenizer)
        same(batch, by_hand(tokenizer))


def test_positions_are_counted_as_the_model_counts_them(tokenizer):
    """RoBERTa's first position comes after its padding; a tower of another kind has a table of its own."""
    sizes = {"vocab_size": 13, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3,
             "intermediate_size": 24, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 2,
             "eos_token_id": 3}  # fmt: skip
    model = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**sizes)).eval()
    (batch,) = training_data((["cat " * 40], [0]), model, tokenizer)
    assert batch["input_ids"].shape == (1, 14)
    assert evaluate(model, (["cat " * 40], [0]), tokenizer=tokenizer)["loss"] > 0
    with pytest.raises(ValueError, match="input_ids of row 0 are 15, expected at most 14, the model's positions; cut"):
        training_data({"input_ids": [[5] * 15], "label": [0]}, model)
    from_0 = bert()  # as LXMERT, whose padding is a position too
    next(m for n, m in from_0.named_modules() if n.endswith("position_embeddings")).padding_idx = 0
    assert len(training_data({"input_ids": [[5] * 16], "label": [0]}, from_0)) == 1
    wide = bert()
    wide.tower = nn.Module()
    wide.tower.position_embedding = nn.Embedding(3, 2)
    (batch,) = training_data((["cat " * 40], [0]), wide, tokenizer)
    assert batch["input_ids"].shape == (1, 16)


def test_what_is_read_again_is_no_iterator(tokenizer):
    pruner = sp.DistillPruner(bert(), sp.DistillConfig(steps=3, schedule=sp.CubicSchedule(0.5)))
    with pytest.raises(ValueError, match=r"got a list_iterator, which can be read only once; pass list\(...\) of it"):
        pruner.fit((TEXTS, LABELS), iter([by_hand(tokenizer)]), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"choose_exact_layers: .* got a generator, which can be read only once"):
        sp.choose_exact_layers(bert(), (batch for batch in [by_hand(tokenizer)]))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], r"empty|nothing|at least one"), ({"text": [], "label": []}, "data is empty; expected a row"),
        (Names(text=[], label=[]), "data is empty"), ("text", r"expected a list of texts, got one str; pass \[text\]"),
        ((TEXTS, LABELS[:2]), "as many labels as inputs, got 6 and 2"), (TEXTS, "expected labels, in a column 'label'"),
        ((TEXTS, ["yes"] * 6), r"expected one of LABEL_0, LABEL_1, LABEL_2, got 'yes'; .*label2id"),
        ((TEXTS, [0, 1, 2, 3, 0, 0]), r"label of row 3 expected less than 3, the model's classes, got 3"),
        ((TEXTS, [0, 1, -1, 0, 0, 0]), r"label of row 2 expected >= 0, got -1; a split without labels"),
        ((TEXTS, [0, None, 1, 0, 0, 0]), "label of row 1 expected a number, got none"),
        ([("the cat", "yes"), ("a dog", "no")], r"rows of two texts; is the second one a label\?"),
        ({"words": TEXTS, "label": LABELS}, r"columns that BertForSequenceClassification reads .* got words, label"),
        ({"text": TEXTS, "label": LABELS, "labels": LABELS}, "one column of labels, got labels and label"),
        ({"text": [*TEXTS[:5], None], "label": LABELS}, "expected a text, got NoneType in row 5; leave the row out"),
        ({"text": TEXTS, "label": 1}, r"got a single one in 'label'; pass \[row\]"),
        ({"train": Names(text=TEXTS), "test": Names(text=TEXTS)}, r"several \(train, test\); pass data\['train'\]"),
        ([{"text": "a", "label": 0}, {"text": "b"}], r"same keys, got \['label', 'text'\] in row 0 and \['text'\] in"),
        ([{"text": "a", "label": 0}, "b"], "rows of one kind"), (torch.ones(3, 4), "with labels, got one tensor"),
        ({"input_ids": [[1, 2], ["x"]], "label": [0, 1]}, "input_ids expected numbers"),
        ((TEXTS, [0.5] * 6), "label of row 0 expected a whole number, for the model has 3 classes, got 0.5"),
        ((TEXTS, [float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0]), "label of row 0 expected a number, got none"),
        (([], []), "data is empty; expected a row"), (set(TEXTS), "data expected an order, got a set; pass a list"),
        ((TEXTS, [1j] * 6), "label of row 0 expected a number, got 1j"),
        ((TEXTS, [[0]] * 6), r"labels expected a number each, got lists of one, \[0\]; take the number out"),
        ([{"text": "a", "label": [0]}], r"labels expected a number each, got lists of one, \[0\]"),
        ((TEXTS, numpy.array(["yes"] * 6)), "expected one of LABEL_0, LABEL_1, LABEL_2, got 'yes'"),
        ({"input_ids": [[1], []], "label": [0, 1]}, "row 1 has no tokens; leave it out"),
        ([{"input_ids": None, "label": 0}], "input_ids of row 0 expected a list of token ids, got NoneType"),
        ([{"input_ids": "cat", "label": 0}], "input_ids of row 0 expected a list of token ids, got str"),
        ({"input_ids": [[1.0]], "label": [0]}, "input_ids of row 0 expected whole numbers, got torch.float32"),
        ({"input_ids": [[1], [13]], "label": [0, 1]}, "row 1 reach from 13 to 13, expected from 0 to 12, the model's"),
        ({"input_ids": [[-1]], "label": [0]}, "row 0 reach from -1 to -1, expected from 0 to 12"),
        ({"input_ids": [[1] * 17], "label": [0]}, "row 0 are 17, expected at most 16, the model's positions; cut them"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]], "label": [0]}, "attention_mask expected as many, got 1 entr"),
        (5, "data expected a datasets.Dataset, .* got int"), (bert, "got a function, bert; call it"),
        (None, "data expected .* got None"),
    ],
)  # fmt: skip
def test_wrong_data_says_what_was_expected(tokenizer, data, said):
    pruner = sp.DistillPruner(bert(), sp.DistillConfig(steps=1))
    with pytest.raises(ValueError, match=said):
        pruner.fit(data, tokenizer=tokenizer)


def test_text_without_a_tokenizer_and_batches_that_are_none(tokenizer):
    with pytest.raises(ValueError, match=r"prune_: data holds text \(text\), which needs .* pass tokenizer="):
        sp.prune_(bert(), 0.5, criterion="wanda", data=TEXTS)
    loader = DataLoader([{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)], batch_size=6)
    with pytest.raises(TypeError, match="got text in text; pass tokenizer="):
        evaluate(bert(), loader)
    with pytest.raises(TypeError, match="one key 'labels' or 'label', got"):
        split_batch({"x": torch.ones(1)}, torch.device("cpu"))
    with pytest.raises(TypeError, match="labels of a batch expected a tensor, got list"):
        split_batch((torch.ones(1), [1]), torch.device("cpu"))
    with pytest.raises(ValueError, match="no tokens"):
        calibration_data([" ", "cat"], bert(), lambda texts, **_: {"input_ids": [[], [7]]})
    with pytest.raises(ValueError, match="tokenizer expected one of transformers, called with texts, got int"):
        calibration_data(TEXTS, bert(), 3)
    assert intake.calibration_data(None, bert()) is None


def test_rows_that_only_come_in_their_order(tokenizer):
    rows = [{"text": t, "label": n} for t, n in zip(TEXTS, LABELS)]

    class Coming(IterableDataset):
        def __iter__(self):
            yield from rows

    (want,) = training_data((TEXTS, LABELS), bert(), tokenizer)
    for data in (iter(rows), (row for row in rows), Coming()):
        (batch,) = list(training_data(data, bert(), tokenizer))
        same(batch, want)
    first, second = training_data(Coming(), bert(), tokenizer, "x", 4)
    assert first["labels"].tolist() + second["labels"].tolist() == LABELS
    (batch,) = training_data(iter([{**want, "text": TEXTS}]), bert(), tokenizer)
    same(batch, want)


def test_an_iterator_is_read_once(tokenizer):
    pruner = sp.DistillPruner(bert(), sp.DistillConfig(steps=3, schedule=sp.CubicSchedule(0.5), method="magnitude"))
    with pytest.raises(ValueError, match="an iterator can be read only once"):
        pruner.fit(iter([by_hand(tokenizer)]))


def test_the_real_library(tokenizer, tmp_path):
    datasets = pytest.importorskip("datasets")
    plain = datasets.Dataset.from_dict({"text": TEXTS, "label": LABELS})
    made = plain.map(lambda rows: tokenizer(rows["text"]), batched=True)
    streamed = made.to_iterable_dataset()
    (want,) = training_data((TEXTS, LABELS), bert(), tokenizer)
    for data in (plain, made, made.with_format("torch"), made.with_format("numpy"), streamed):
        (batch,) = list(training_data(data, bert(), tokenizer))
        same(dict(batch), want)
        (batch,) = list(calibration_data(data, bert(), tokenizer))
        same(dict(batch), {k: v for k, v in want.items() if k != "labels"})
    with pytest.raises(ValueError, match=r"got several \(train, test\)"):
        training_data(datasets.DatasetDict(train=plain, test=plain), bert(), tokenizer)
    pruner = sp.DistillPruner(bert(), sp.DistillConfig(schedule=sp.CubicSchedule(0.5), steps=4))
    pruner.fit(streamed, plain, tokenizer=tokenizer, batch_size=4)
    assert len(pruner.history.steps) == 4 and pruner.density == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ValueError, match="the loader has no length; set DistillConfig"):
        sp.DistillPruner(bert(), sp.DistillConfig()).fit(streamed, tokenizer=tokenizer)
