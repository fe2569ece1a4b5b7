"""The built-in encoder."""

from __future__ import annotations

import pytest
import torch

from sparseprune.runner.text_encoder import TextEncoder


def test_padding_changes_nothing():
    torch.manual_seed(0)
    model = TextEncoder(50, 3, hidden=32, ffn=64, layers=2, heads=2, max_length=12).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    padded = torch.tensor([[4, 5, 6, 7, 0, 0, 0]])
    mask = (padded != 0).long()
    torch.testing.assert_close(model(padded, mask), model(ids))
    torch.testing.assert_close(model(padded), model(ids))
    assert model(ids).shape == (1, 3)


def test_limits_are_said():
    model = TextEncoder(50, 3, hidden=32, ffn=64, layers=1, heads=2, max_length=4)
    with pytest.raises(ValueError, match=r"\[B, T <= 4\]"):
        model(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"in int64, the ids of tokens, got \[2, 3\] in torch.float32"):
        model(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"got \[2, 3, 4\]"):
        model(torch.ones(2, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="divide"):
        TextEncoder(50, 3, hidden=32, heads=5)
