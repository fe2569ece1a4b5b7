"""A program in use gives way where a function that its layers call is replaced, and comes back with it."""

from __future__ import annotations

import functools
import importlib

import decoder_models
import pytest
import stack_models
import torch
from torch import nn

from sparseprune import _native
from sparseprune.nn.stacks import drop_stacks_, stack_of
from sparseprune.nn.stacks.functions import CalledFunctions

pytestmark = pytest.mark.skipif(_native.C is None, reason="programs need the compiled core")


def scaled(function):
    """The function, its first result times 1.5."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        found = function(*args, **kwargs)
        return (1.5 * found[0], *found[1:]) if isinstance(found, tuple) else 1.5 * found

    return call


LLAMA = "transformers.models.llama.modeling_llama"
CASES = [
    ("llama", "sdpa", LLAMA, "apply_rotary_pos_emb"),
    ("llama", "sdpa", LLAMA, "rotate_half"),
    ("llama", "sdpa", "torch.nn.functional", "scaled_dot_product_attention"),
    ("llama", "eager", LLAMA, "eager_attention_forward"),
    ("llama", "eager", LLAMA, "repeat_kv"),
    ("qwen3", "sdpa", "transformers.models.qwen3.modeling_qwen3", "apply_rotary_pos_emb"),
    ("phi", "sdpa", "transformers.models.phi.modeling_phi", "rotate_half"),
    ("neox", "sdpa", "transformers.models.gpt_neox.modeling_gpt_neox", "apply_rotary_pos_emb"),
    ("gpt2", "eager", "transformers.models.gpt2.modeling_gpt2", "eager_attention_forward"),
]


@pytest.mark.parametrize(("name", "attention", "module", "function"), CASES, ids=lambda value: value.split(".")[-1])
def test_a_decoder_sees_a_function_that_is_replaced(name, attention, module, function, monkeypatch):
    pytest.importorskip("transformers")
    model = decoder_models.sparse(name, attention=attention)
    plain, stack = decoder_models.undone(model), stack_of(decoder_models.body(model))
    ids, place = decoder_models.prompts()["input_ids"], importlib.import_module(module)

    def both(each):
        given = each(ids, use_cache=True)
        return given.logits, each(ids[:, :1], past_key_values=given.past_key_values).logits

    with torch.no_grad():
        before = both(model)
        assert stack.why_not(ids) is None
        with monkeypatch.context() as replaced:
            replaced.setattr(place, function, scaled(getattr(place, function)))
            found, expected = both(model), both(plain)
            assert "differ" in stack.why_not(ids)
            assert not any(torch.allclose(one, other, atol=1e-3) for one, other in zip(expected, before))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both(model), before, rtol=1e-4, atol=1e-4)
        assert stack.why_not(ids) is None


@pytest.mark.parametrize(("name", "module", "function"), [
    ("bert", "transformers.models.bert.modeling_bert", "apply_chunking_to_forward"),
    ("bert", "transformers.models.bert.modeling_bert", "BertLayer.feed_forward_chunk"),
    ("modernbert", "transformers.models.modernbert.modeling_modernbert", "rotate_half"),
    ("torch batch", "torch.nn", "TransformerEncoderLayer._ff_block"),
])  # fmt: skip
def test_an_encoder_sees_a_function_or_a_method_that_is_replaced(name, module, function, monkeypatch):
    if name != "torch batch":
        pytest.importorskip("transformers")
    model, ids = stack_models.sparse(name), stack_models.tokens(2, 9)
    place = importlib.import_module(module)
    *owner, function = function.split(".")
    place = getattr(place, owner[0]) if owner else place
    # torch runs whole layers by an op of its own, past their methods, where no gradient is wanted
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    call = stack_models.body(model, name)
    with torch.no_grad():
        before = call(ids)
        with monkeypatch.context() as replaced:
            replaced.setattr(place, function, scaled(getattr(place, function)))
            found = call(ids)
            drop_stacks_(model)
            torch.testing.assert_close(found, call(ids), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, before, atol=1e-3)


def test_a_replacement_that_computes_the_same_keeps_the_program(monkeypatch):
    pytest.importorskip("transformers")
    model, ids = decoder_models.sparse("llama"), decoder_models.prompts()["input_ids"]
    stack, place = stack_of(decoder_models.body(model)), importlib.import_module(LLAMA)
    rotate, calls = place.rotate_half, []
    with torch.no_grad():
        model(ids)
        monkeypatch.setattr(place, "rotate_half", lambda x: calls.append(x) or rotate(x))
        assert stack.why_not(ids) is None and calls  # they were proven anew
        calls.clear()
        model(ids, use_cache=False)
        model(ids, use_cache=False)
        assert stack.why_not(ids) is None


def test_functions_that_are_replaced_again_and_again_leave_the_stack_to_its_layers(monkeypatch):
    pytest.importorskip("transformers")
    model, ids = decoder_models.sparse("llama"), decoder_models.prompts()["input_ids"]
    stack, place = stack_of(decoder_models.body(model)), importlib.import_module(LLAMA)
    rotate = place.rotate_half
    bound = []
    bind = type(stack)._bind
    monkeypatch.setattr(type(stack), "_bind", lambda *args: bound.append(args) or bind(*args))
    with torch.no_grad():
        before = model(ids).logits
        for _ in range(12):
            monkeypatch.setattr(place, "rotate_half", lambda x: rotate(x))  # a new one each time
            torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
        assert len(bound) < 10 and "time and again" in stack.why_not(ids)
        # now and then is another matter
        model = decoder_models.sparse("llama")
        stack = stack_of(decoder_models.body(model))
        for _ in range(10):
            monkeypatch.setattr(place, "rotate_half", lambda x: rotate(x))
            for _ in range(17):
                model(ids)
        assert stack.why_not(ids) is None


class Layer(nn.Module):
    def forward(self, x):
        return [nn.functional.relu(self.scaled(one)) for one in x]

    def scaled(self, x):
        return helper(x)


def helper(x):
    return inner(x)


def inner(x):
    return x


@pytest.mark.parametrize(("place", "name"), [
    (None, "helper"), (None, "inner"), (Layer, "scaled"), (Layer, "forward"), (nn.functional, "relu"),
])  # fmt: skip
def test_every_name_on_the_way_is_known(place, name, monkeypatch):
    called = CalledFunctions([Layer, nn.ReLU], [helper])
    assert called.same()
    space = Layer.forward.__globals__
    with monkeypatch.context() as replaced:
        if place is None:
            replaced.setitem(space, name, lambda x: x)
        else:
            replaced.setattr(place, name, lambda *args: args[0])
        assert not called.same()
    assert called.same()
    with monkeypatch.context() as gone:
        gone.delitem(space, name) if place is None else gone.delattr(place, name)
        assert not called.same()
