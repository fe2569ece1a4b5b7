"""What is no calibration data is refused, with what was expected, before a weight is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparseprune.pruning import prune_
from sparseprune.pruning.reading import collect_inputs
from sparseprune.runner.text_encoder import TextEncoder


def features():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def encoder():
    torch.manual_seed(0)
    return TextEncoder(30, 3, hidden=16, ffn=32, layers=1, heads=2)


class Rows:
    """Rows of a datasets.Dataset: dicts of lists."""

    def __iter__(self):
        return iter([{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}] * 32)


def spent():
    batches = (torch.randn(8, 16) for _ in range(4))
    list(batches)
    return batches


def refused(model, data, match):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=match):
        prune_(model, 0.5, "wanda", data=data)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ("some text", r"expected a list of texts, got one str; pass \[text\]"),
        (["some", "text"], r"data holds text \(text\), which needs the model's tokenizer; pass tokenizer="),
        (np.ones((64, 16), np.complex64), "got ndarray; torch.from_numpy"),
        ([np.ones((64, 16), np.complex64)], "got ndarray; torch.from_numpy"),
        ([[1, 2], [3, 4]], r"got int; torch.tensor .* \[N, S\] of integers"),
        (5, r"data expected a datasets.Dataset, .* or another iterable of batches, got int"),
        (Rows(), r"a batch dict expected tensors, got \{input_ids: list, .*DataLoader\(dataset.with_format"),
        ([], "data is empty; .*an iterator that was read before has nothing left: pass a list"),
    ],
)
@pytest.mark.parametrize("model", [features, encoder])
def test_things_that_are_no_batches(model, data, match):
    refused(model(), data, match)


def test_a_generator_that_was_read_before():
    refused(features(), spent(), "an iterator that was read before has nothing left: pass a list")


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (torch.rand(8, 16), r"torch.float32 \[8, 16\]"), (torch.randint(0, 30, (2, 8, 8)), r"torch.int64 \[2, 8, 8\]"),
        (torch.ones(8, 16, dtype=torch.bool), "torch.bool"),
        (torch.zeros(8, 16, dtype=torch.complex64), "torch.complex64"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [lambda x: x, lambda x: [x], lambda x: {"input_ids": x}])
def test_token_ids_are_integers_with_a_batch_axis(ids, got, shape):
    refused(encoder(), shape(ids), rf"token ids expected integers \[B, S\], got {got}.*; use ids.long\(\)")


def test_rows_of_a_dataset_are_put_into_batches():
    rows, whole = encoder(), encoder()
    prune_(rows, 0.5, "wanda", data=[{"input_ids": torch.tensor([1, 2, 3])}] * 32)
    prune_(whole, 0.5, "wanda", data=[{"input_ids": torch.tensor([[1, 2, 3]] * 8)}] * 4)
    assert all(torch.equal(p, q) for p, q in zip(rows.parameters(), whole.parameters()))


IDS = torch.randint(2, 30, (16, 8), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(8) < torch.arange(16)[:, None] % 7 + 2).long()
LABELS = torch.arange(16) % 2
ZEROS_AND_ONES = r"expected targets, got zeros and ones \[.*\], as an attention mask has.*pass dicts, \{.input_ids"
ENTRIES = r"a batch expected .*\(inputs, targets\), got 3 entries; .*pass dicts, \{.input_ids"


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (DataLoader(TensorDataset(IDS, MASK, LABELS), batch_size=8), ENTRIES),
        ([(IDS, MASK, LABELS)], ENTRIES),
        ([(IDS.numpy(), MASK.numpy(), LABELS.numpy())], ENTRIES),
        (DataLoader(TensorDataset(IDS, MASK), batch_size=8), ZEROS_AND_ONES),
        ([(IDS, MASK.bool())], ZEROS_AND_ONES),
        (TensorDataset(IDS, MASK), ZEROS_AND_ONES),
        ((IDS, MASK), ZEROS_AND_ONES),
        ((IDS, MASK, LABELS), ZEROS_AND_ONES),
    ],
)
def test_a_mask_beside_the_ids_is_refused_where_it_would_be_lost(data, match):
    refused(encoder(), data, match)
    with pytest.raises(ValueError, match=match):
        collect_inputs(encoder(), ["layers.0.query"], data)


@pytest.mark.parametrize("labels", [LABELS, IDS, MASK.float(), MASK[:, :4]])
def test_labels_beside_the_ids_are_left_out(labels):
    model, other = encoder(), encoder()
    prune_(model, 0.5, "wanda", data=[(IDS, labels)])
    prune_(other, 0.5, "wanda", data=[IDS])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
