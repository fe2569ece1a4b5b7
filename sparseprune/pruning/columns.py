"""Users' rows, whatever holds them, as columns: a name -> the values of all rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from numbers import Number
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from .batches import LABELS
from .rows import listed

__all__ = [
    "FORMS", "POSITIONAL", "TEXT_COLUMNS", "check_data", "columns_of", "is_batch", "is_row", "is_scalar", "is_stream",
    "of_rows", "strings", "text_columns",
]  # fmt: skip

#: Names of columns that hold a text, or two texts.
TEXT_COLUMNS = (
    ("text",), ("sentence",), ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question", "answer"),
)  # fmt: skip
#: What data may be, for messages.
FORMS = "a datasets.Dataset, a list of dicts, (texts, labels), a DataLoader or another iterable of batches"
#: The column of models that are called with one tensor.
POSITIONAL = "(inputs)"
_PAIR = ("text_a", "text_b")


def check_data(data: Any, tokenizer: Any, who: str) -> None:
    if tokenizer is not None and not callable(tokenizer):
        remedy = "; PreTrainedTokenizerFast(tokenizer_object=...) makes one" if hasattr(tokenizer, "encode") else ""
        got = f"{type(tokenizer).__name__}{remedy}"
        raise ValueError(f"{who}: tokenizer expected one of transformers, called with texts, got {got}")
    if isinstance(data, str | bytes):
        raise ValueError(f"{who}: data expected a list of texts, got one {type(data).__name__}; pass [text]")
    if isinstance(data, set | frozenset):
        raise ValueError(f"{who}: data expected an order, got a {type(data).__name__}; pass a list")
    if data is not None and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        got = f"a function, {getattr(data, '__name__', '')}; call it" if callable(data) else type(data).__name__
        raise ValueError(f"{who}: data expected {FORMS}, got {got}")
    splits = data if isinstance(data, Mapping) else {}
    if splits and all(hasattr(split, "column_names") for split in splits.values()):
        raise ValueError(
            f"{who}: data expected one split, got several ({', '.join(map(str, splits))}); pass "
            f"data[{next(iter(splits))!r}]"
        )


def is_stream(data: Any) -> bool:
    """Whether these are rows that only come in their order, as of datasets with streaming=True."""
    if isinstance(data, IterableDataset) and not hasattr(data, "__len__") and not isinstance(data, Iterator):
        return any(is_row(row) for row in islice(iter(data), 1))
    return not hasattr(data, "__len__") and hasattr(data, "column_names") and hasattr(data, "features")


def columns_of(data: Any, who: str, training: bool = False) -> dict[str, list[Any]] | None:
    """Column name -> values, where the data are rows; None where they are batches."""
    if getattr(data, "ndim", None) == 1 and hasattr(data, "tolist") and not isinstance(data, Tensor):
        data = listed(data)  # an array or a Series
    if isinstance(data, Mapping):
        single = [name for name, values in data.items() if is_scalar(values)]
        if single:
            raise ValueError(
                f"{who}: data expected columns of values, got a single one in {single[0]!r}; pass [row], or of a batch "
                "[batch]"
            )
        return {name: listed(values) for name, values in data.items()}
    names = getattr(data, "column_names", None)
    if isinstance(names, list | tuple) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return {name: listed(data[name]) for name in names}
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        return {str(name): listed(data[name]) for name in data.columns}
    if is_stream(data):
        return of_rows(list(data), who)
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")  # which torch's Dataset alone does not say
    if sized and not isinstance(data, tuple | Dataset) and _is_text(data):
        data = list(data)  # a column of texts
    if isinstance(data, tuple) and len(data) == 2 and _paired(data, training):
        if not len(data[0]):
            raise ValueError(f"{who}: data is empty; expected a row or more")
        if len(data[0]) != len(data[1]):
            raise ValueError(f"{who}: data expected as many labels as inputs, got {len(data[0])} and {len(data[1])}")
        inputs, labels = (listed(part) for part in data)
        made = _of_texts(inputs, who) if _is_text(data[0]) else {POSITIONAL: inputs}
        return {**made, "labels": labels}
    if isinstance(data, list | tuple):
        return of_rows(list(data), who) if data and is_row(data[0]) else None
    rows = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    if (rows or not hasattr(data, "__iter__")) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return of_rows([data[i] for i in range(len(data))], who)
    return None


def _paired(data: tuple[Any, Any], training: bool) -> bool:
    """Whether two things are (inputs, labels) rather than two batches."""
    inputs, labels = data
    if not hasattr(inputs, "__len__") or not hasattr(labels, "__len__") or isinstance(labels, str | Mapping):
        return False
    if _is_text(inputs):
        return True
    if not training or isinstance(inputs, str | Mapping):
        return False
    if not len(inputs):
        return not len(labels)
    numbers = _is_array(labels) or (isinstance(labels, list) and bool(labels) and _is_number(labels[0]))
    whole = isinstance(inputs, Tensor) and isinstance(labels, list)
    return _dims(inputs) > 1 and (numbers or whole)


def _is_text(inputs: Any) -> bool:
    """Texts, or pairs of texts."""
    if isinstance(inputs, str | Mapping) or not hasattr(inputs, "__iter__") or not len(inputs):
        return False
    first = next(iter(inputs))
    pair = isinstance(first, tuple | list) and len(first) == 2 and all(isinstance(part, str) for part in first)
    return isinstance(first, str) or pair


def is_row(item: Any) -> bool:
    """Whether an entry of a list is one example, not a batch."""
    if isinstance(item, str):
        return True
    if isinstance(item, tuple) and len(item) == 2:
        return isinstance(item[0], str) or _is_number(item[1])
    if not isinstance(item, Mapping):
        return False
    if (keys := text_columns(item)) is not None and isinstance(item[keys[0]], str):
        return True
    label = next((item[name] for name in LABELS if name in item), None)
    if label is not None and is_scalar(label):
        return True
    if "input_ids" in item:
        return _dims(item["input_ids"]) == 1
    if label is not None:
        return False
    return not _all_tensors(item) and not any(isinstance(v, list) and v and _dims(v[0]) > 0 for v in item.values())


def is_scalar(value: Any) -> bool:
    """Whether this is one value, not one for each row."""
    return isinstance(value, str) or not hasattr(value, "__len__") or getattr(value, "ndim", 1) == 0


def is_batch(data: Any) -> bool:
    """Whether this is a dict of tensors, and of single numbers beside them."""
    if not isinstance(data, Mapping):
        return False
    tensors = [value for value in data.values() if isinstance(value, Tensor) and value.dim() > 0]
    rest = [value for value in data.values() if not isinstance(value, Tensor)]
    return bool(tensors) and all(value is None or isinstance(value, Number) for value in rest)


def _is_number(value: Any) -> bool:
    return isinstance(value, Number) or getattr(value, "ndim", None) == 0


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and hasattr(value, "ndim"))


def _dims(value: Any) -> int:
    if isinstance(value, list | tuple):
        return 1 + (_dims(value[0]) if value and not isinstance(value[0], str) else 0)
    return int(getattr(value, "ndim", 0))


def _all_tensors(item: Mapping[str, Any]) -> bool:
    return bool(item) and all(isinstance(value, Tensor) for value in item.values())


def of_rows(rows: Sequence[Any], who: str) -> dict[str, list[Any]]:
    """Rows that are dicts of the same keys, texts, ``(text, label)`` or ``(inputs, label)``."""
    if not rows:
        raise ValueError(f"{who}: data is empty; expected a row or more")
    kinds = [Mapping if isinstance(row, Mapping) else str if isinstance(row, str) else type(row) for row in rows]
    other = next((number for number, kind in enumerate(kinds) if kind is not kinds[0]), None)
    if other is not None:
        raise ValueError(
            f"{who}: data expected rows of one kind, got {kinds[0].__name__} in row 0 and {kinds[other].__name__} in "
            f"row {other}; leave out the rows that have none"
        )
    first = rows[0]
    if isinstance(first, Mapping):
        for number, row in enumerate(rows):
            if row.keys() != first.keys():
                raise ValueError(
                    f"{who}: data expected rows with the same keys, got {sorted(first)} in row 0 and {sorted(row)} in "
                    f"row {number}"
                )
        return {str(name): [row[name] for row in rows] for name in first}
    if isinstance(first, str):
        return {"text": list(rows)}
    if isinstance(first, Tensor):
        return {POSITIONAL: list(rows)}
    if isinstance(first, tuple) and len(first) == 1:  # of a TensorDataset without labels
        return {POSITIONAL: [row[0] for row in rows]}
    if isinstance(first, tuple | list) and len(first) == 2:
        if isinstance(first[0], str) and isinstance(first[1], str):
            raise ValueError(
                f"{who}: data expected texts with numbers as labels, got rows of two texts; is the second one a label? "
                f"pass {{'text': [...], 'label': [...]}}, or of pairs {{'{_PAIR[0]}': [...], '{_PAIR[1]}': [...]}}"
            )
        name = "text" if isinstance(first[0], str) else POSITIONAL
        return {name: [row[0] for row in rows], "labels": [row[1] for row in rows]}
    raise ValueError(f"{who}: data expected {FORMS}, got rows of type {type(first).__name__}")


def _of_texts(rows: Sequence[Any], who: str) -> dict[str, list[Any]]:
    """Texts, or pairs of texts."""
    if isinstance(rows[0], str):
        return {"text": list(rows)}
    if any(not isinstance(row, tuple | list) or len(row) != 2 for row in rows):
        raise ValueError(f"{who}: data expected one text or pairs of texts, got both")
    return {name: [row[i] for row in rows] for i, name in enumerate(_PAIR)}


def text_columns(columns: Mapping[str, list[Any]]) -> tuple[str, ...] | None:
    """The columns that hold text, by :data:`TEXT_COLUMNS`."""
    return next((keys for keys in TEXT_COLUMNS if all(key in columns for key in keys)), None)


def strings(values: Iterable[Any], who: str) -> Iterator[str]:
    for number, value in enumerate(values):
        if not isinstance(value, str):
            got = type(value).__name__
            raise ValueError(f"{who}: expected a text, got {got} in row {number}; leave the row out, or give it a text")
        yield value
