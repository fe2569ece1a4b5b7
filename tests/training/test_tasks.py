"""Pruning on token labels (NER) and sentence pairs, with tiny transformers models; from files to the record."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch import nn

from sparseprune import CubicSchedule, cli, load
from sparseprune.data import Augment, TokenLoader, load_files, read_examples
from sparseprune.gan import DiscriminatorConfig, GANConfig, GANPruner
from sparseprune.runner import run_prune
from sparseprune.training import DistillConfig, DistillPruner, compare, evaluate, predictions
from sparseprune.training.losses import distillation, task_loss

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 40, "num_labels": 3}  # fmt: skip


SMALL = DiscriminatorConfig(depth=1, width=16)


def config(method="scores", **settings):
    base = {"schedule": CubicSchedule(0.4), "steps": 100, "lr": 5e-3}
    if method == "gan":
        return GANConfig(**{**base, "discriminator": SMALL, **settings})
    return DistillConfig(method=method, **{**base, **settings})


def pruner_for(model, config=None, *more, **options):
    """The trainer that takes this configuration."""
    return (GANPruner if config.adversarial else DistillPruner)(model, config, *more, **options)


def sentences(count, seed):
    """(ids, labels): tokens 10 to 29 are classed by their tens, but token 5 swaps the classes of what follows it, so
    that attention is needed; the first token, and padding, have no label.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, labels = [], []
    for _ in range(count):
        size = int(torch.randint(4, 12, (1,), generator=generator))
        own = torch.randint(10, 30, (size,), generator=generator).tolist()
        swap = bool(torch.rand(1, generator=generator) < 0.5)
        own[0] = 5 if swap else 6
        ids.append(own)
        labels.append([-100] + [(t // 10 - 1) ^ swap for t in own[1:]])
    return ids, labels


def pairs(count, seed):
    """(ids, types, labels): label 1 where the second text's token is in the first."""
    generator = torch.Generator().manual_seed(seed)
    ids, types, labels = [], [], []
    for _ in range(count):
        label = int(torch.rand(1, generator=generator) < 0.5)
        first = torch.randperm(6, generator=generator)[:3] + 10
        rest = [t for t in range(10, 16) if t not in first]
        second = int(first[0]) if label else rest[0]
        ids.append([2, *first.tolist(), 3, second, 3])
        types.append([0, 0, 0, 0, 0, 1, 1])
        labels.append(label)
    return ids, types, labels


def trained(model, loader, steps, lr=3e-3):
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for batch in itertools.islice(itertools.cycle(loader), steps):
        labels = batch.pop("labels")
        loss = task_loss(nn.functional.cross_entropy, model(**batch).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        batch["labels"] = labels
    return model.eval()


def tagger(kind):
    if kind == "bert":
        made = transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=40, **SIZES))
    else:
        made = transformers.DistilBertForTokenClassification(
            transformers.DistilBertConfig(vocab_size=40, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=3)
        )
    return made


@pytest.mark.parametrize(("kind", "method"), [("bert", "gan"), ("distilbert", "magnitude")])
def test_token_classification(kind, method):
    torch.manual_seed(0)
    train, valid = (TokenLoader(*sentences(n, s), 32, shuffle=n > 100) for n, s in ((256, 0), (64, 1)))
    batch = next(iter(valid))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert torch.equal(batch["labels"] == -100, (batch["attention_mask"] == 0) | (batch["input_ids"] < 10))
    model = trained(tagger(kind), train, 200)
    dense = evaluate(model, valid)
    assert dense["accuracy"] > 0.97
    pruner = pruner_for(model, config(method=method, compensation="best"))
    history = pruner.fit(train, valid)
    model = pruner.finalize()
    found = evaluate(model, valid)
    assert found["accuracy"] > 0.9 and ("discriminator_accuracy" in history.steps[-1]) == (method == "gan")
    assert pruner.gates.kept == pruner.gates.total - round(0.6 * pruner.gates.total)

    # Accuracy and loss are over the labelled tokens, however these fall into batches.
    logits, targets = predictions(model, valid)
    assert len(targets) == sum(len(x) - 1 for x in valid.sequences) and not (targets == -100).any()
    assert found["accuracy"] == pytest.approx(float((logits.argmax(-1) == targets).float().mean()))
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, targets)), rel=1e-4)
    assert compare(logits, logits, targets)["agreement"] == 1


@pytest.mark.parametrize("method", ["gan", pytest.param("movement", marks=pytest.mark.slow)])
def test_sentence_pairs(method):
    torch.manual_seed(1)
    made = [(*pairs(n, s), n > 100) for n, s in ((384, 0), (96, 1))]
    train, valid = (TokenLoader(ids, labels, 32, shuffle, types=types) for ids, types, labels, shuffle in made)
    assert set(next(iter(train))) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    sizes = {**SIZES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **sizes))
    trained(model, train, 300)
    assert evaluate(model, valid)["accuracy"] > 0.95
    pruner = pruner_for(model, config(method=method))
    pruner.fit(train, valid)
    assert evaluate(pruner.finalize(), valid)["accuracy"] > 0.9
    logits, targets = predictions(model, valid)
    assert logits.shape == (96, 3) and len(targets) == 96


def test_a_batch_without_a_label_is_no_fault():
    torch.manual_seed(0)
    ids, labels = sentences(64, 0)
    labels[:16] = [[-100] * len(x) for x in ids[:16]]
    batches = [TokenLoader(ids, labels, 8).collate(range(i, i + 8)) for i in range(0, 64, 8)]
    model = tagger("bert").eval()
    assert evaluate(model, batches) == pytest.approx(evaluate(model, batches[2:]))
    pruner = pruner_for(model, config(method="gan", steps=8))
    history = pruner.fit(batches, batches)
    assert not any("not finite" in e["event"] for e in history.events) and len(history.steps) == 8
    with pytest.raises(ValueError, match="nothing in it is labelled"):
        evaluate(model, batches[:2])
    empty = torch.zeros(0, 3, requires_grad=True)
    assert distillation(empty, empty.detach(), 2.0, True) == 0


@pytest.mark.parametrize(
    ("problem", "named"), [("multi_label_classification", "BCEWithLogitsLoss"), ("regression", "MSELoss")]
)
def test_a_problem_that_is_no_choice_of_one_class_wants_its_own_loss(problem, named):
    torch.manual_seed(0)
    settings = transformers.BertConfig(vocab_size=40, problem_type=problem, **SIZES)
    model = transformers.BertForSequenceClassification(settings).eval()
    ids, labels = torch.randint(1, 40, (8, 5)), torch.randint(0, 2, (8, 3)).float()
    batches = [{"input_ids": ids, "labels": labels}]
    with pytest.raises(ValueError, match=rf"problem_type is '{problem}'.*pass loss=nn\.{named}"):
        evaluate(model, batches)
    with pytest.raises(ValueError, match=rf"problem_type is '{problem}'.*pass loss=nn\.{named}"):
        DistillPruner(model, DistillConfig(steps=2)).fit(batches)
    found = evaluate(model, batches, getattr(nn, named))
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(model(input_ids=ids, labels=labels).loss), rel=1e-5)
    assert evaluate(model, batches, nn.CrossEntropyLoss())["loss"] > 0


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_conll_files(tmp_path):
    lines = ["-DOCSTART- -X- O", "", "Anna NNP B-PER", "sings VB O", "", "", "in O", "Rome\tB-LOC\r", "now O"]
    train = write(tmp_path / "a.conll", *lines)
    other = write(tmp_path / "b.BIO", "", "Rome B-PER")
    data = load_files(train, other, train)
    assert data.label_names == ["B-LOC", "B-PER", "O"] and data.train.tokens and data.head(1, 1).train.tokens
    assert data.train.texts == [("Anna", "sings"), ("in", "Rome", "now")]
    assert data.train.labels == [[1, 2], [2, 0, 2]] and data.valid.labels == [[1]]
    assert read_examples(other, ["O", "B-PER"]).labels == [[1]]
    assert len(data.digest()) == 64
    bad = write(tmp_path / "bad.conll", "a O", "", "b O", "c I-PER")
    with pytest.raises(ValueError, match=r"bad\.conll:4: label 'I-PER' of 'c' is not among the 3"):
        load_files(train, bad, train)
    with pytest.raises(ValueError, match=r"one\.conll:2: expected a word and, in the last column"):
        load_files(write(tmp_path / "one.conll", "a O", "b"), train, train)
    with pytest.raises(ValueError, match=r"empty\.conll: the file is empty"):
        load_files(write(tmp_path / "empty.conll", ""), train, train)
    with pytest.raises(ValueError, match=r"c\.tsv: expected a CoNLL file"):
        load_files(train, write(tmp_path / "c.tsv", "a\tO"), train)
    with pytest.raises(FileNotFoundError, match="CoNLL"):
        load_files(tmp_path / "none.conll", train, train)


def test_token_labels_must_fit(tmp_path):
    with pytest.raises(ValueError, match="as long as their sequences"):
        TokenLoader([[1, 2], [3]], [[0], [1]])
    with pytest.raises(ValueError, match="would misalign the token labels"):
        TokenLoader([[1, 2]], [[0, 1]], augment=Augment(drop=0.1))
    made = TokenLoader([[4, 5, 6], [7]], [[0, 1, 2], [-100]], batch_size=2)
    assert next(iter(made))["labels"].tolist() == [[-100, -100, -100], [0, 1, 2]]


@pytest.fixture
def folder(tmp_path):
    """A tiny BERT, untrained, and its tokenizer, which cuts words into characters."""
    letters = "abcdefghij"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    place = tmp_path / "model"
    place.mkdir()
    write(place / "vocab.txt", *words)
    transformers.BertTokenizerFast(str(place / "vocab.txt")).save_pretrained(place)
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **SIZES)).save_pretrained(place)
    return place


def prune_two_labels(folder, files, out, name):
    """``sparseprune prune`` on (train, valid, test), which learns its two labels."""
    train, valid, test = map(str, files)
    arguments = ["prune", "--model", str(folder), "--train", train, "--valid", valid, "--test", test, "--out", str(out),
                 "--name", name, "--dense-epochs", "8", "--epochs", "6", "--density", "0.4", "--lr", "3e-3",
                 "--batch-size", "16", "--layout", "dense"]  # fmt: skip
    assert cli.main(arguments) == 0
    record = json.loads((out / name / "run.json").read_text())
    assert record["labels"] == 2 and record["pruned"]["test"]["accuracy"] > 0.95


@pytest.mark.slow
def test_the_command_line_prunes_a_tagger(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)

    def sentence():
        words = torch.randint(0, 10, (3, 2), generator=generator)
        return [f"{chr(97 + a)}{chr(97 + b)} {'B-LOW' if a < 5 else 'O'}" for a, b in words.tolist()] + [""]

    files = [write(tmp_path / f"{n}.conll", *itertools.chain(*(sentence() for _ in range(size))))
             for n, size in (("train", 160), ("dev", 32), ("test", 32))]  # fmt: skip
    prune_two_labels(folder, files, tmp_path / "runs", "ner")
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "runs" / "ner")
    assert settings.id2label == {0: "B-LOW", 1: "O"}
    again = transformers.BertForTokenClassification(settings).eval()
    load(again, tmp_path / "runs" / "ner" / "pruned.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "runs" / "ner")
    said = again(**tokenizer("ab gh", return_tensors="pt")).logits.argmax(-1)[0]
    assert said[1] == 0 and said[3] == 1
    capsys.readouterr()


def test_the_command_line_prunes_on_pairs(folder, tmp_path, capsys):
    generator = torch.Generator().manual_seed(0)

    def row():
        a, b = (chr(97 + i) for i in torch.randint(0, 10, (2,), generator=generator).tolist())
        return f"{a} {b}\t{b}\t{'low' if b < 'f' else 'high'}"

    files = [write(tmp_path / f"{n}.tsv", *(row() for _ in range(size))) for n, size in (("train", 160), ("dev", 32))]
    prune_two_labels(folder, [*files, files[1]], tmp_path / "runs", "pairs")
    capsys.readouterr()


def test_the_command_line_shrinks_a_gpt2(tmp_path, capsys):
    """Conv1D, packed projections, heads and neurons that go for good, and the way back."""
    tokenizers = pytest.importorskip("tokenizers")
    place = tmp_path / "model"
    words = {w: i for i, w in enumerate(["<unk>", "<pad>", *(chr(97 + i) for i in range(10))])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<pad>"
    ).save_pretrained(place)
    settings = transformers.GPT2Config(vocab_size=12, n_positions=16, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    transformers.GPT2Model(settings).save_pretrained(place)
    generator = torch.Generator().manual_seed(0)

    def row():
        letters = [chr(97 + i) for i in torch.randint(0, 10, (3,), generator=generator).tolist()]
        return f"{' '.join(letters)}\t{'low' if letters[-1] < 'f' else 'high'}"

    files = [write(tmp_path / f"{n}.tsv", *(row() for _ in range(size))) for n, size in (("train", 160), ("dev", 32))]
    result = run_prune(
        str(place), files[0], files[1], files[1], out=tmp_path / "runs", name="gpt2", density=0.5, dense_epochs=8,
        epochs=6.0, lr=3e-3, batch_size=16, layout="csr", quiet=True,
        granularity={"*attn*": "heads", "*mlp*": "neurons"},
    )  # fmt: skip
    record = result.record
    assert record["pruned"]["test"]["accuracy"] > 0.95 and record["sparse_against_masked"] < 1e-4
    assert record["pruned"]["parameters"] < 0.75 * record["dense"]["parameters"]
    shapes = {n: m.out_features for n, m in result.model.named_modules() if n.endswith("c_fc")}
    assert len(shapes) == 2 and sum(shapes.values()) < 96
    saved = transformers.AutoConfig.from_pretrained(tmp_path / "runs" / "gpt2")
    again = transformers.GPT2ForSequenceClassification(saved).eval()
    assert type(again.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
    load(again, tmp_path / "runs" / "gpt2" / "pruned.safetensors")
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():  # with a gradient, the layer that learns multiplies by another kernel than the frozen one
        assert torch.equal(again(ids).logits, result.model(ids).logits)
    capsys.readouterr()


def test_the_built_in_encoder_says_that_it_labels_texts(tmp_path, capsys):
    path = str(write(tmp_path / "a.conll", "a O", "b B"))
    arguments = ["--train", path, "--valid", path, "--test", path, "--out", str(tmp_path)]
    assert cli.main(["prune", "--model", "encoder", *arguments]) != 0
    assert "labels whole texts, not words" in capsys.readouterr().err


def test_an_index_error_of_a_loss_s_own_is_its_own():
    def broken(logits, targets):
        return [0.0][3]

    with pytest.raises(IndexError, match="list index"):
        task_loss(broken, torch.randn(4, 4), torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"from 0 to 3, .* got from 0 to 4"):
        task_loss(nn.CrossEntropyLoss(), torch.randn(4, 4), torch.tensor([0, 1, 2, 4]))
