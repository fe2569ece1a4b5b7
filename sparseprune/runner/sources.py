"""Where model and data of a run come from: the built-in encoder or a transformers classifier, and its batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import in_home, write_text
from ..data import (
    SETS,
    Augment,
    DataReport,
    Examples,
    TextData,
    TokenLoader,
    Vocabulary,
    check_data,
    load_files,
    load_folder,
    load_set,
    read_names,
)
from ..integrations.transformers import loading
from ..nn import densify_, expose_linears_
from ..pruning.rows import IGNORED
from ..training.rates import SMALLEST, rate_for
from .config import RunConfig
from .folder import write_json
from .text_encoder import TextEncoder

__all__ = ["Source", "default_rate", "open_source"]

_ANY = 1 << 20


@dataclass
class Source:
    """Everything that depends on where model and data come from."""

    data: TextData
    make: Callable[[], nn.Module]
    loaders: dict[str, TokenLoader]
    latency: dict[str, Tensor]
    save_parts: Callable[[Path], None]
    source: str
    loader: Callable[[Examples, bool], TokenLoader]
    count_tokens: Callable[[Sequence[str]], int]
    max_length: int
    fine_tuned: bool = False

    def check(self) -> DataReport:
        """What is wrong with the data."""
        return check_data(self.data, self.max_length, self.count_tokens)


def open_source(config: RunConfig) -> Source:
    """Reads and checks the data whole, then the model. ValueError or OSError on anything wrong with either."""
    return _text_encoder(config) if config.model is None else _transformer(config)


def default_rate(model: str) -> float:
    """The learning rate of pruning where none is given, by the hidden size (:func:`rate_for`); 3e-5 where the model
    says none.
    """
    try:
        from transformers import AutoConfig

        with loading(model):
            size = getattr(AutoConfig.from_pretrained(model), "hidden_size", None)
    except (ImportError, OSError, ValueError):
        size = None  # whatever is wrong with the model, open_source says it
    return rate_for(size) if isinstance(size, int) and size > 0 else SMALLEST


def _read(config: RunConfig) -> TextData:
    names = None if config.labels is None else read_names(in_home(config.labels))
    if config.data is not None:
        data = load_set(config.data) if config.data in SETS else load_folder(config.data, names)
    else:
        assert config.train is not None and config.valid is not None and config.test is not None
        data = load_files(config.train, config.valid, config.test, label_names=names)
    data = data.head(config.train_limit, config.other_limit)
    if len(data.label_names) < 2:
        raise ValueError(f"{data.train.source}: expected two labels or more, got {data.label_names}")
    return data


def _text_encoder(config: RunConfig) -> Source:
    if config.teacher is not None:
        raise ValueError("teacher: the built-in encoder is trained here; name a model to use a teacher")
    data = _read(config)
    if data.train.tokens:
        raise ValueError(f"{data.train.source}: the built-in encoder labels whole texts, not words; name a model")
    vocabulary = Vocabulary.build(data.train.texts)
    longest = max(len(vocabulary.encode(t, 512)) for t in data.train.texts)
    limit = config.max_length or min(128, max(8, longest))

    def loader(split: Examples, train: bool) -> TokenLoader:
        return TokenLoader(
            [vocabulary.encode(t, limit) for t in split.texts], split.labels, config.batch_size if train else 64, train,
            config.seed, Augment(config.drop, config.swap, config.mask) if train else None, vocabulary.PAD,
            vocabulary.MASK, protect={vocabulary.SEPARATOR},
        )  # fmt: skip

    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary), "num_labels": len(data.label_names), "hidden": config.hidden, "ffn": config.ffn,
        "layers": config.layers, "heads": config.heads, "max_length": limit, "dropout": config.dropout,
    }  # fmt: skip

    def save_parts(folder: Path) -> None:
        write_text(folder / "vocabulary.json", vocabulary.to_json())
        write_json(folder / "encoder.json", {**settings, "labels": data.label_names})

    loaders = {"train": loader(data.train, True), **_plain(data, loader)}
    return Source(data, lambda: TextEncoder(**settings), loaders, _latency_batch(loaders["test"], config.latency_batch),
                  save_parts, "built-in encoder", loader, lambda texts: len(vocabulary.encode(tuple(texts), _ANY)),
                  limit)  # fmt: skip


def _plain(data: TextData, loader: Callable[[Examples, bool], TokenLoader]) -> dict[str, TokenLoader]:
    return {
        "train_plain": loader(data.train, False),
        "valid": loader(data.valid, False),
        "test": loader(data.test, False),
    }


def _transformer(config: RunConfig) -> Source:
    try:
        from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
    except ImportError as error:
        raise ValueError(f"model {config.model!r} needs transformers; pip install 'sparseprune[hf]'") from error
    if config.teacher is not None and config.teacher != config.model:
        raise ValueError(
            f"model: expected none beside the teacher {config.teacher!r}, from whose weights the student starts, got "
            f"{config.model!r}; leave one of them out, or give a student of its own to sp.DistillPruner"
        )
    source = config.model
    assert source is not None
    data = _in_order_of(source, _read(config), config)
    labels = dict(enumerate(data.label_names))
    words = data.train.tokens
    kind = AutoModelForTokenClassification if words else AutoModelForSequenceClassification
    with loading(source, f" as a {'token' if words else 'sequence'} classifier of {len(labels)} labels"):
        tokenizer = AutoTokenizer.from_pretrained(source, **({"add_prefix_space": True} if words else {}))
        model = kind.from_pretrained(
            source, num_labels=len(labels), id2label=labels, label2id={n: i for i, n in labels.items()},
        )  # fmt: skip
    if words and not tokenizer.is_fast:
        raise ValueError(f"model {source!r}: labels of words need a fast tokenizer, which knows where its tokens lie")
    densify_(model)  # what the folder runs sparse could not be pruned
    expose_linears_(model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    limit = config.max_length or min(128, getattr(tokenizer, "model_max_length", 128))
    hidden = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    changes = Augment(config.drop, config.swap, config.mask if hidden is not None else 0.0)

    def loader(split: Examples, train: bool) -> TokenLoader:
        if words:
            found = tokenizer(
                [list(text) for text in split.texts], is_split_into_words=True, truncation=True, max_length=limit
            )
            labels_of = [_token_labels(found.word_ids(i), own) for i, own in enumerate(split.labels)]
            return TokenLoader(
                found["input_ids"], labels_of, config.batch_size if train else 64, train, config.seed,
                pad_id=tokenizer.pad_token_id,
            )  # fmt: skip
        columns = [list(column) for column in zip(*split.texts)]
        found = tokenizer(*columns, truncation=True, max_length=limit)
        types = found.get("token_type_ids") if len(columns) == 2 else None
        augment = changes if train and types is None else None
        return TokenLoader(
            found["input_ids"], split.labels, config.batch_size if train else 64, train, config.seed, augment,
            tokenizer.pad_token_id, hidden or 0, set(tokenizer.all_special_ids), types,
        )  # fmt: skip

    def count_tokens(texts: Sequence[str]) -> int:
        if words:
            return len(tokenizer([list(texts)], is_split_into_words=True)["input_ids"][0])
        return len(tokenizer(*texts, verbose=False)["input_ids"])

    def save_parts(folder: Path) -> None:
        model.config.architectures = [type(model).__name__]  # a bare encoder that was loaded is a classifier now
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    loaders = {"train": loader(data.train, True), **_plain(data, loader)}
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(len(ids) for own in loaders.values() for ids in own.sequences)
    if isinstance(positions, int) and longest > positions:
        raise ValueError(
            f"max_length {limit}: model {source!r} has {positions} positions, and a text takes {longest} tokens; "
            f"expected at most {positions}"
        )
    return Source(data, lambda: model, loaders, _latency_batch(loaders["test"], config.latency_batch), save_parts,
                  str(source), loader, count_tokens, limit, fine_tuned=config.teacher is not None)  # fmt: skip


def _in_order_of(source: str, data: TextData, config: RunConfig) -> TextData:
    """The data with their labels in the order in which the model's head has them, where its configuration names them.

    ValueError where the head is taken as it is, and its labels are named otherwise than those of the data.
    """
    from transformers import AutoConfig

    with loading(source):
        named: Any = AutoConfig.from_pretrained(source).id2label
    known = [str(named.get(i)) for i in range(len(named))] if isinstance(named, dict) else []
    names, trained = data.label_names, config.teacher is None and config.dense_epochs != 0
    if known in ([], names, [f"LABEL_{i}" for i in range(len(known))]):
        return data
    if set(names) == set(known) or (set(names) < set(known) and not trained):
        number = [known.index(name) for name in names]

        def renamed(split: Examples) -> Examples:
            moved = [[number[i] for i in own] if split.tokens else number[own] for own in split.labels]
            return replace(split, labels=moved)

        return TextData(data.name, renamed(data.train), renamed(data.valid), renamed(data.test), known)
    if not trained and not all(name.isdecimal() for name in names):
        shown, got = (", ".join(each[:8]) + (", ..." if len(each) > 8 else "") for each in (known, names))
        who = "model" if config.teacher is None else "teacher"
        raise ValueError(
            f"{who} {source!r}: expected the labels that it was trained on ({shown}), got {got} in the data; write "
            "them as it does, there or in a file for --labels, or rename them in its config.json (id2label)"
        )
    return data


def _token_labels(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """Each word's label for its first token, IGNORED for the others and for special tokens."""
    before: list[int | None] = [None, *word_ids]
    return [IGNORED if w is None or w == last else labels[w] for last, w in zip(before, word_ids)]


def _latency_batch(loader: TokenLoader, size: int) -> dict[str, Tensor]:
    """``size`` test examples spread evenly over the split, padded to the longest of them."""
    chosen = [i * len(loader.sequences) // size for i in range(min(size, len(loader.sequences)))]
    batch = loader.collate(sorted(set(chosen)))
    return {key: value for key, value in batch.items() if key != "labels"}


