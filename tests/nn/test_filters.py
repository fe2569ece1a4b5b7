from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import sparseprune as sp
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


@pytest.mark.parametrize("tie", [lambda weight: weight, lambda weight: nn.Parameter(weight.detach())])
def test_of_two_selected_linears_with_one_weight_the_second_is_left_out(tie):
    """One parameter, or two over one memory."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = tie(model["a"].weight)
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


def two():
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(6, 6)})


def with_weight(weight):
    model = two()
    model["a"].weight = nn.Parameter(weight(model["a"].weight.detach()), requires_grad=False)
    return model


def without_bias():
    model = two()
    del model["a"].bias
    return model


def flattened():
    model = two()
    weight = model["a"].weight.detach()
    del model["a"].weight
    model["a"].__dict__["weight"] = weight
    return model


class Wrapped(torch.Tensor):
    """A tensor subclass that holds another, as quantised and sharded weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: with_weight(lambda w: w.to_sparse_csr()), r"stored as torch.sparse_csr, expected dense; .*to_dense"),
        (lambda: with_weight(Wrapped), "is a Wrapped, no plain tensor; prune before quantising or sharding"),
        (lambda: with_weight(lambda w: w.to(torch.complex128)), "torch.complex128, not floating point$"),
        (lambda: with_weight(lambda w: w.to(torch.uint8)), "torch.uint8, not floating point; prune before quantising"),
        (lambda: with_weight(lambda w: w.to(torch.float8_e4m3fn)), "torch.float8_e4m3fn, which has no arithmetic"),
        (lambda: with_weight(lambda w: w.flatten()[:7]), r"expected \[6, 4\], got \[7\], a shard perhaps; prune"),
        (lambda: with_weight(lambda w: w[:1].expand(6, 4)), "are one place in memory .*; clone it first"),
        (without_bias, "it has lost its bias .*; prune before wrapping"),
        (flattened, "a view into another parameter .*; prune before wrapping"),
    ],
)
def test_weights_that_are_no_plain_matrix_say_what_they_are(model, why):
    model = model()
    selection = select_linears(model, lambda module, fqn: True)
    assert list(selection.selected) == ["b"]
    assert re.search(why, selection.skipped["a"]), selection.skipped
    untouched = model["b"].weight.detach().clone()
    del model["b"]
    with pytest.raises(ValueError, match=r"none of these can be selected:\n  a: "):
        select_linears(model)
    assert untouched.ne(0).all()


def test_two_wrapped_weights_are_not_taken_for_tied():
    model = two()
    for layer in model.values():
        layer.weight = nn.Parameter(Wrapped(layer.weight.detach()), requires_grad=False)
    with pytest.raises(ValueError, match="a: its weight is a Wrapped") as error:
        select_linears(model)
    assert "tied" not in str(error.value)


def test_sparse_and_quantised_modules_are_named():
    model = two()
    sp.prune_(model, 0.5)
    sp.sparsify_(model, layout="csr", filter_fn=lambda module, fqn: fqn == "a")
    selection = select_linears(model)
    assert list(selection.selected) == ["b"]
    assert selection.skipped == {"a": "a SparseLinear already; densify_(model) gives it back its Linear"}
    sp.sparsify_(model, layout="csr")
    for again in (lambda: sp.prune_(model, 0.5), lambda: sp.sparsify_(model)):
        with pytest.raises(ValueError, match=r"2 Linears are sparse already; call densify_\(model\) first.*:\n  a: "):
            again()
    with_head = nn.ModuleDict({"a": model["a"], "classifier": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match="1 Linears are sparse already, the others are left out; call densify_"):
        sp.sparsify_(with_head)
    quantised = nn.Module()
    quantised.in_features, quantised._packed_params = 4, object()
    with pytest.raises(ValueError, match=r"0: torch.nn.modules.module.Module, quantised; prune before quantising"):
        select_linears(nn.Sequential(quantised))


def test_conv1d_without_linears_points_to_use_linears():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.nf, self.weight = 8, nn.Parameter(torch.randn(4, 8))

    found = r"has no nn\.Linear .*expose_linears_\(model\).*:\n  no Linear: \*\.weight: 2 x \[4, 8\] of Conv1D"
    with pytest.raises(ValueError, match=found):
        select_linears(nn.Sequential(Conv1D(), Conv1D()))
    head = nn.ModuleDict({"body": Conv1D(), "classifier": nn.Linear(8, 2)})
    with pytest.raises(ValueError, match=r"classifier: a head\n  no Linear: body\.weight: .*expose_linears_ gives it"):
        select_linears(head)


@pytest.mark.parametrize("wrong", ["a", ["a"], 3])
def test_a_filter_that_is_no_function_and_a_model_that_is_none(wrong):
    with pytest.raises(ValueError, match=r"filter_fn expected a function .* got .*; for name patterns pass .*matching"):
        sp.prune_(two(), 0.5, filter_fn=wrong)
    with pytest.raises(ValueError, match=r"expected an nn.Module, got OrderedDict"):
        sp.prune_(two().state_dict(), 0.5)


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


@pytest.mark.parametrize(
    "change, remedy",
    [
        (lambda linear: prune.l1_unstructured(linear, "weight", 0.9), r"torch\.nn\.utils\.prune\.remove\(layer"),
        (nn.utils.spectral_norm, "remove_spectral_norm"),
        (nn.utils.parametrizations.spectral_norm, r"remove_parametrizations\(layer"),
        (nn.utils.parametrizations.weight_norm, r"remove_parametrizations\(layer"),
    ],
)
@pytest.mark.parametrize("called", [False, True])
def test_a_weight_that_torch_computes_says_how_to_store_it(change, remedy, called):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    change(model[0])
    if called:
        model(torch.randn(2, 8))
    assert re.search(remedy, select_linears(model, lambda module, fqn: True).skipped["0"])
    with pytest.raises(ValueError, match=remedy):
        sp.sparsify_(model[:1], layout="csr")
