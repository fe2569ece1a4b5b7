"""What users have as data, made into the batches that models are run on: the one place where it is done.

Taken, wherever the library takes data:

- batches, of a DataLoader or any other iterable: tensors, ``(inputs, targets)``, dicts of tensors with ``labels`` or
  ``label``; with a ``tokenizer`` they may hold text;
- rows: a ``datasets.Dataset`` and what looks like one, a ``torch.utils.data.Dataset``, a DataFrame, a list of dicts, a
  dict of columns, ``(texts, labels)``, a list of texts. Of the columns those are used that the model's ``forward``
  names; where it names none, the text (:data:`~.columns.TEXT_COLUMNS`) goes through the tokenizer. Rows are held in
  memory and padded here, so that a tokenizer needs no pad token.

Where several processes train together, each is given all rows and reads its share of every batch; batches that are made
already are read as they come, so that a loader is to yield the share of its own process.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from .batches import LABELS, TARGETS, as_tensors, check_no_mask, makes_inputs_of_labels, moved, token_embedding
from .columns import (
    FORMS,
    POSITIONAL,
    TEXT_COLUMNS,
    check_data,
    columns_of,
    is_batch,
    is_row,
    is_scalar,
    is_stream,
    of_rows,
    strings,
    text_columns,
)
from .processes import Processes
from .rows import Collate, RowBatches, labels_of, listed, share_of

__all__ = ["calibration_data", "check_same_rows", "first_batches", "positions_of", "text_ids", "training_data"]

_OF_TOKENIZER = ("input_ids", "attention_mask", "token_type_ids")
_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")
_CALIBRATION_ROWS = 8
_SAMPLE = 64  # rows that processes compare


def calibration_data(data: Any, model: nn.Module, tokenizer: Any = None, who: str = "data") -> Any:
    """Tensors and batches as they are, rows in batches of 8, in their order and without labels, unless the model makes
    its decoder's inputs of them. ValueError on what is neither, on text without a tokenizer, and on (ids, mask) in the
    place of (inputs, labels).
    """
    check_data(data, tokenizer, who)
    data = data if isinstance(data, Mapping | list | tuple) else as_tensors(data)
    if isinstance(data, Tensor) or data is None or is_batch(data):
        return data
    if isinstance(data, tuple) and data:
        check_no_mask(data, who)
    kept = list(data) if isinstance(data, Iterator) else data  # looked at, which an iterator does not stand
    columns = columns_of(kept, who)
    if columns is None:
        return kept if tokenizer is None else [*_Tokenised(kept, _Form(model, tokenizer, who, labels=False))]
    if POSITIONAL in columns:
        _check_no_mask_of_rows(columns, who)
    return list(_Form(model, tokenizer, who, labels=False).batches(columns, _CALIBRATION_ROWS))


def _check_no_mask_of_rows(columns: dict[str, list[Any]], who: str) -> None:
    """:func:`check_no_mask` of (ids, labels) that are rows."""
    parts = [as_tensors(columns[name]) for name in (POSITIONAL, *LABELS) if name in columns]
    if all(isinstance(value, Tensor) and value.dim() == 1 for part in parts for value in part):
        check_no_mask([torch.cat([*part]) for part in parts], who)


def training_data(
    data: Any, model: nn.Module, tokenizer: Any = None, who: str = "data", batch_size: int = 32,
    shuffle: bool = False, seed: int = 0, processes: Processes | None = None, again: bool = False,
) -> Any:  # fmt: skip
    """A loader of labelled batches: one that is a loader already as it is, rows in batches of ``batch_size``, drawn
    anew for each epoch where ``shuffle`` is set, in an order that hangs on seed and epoch alone. ValueError on rows
    without labels, labels that the model has no number for, and text without a tokenizer.

    processes: those that train together; of rows each then reads its share, as many batches as every other.
    again: whether it is read more than once whatever its length; ValueError then on an iterator.
    """
    rank, world = (0, 1) if processes is None else (processes.index, processes.size)
    check_data(data, tokenizer, who)
    if isinstance(data, Tensor):
        raise ValueError(f"{who}: data expected inputs with labels, got one tensor {list(data.shape)}; pass {FORMS}")
    if data is None and not shuffle:
        return None  # no data to validate on
    if data is None:
        raise ValueError(f"{who}: data expected {FORMS}, got None")
    if again and isinstance(data, Iterator):
        raise ValueError(
            f"{who}: data that is read again and again expected a list or a loader, got a {type(data).__name__}, which "
            "can be read only once; pass list(...) of it"
        )
    form = _Form(model, tokenizer, who, labels=True)
    if isinstance(data, Iterator):  # read once: the trainer says what is to be said of that
        first = list(islice(data, 1))
        data = chain(first, data)
        if first and is_row(first[0]):
            return _Stream(data, form, batch_size, rank, world)
        return data if tokenizer is None else iter(_Tokenised(data, form))
    if is_stream(data):
        return _Stream(data, form, batch_size, rank, world)
    columns = columns_of(data, who, training=True)
    if columns is None:
        return data if tokenizer is None else _tokenised(data, form)
    return form.batches(columns, batch_size, shuffle, seed, rank, world)


def text_ids(data: Any, tokenizer: Any, who: str) -> Tensor:
    """The token ids of all texts one after the other, int64 `[T]`: of a text, a list of texts or a table with a column
    of text.
    """
    if not callable(tokenizer):
        raise ValueError(f"{who}: text expected a tokenizer to go with it, got {type(tokenizer).__name__}")
    columns = {"text": [data]} if isinstance(data, str) else columns_of(data, who)
    keys = None if columns is None else text_columns(columns)
    if columns is None or keys is None:
        got = type(data).__name__ if columns is None else f"columns {', '.join(columns)}"
        raise ValueError(f"{who}: expected texts, or a data set with a column of text, got {got}")
    texts = [text for row in zip(*([*strings(columns[key], who)] for key in keys)) for text in row]
    return torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]], dtype=torch.int64)


class _Form:
    """How rows become what one model is called with."""

    def __init__(self, model: nn.Module, tokenizer: Any, who: str, labels: bool) -> None:
        self.model, self.tokenizer, self.who, self.labels = model, tokenizer, who, labels
        parameters = inspect.signature(model.forward).parameters
        self.names = set(parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "input_ids" not in self.names:
            self.names |= set(_OF_TOKENIZER)
        config = getattr(model, "config", None)
        self.config = config
        self._kind = type(model).__name__
        found = [getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None)]
        pad = next((each for each in found if isinstance(each, int)), 0)
        self.collate = Collate(pad, masks="attention_mask" in self.names, who=who)
        embedding = token_embedding(model)
        self._vocabulary = None if embedding is None else embedding.num_embeddings
        self._positions = positions_of(model)

    def batches(
        self, columns: dict[str, list[Any]], size: int, shuffle: bool = False, seed: int = 0, rank: int = 0,
        world: int = 1,
    ) -> RowBatches:  # fmt: skip
        sizes = {name: len(values) for name, values in columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"{self.who}: data expected columns of one length, got {sizes}")
        if not columns or not next(iter(sizes.values())):
            raise ValueError(f"{self.who}: data is empty; expected a row or more")
        inputs, labels = self.parts(columns)
        if "TokenClassification" in self._kind and labels is not None and isinstance(inputs, dict):
            self._check_of_tokens(inputs.get("input_ids", []), labels)
        return RowBatches(inputs, labels, self.collate, size, shuffle, seed, rank, world)

    def parts(self, columns: dict[str, list[Any]]) -> tuple[dict[str, list[Any]] | list[Any], list[Any] | None]:
        """(inputs by name, or those of models that name none; labels)."""
        own = [name for name in LABELS if name in columns]
        if len(own) > 1:
            raise ValueError(f"{self.who}: data expected one column of labels, got {' and '.join(own)}; remove one")
        read = self.labels or makes_inputs_of_labels(self.model)
        labels = labels_of(columns[own[0]], self.config, self._kind, self.who) if own and read else None
        if self.labels and not own:
            raise ValueError(
                f"{self.who}: data expected labels, in a column 'label' or 'labels' or as (texts, labels), got "
                f"{', '.join(columns)}"
            )
        if POSITIONAL in columns:
            return columns[POSITIONAL], labels
        named = [name for name in columns if name in self.names and name not in TARGETS]
        if named:
            return self._checked({name: columns[name] for name in named}), labels
        keys = text_columns(columns)
        if keys is None:
            wanted = ", ".join(sorted(self.names - set(TARGETS) - {"self"}))
            raise ValueError(
                f"{self.who}: data expected columns that {type(self.model).__name__} reads ({wanted}) or text in a "
                f"column {', '.join('+'.join(each) for each in TEXT_COLUMNS)}, got {', '.join(columns)}; rename them"
            )
        if self.tokenizer is None:
            raise ValueError(
                f"{self.who}: data holds text ({' and '.join(keys)}), which needs the model's tokenizer; pass "
                "tokenizer=, or tokenise the data first"
            )
        return self.tokenise([[*strings(columns[key], self.who)] for key in keys]), labels

    def tokenise(self, texts: list[list[str]]) -> dict[str, list[Any]]:
        found = self.tokenizer(*texts, **self._limit())
        if not isinstance(found, Mapping) or "input_ids" not in found:
            raise ValueError(
                f"{self.who}: tokenizer expected one of transformers, which answers with input_ids, got "
                f"{type(found).__name__} from {type(self.tokenizer).__name__}"
            )
        return self._checked({n: listed(found[n]) for n in _OF_TOKENIZER if n in found and n in self.names})

    def _checked(self, inputs: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """``inputs`` where each row has tokens, as many as its model has places for, and all of its vocabulary."""
        positions, vocabulary = self._positions, self._vocabulary
        for number, ids in enumerate(inputs.get("input_ids", [])):
            where = f"{self.who}: input_ids of row {number}"
            if is_scalar(ids):
                raise ValueError(f"{where} expected a list of token ids, got {type(ids).__name__}; tokenise it first")
            if not len(ids):
                raise ValueError(f"{self.who}: the text of row {number} has no tokens; leave it out")
            for name in _OF_TOKENIZER[1:]:
                own = inputs[name][number] if name in inputs else ids
                if is_scalar(own) or len(own) != len(ids):
                    got = type(own).__name__ if is_scalar(own) else f"{len(own)} entries"
                    raise ValueError(f"{where} are {len(ids)}, {name} expected as many, got {got}")
            try:
                held = torch.as_tensor(ids)
            except (TypeError, ValueError, RuntimeError):
                continue  # to be said where they are put together
            if held.is_floating_point() or held.is_complex():
                raise ValueError(f"{where} expected whole numbers, got {held.dtype}; features go in inputs_embeds")
            if not held.numel():
                raise ValueError(f"{where} expected a token or more in each, got {list(held.shape)}")
            low, high = int(held.min()), int(held.max())
            if vocabulary is not None and not 0 <= low <= high < vocabulary:
                raise ValueError(
                    f"{where} reach from {low} to {high}, expected from 0 to {vocabulary - 1}, the model's vocabulary; "
                    "tokenise with this model's own tokenizer"
                )
            if positions is not None and held.shape[-1] > positions:
                raise ValueError(
                    f"{where} are {held.shape[-1]}, expected at most {positions}, the model's positions; cut them "
                    "(truncation=True, max_length=... of the tokenizer)"
                )
        return inputs

    def _check_of_tokens(self, ids: list[Any], labels: list[Any]) -> None:
        """ValueError where a row has not as many labels as tokens."""
        for number, (tokens, own) in enumerate(zip(ids, labels)):
            if is_scalar(own) or len(own) != len(tokens):
                got = type(own).__name__ if is_scalar(own) else str(len(own))
                raise ValueError(
                    f"{self.who}: the labels of row {number} expected one a token, {len(tokens)}, got {got}; those of "
                    "special tokens and of the rest of a word are -100"
                )

    def _limit(self) -> dict[str, Any]:
        """No text longer than tokenizer and model can take."""
        limits = [
            getattr(self.tokenizer, "model_max_length", None), getattr(self.config, "max_position_embeddings", 0),
            self._positions,
        ]  # fmt: skip
        real = [n for n in limits if isinstance(n, int) and 0 < n < 1 << 24]
        return {"truncation": True, "max_length": min(real)} if real else {}


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a model takes that looks their positions up in a table beside that of its tokens; else None."""
    embedding = token_embedding(model)
    beside = (m._modules for m in model.modules() if embedding is not None and embedding in m._modules.values())
    tables = [found for held in beside for name in _POSITIONS if isinstance(found := held.get(name), nn.Embedding)]
    # RoBERTa counts from the place after its padding, which is 1.
    sizes = [table.num_embeddings - (table.padding_idx + 1 if table.padding_idx else 0) for table in tables]
    return min(sizes, default=None)


class _Tokenised:
    """A loader whose batches hold text, tokenised as they come; else the loader itself."""

    def __init__(self, loader: Iterable[Any], form: _Form) -> None:
        self._loader, self._form = loader, form

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            yield _tokenised_batch(batch, self._form)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)


class _SizedTokenised(_Tokenised):
    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]


def _tokenised(loader: Iterable[Any], form: _Form) -> _Tokenised:
    return (_SizedTokenised if hasattr(loader, "__len__") else _Tokenised)(loader, form)


def _tokenised_batch(batch: Any, form: _Form) -> Any:
    if isinstance(batch, list) and batch and all(is_row(row) and not isinstance(row, str) for row in batch):
        return form.batches(of_rows(batch, form.who), len(batch)).whole()  # of a loader that does not collate
    if isinstance(batch, Mapping):
        keys = text_columns(batch)
        if keys is not None and isinstance(batch[keys[0]], str):
            raise ValueError(
                f"{form.who}: data expected batches, got single rows; give the loader a batch_size, or pass the rows"
            )
        single = {name: value for name, value in batch.items() if is_scalar(value) and name in form.names}
        if (form.names - set(TARGETS) - set(single)) & set(batch):
            return {name: value for name, value in batch.items() if name in form.names or name in TARGETS}
        if keys is None:
            return batch
        columns = {name: listed(values) for name, values in batch.items() if not is_scalar(values)}
        return {**form.batches(columns, max(map(len, columns.values()))).whole(), **single}
    texts = batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[0], str) else batch
    if not isinstance(texts, tuple | list) or not texts or not isinstance(texts[0], str):
        return batch
    columns = {"text": list(texts)} if texts is batch else {"text": list(texts), "labels": listed(batch[1])}
    return form.batches(columns, len(texts)).whole()


class _Stream:
    """Batches of a data set that is only read in its order. rank, world: as for :class:`.rows.RowBatches`."""

    def __init__(self, data: Any, form: _Form, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.data, self.form, self.batch_size, self.rank, self.world = data, form, batch_size, rank, world

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        rows = iter(self.data)
        while part := list(islice(rows, self.batch_size * self.world)):
            yield self._batch([part[i] for i in share_of(range(len(part)), self.rank, self.world)])

    def sample(self) -> Any:
        """The first row as a batch, which stays to be read; None where there is none."""
        rows = iter(self.data)
        first = list(islice(rows, 1))
        if rows is self.data:
            self.data = chain(first, rows)
        return self._batch(first) if first else None

    def _batch(self, rows: list[Any]) -> Any:
        return self.form.batches(of_rows(rows, self.form.who), len(rows)).whole()


def first_batches(loader: Any, count: int) -> tuple[list[Any], Any]:
    """(up to ``count`` of a loader, of :func:`training_data`; what to read all of it from). One that can be read only
    once begins again with those.
    """
    batches = iter(loader)
    first = list(islice(batches, count))
    once = isinstance(loader.data if isinstance(loader, _Stream) else loader, Iterator)
    return first, chain(first, batches) if once else loader


def check_same_rows(loader: Any, processes: Processes, who: str, device: torch.device) -> None:
    """ValueError, on every process, where ``loader`` (of :func:`training_data`) is made of rows that are not the same
    everywhere: a share of a share would be trained on. device: the one that the processes exchange tensors of.
    """
    if processes.size == 1:
        return
    seen, failed = -1, None
    try:
        if isinstance(loader, RowBatches | _Stream):
            seen = _digest(loader)
    except Exception as error:  # raised below, when the others know
        seen, failed = -2, error
    low, high = processes.extremes(seen, device)
    if failed is not None:
        raise failed
    if low != high:
        raise ValueError(
            f"{who}: rows are shared among the {processes.size} processes, expected the same ones in each, got others; "
            "pass all rows everywhere, or to each process a DataLoader of its own share"
        )


def _digest(loader: RowBatches | _Stream) -> int:
    """48 bits, exact in float64, that hang on some of the rows and on how many there are."""
    sha = hashlib.sha256(str(len(loader) if isinstance(loader, RowBatches) else 0).encode())
    sample = loader.sample(_SAMPLE) if isinstance(loader, RowBatches) else loader.sample()
    moved(sample, lambda part: sha.update(part.detach().cpu().double().contiguous().numpy().tobytes()))
    return int(sha.hexdigest()[:12], 16)
