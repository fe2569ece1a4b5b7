from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseprune.nn.filters import prunable_linears, select_linears, take_slow_path_


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.out = nn.Linear(6, 11, bias=False)
        self.out.weight = self.tokens.weight
        self.again = nn.Linear(6, 6)
        self.alias = self.again


def test_tied_weights_stay_and_a_shared_module_counts_once():
    selection = select_linears(Tied())
    assert list(selection.selected) == ["body", "again"]
    assert "tied to 'tokens'" in selection.skipped["out"]


def test_a_weight_tied_by_memory_alone_is_found():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())
    assert list(prunable_linears(model)) == ["c"]


def test_heads_stay():
    head = nn.ModuleDict({"dense": nn.Linear(4, 4), "out_proj": nn.Linear(4, 2)})
    model = nn.ModuleDict({"attention": nn.ModuleDict({"out_proj": nn.Linear(4, 4)}), "classifier": head})
    assert list(prunable_linears(model)) == ["attention.out_proj", "classifier.dense"]
    for name in ("classifier", "score", "lm_head", "qa_outputs"):
        model = nn.ModuleDict({"body": nn.Linear(4, 4), name: nn.Linear(4, 2)})
        assert list(prunable_linears(model)) == ["body"]


def test_output_embeddings_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.readout = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.readout

    assert list(prunable_linears(Model())) == ["body"]


def test_a_plain_sequential_has_no_head_and_a_linear_is_its_own_model():
    assert list(prunable_linears(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))) == ["0", "2"]
    linear = nn.Linear(3, 4)
    assert prunable_linears(linear) == {"": linear}


def test_filter_fn_replaces_the_default_and_is_asked_about_linears_only():
    seen = []

    def only_the_head(module, fqn):
        seen.append(module)
        return fqn == "classifier"

    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    assert list(prunable_linears(model, only_the_head)) == ["classifier"]
    assert all(isinstance(module, nn.Linear) for module in seen)


def test_of_two_selected_linears_with_one_weight_the_second_is_left_out():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    selection = select_linears(model, lambda module, fqn: True)
    assert list(selection.selected) == ["a"] and "shares its weight with 'a'" in selection.skipped["b"]


def test_nothing_selected_lists_the_candidates():
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"nothing selected in ModuleDict.*\n  body: filter_fn said no\n  classifier"):
        prunable_linears(model, lambda module, fqn: False)
    with pytest.raises(ValueError, match=r"has no nn\.Linear"):
        prunable_linears(nn.Sequential(nn.ReLU()))


def test_what_cannot_be_pruned_is_left_out_whatever_the_filter_says():
    model = nn.ModuleDict({
        "plain": nn.Linear(4, 4), "lazy": nn.LazyLinear(4), "meta": nn.Linear(4, 4, device="meta"),
        "normed": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "attention": nn.MultiheadAttention(4, 2),
    })  # fmt: skip
    selection = select_linears(model, lambda module, fqn: True)
    assert list(selection.selected) == ["plain"]
    assert set(selection.skipped) == {"lazy", "meta", "normed", "attention.out_proj"}


@pytest.mark.parametrize("padded", [False, True])
def test_transformer_encoder_calls_its_linears_in_eval_once_told_to(close, padded):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    names = list(prunable_linears(model))
    assert names == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    x = torch.randn(3, 5, 8)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padded else None
    with torch.inference_mode():
        before = model(x, src_key_padding_mask=padding)
        calls = []
        # Counted through forward itself: a hook alone would already turn the fused path off.
        for fqn, module in prunable_linears(model).items():
            forward = module.forward
            module.forward = lambda t, f=forward, n=fqn: (calls.append(n), f(t))[1]
        model(x, src_key_padding_mask=padding)
        assert calls == []
        assert take_slow_path_(model) == ["layers.0", "layers.1"]
        after = model(x, src_key_padding_mask=padding)
    assert calls == names
    real = slice(None) if padding is None else ~padding
    close(after[real], before[real])
