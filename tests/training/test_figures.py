"""The figures of a model on labelled data, against torch's own over all rows at once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sparseprune.training import compare, evaluate, predictions


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return nn.Linear(4, 3), torch.randn(50, 4), torch.randint(0, 3, (50,))


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_loss_that_weights_classes_is_the_same_in_any_batches(rows, size, ignored):
    model, x, y = rows
    if ignored:
        y[::3] = -100
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.0]))
    with torch.no_grad():
        wanted = float(loss(model(x), y))
    assert evaluate(model, batches(x, y, size), loss)["loss"] == pytest.approx(wanted, rel=1e-5)


def test_rows_that_are_ignored_are_no_predictions(rows):
    model, x, y = rows
    y[::3] = -100
    logits, targets = predictions(model, batches(x, y, 7))
    assert torch.equal(targets, y[y != -100]) and len(logits) == len(targets)
    with torch.no_grad():
        every, kept = model(x), model(x[y != -100])
    found = compare(every, every + torch.randn(50, 3), y)
    assert found["accuracy"] == pytest.approx(evaluate(model, batches(x, y, 7))["accuracy"])
    assert compare(every, every, y) == pytest.approx(compare(kept, kept, y[y != -100]))
    with pytest.raises(ValueError, match="predictions: the loader is empty"):
        predictions(model, [])


def test_compare_refuses_what_it_would_spread_or_not_count():
    logits, targets = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for student, teacher, labels in (
        (logits, logits[:1], targets), (logits, logits[:, :2], targets), (logits, logits, targets[:1]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected logits \[M, C\], as many of the teacher, and targets"):
            compare(student, teacher, labels)
    with pytest.raises(ValueError, match="a labelled row or more, got none"):
        compare(logits, logits, torch.full((4,), -100))
    with pytest.raises(ValueError, match="teacher expected numbers, got NaN"):
        compare(logits, logits * math.nan, targets)
    with pytest.raises(ValueError, match="bins expected at least 1, got 0"):
        compare(logits, logits, targets, bins=0)


def test_a_class_that_both_models_rule_out_adds_nothing_to_kl():
    student, teacher, targets = torch.randn(8, 3), torch.randn(8, 3), torch.randint(0, 3, (8,))
    out = torch.full((8, 1), -math.inf)
    found = compare(torch.cat([student, out], 1), torch.cat([teacher, out], 1), targets)
    assert found["kl"] == pytest.approx(compare(student, teacher, targets)["kl"], rel=1e-5)
    wanted = F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_label_that_the_model_has_no_output_for_is_named(rows):
    model, x, y = rows
    y[0] = -101  # becomes -100
    with pytest.raises(ValueError, match=r"labels: expected classes from 0 to 2, .* got from 1 to 3; number them so"):
        evaluate(model, [(x, y + 1)])
