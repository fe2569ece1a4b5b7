"""Prompts through a stack of decoder layers as one program: the same logits and cache as layer by layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from decoder_models import EVERY, VOCABULARY, body, make, sparse, undone
from stack_models import programs
from torch import Tensor

import sparseprune as sp
from sparseprune import _native, bench
from sparseprune.nn.stacks import decoder_proof, stack_of
from sparseprune.nn.stacks.masks import Unsupported, real_in_prompt
from sparseprune.packing import Kind

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")


def prompt(batch: int, length: int, padding: str = "none") -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch + length))
    real = torch.ones_like(ids)
    for i in range(batch if padding != "none" else 0):
        some = i * (length - 1) // batch
        real[i, slice(0, some) if padding == "left" else slice(length - some, length)] = 0
    return {"input_ids": ids, "attention_mask": real}


def caches(model, kind: str, length: int):
    from transformers import DynamicCache, StaticCache

    if kind == "static":
        return [StaticCache(config=model.config, max_cache_len=length + 5) for _ in range(2)]
    return [DynamicCache(config=model.config) if kind == "dynamic" else None for _ in range(2)]


@torch.no_grad()
def same(model, call: dict[str, Tensor], kind: str = "dynamic", tolerance: float = 1e-4) -> str | None:
    """Runs a prompt both ways, and a token behind it; returns why layers answered the prompt, None: they did not."""
    real = call["attention_mask"].bool()
    layers, (mine, theirs) = undone(model), caches(model, kind, real.shape[1])
    options = {"use_cache": kind != "none"}
    with programs(model) as notes:
        found = model(**call, **options, past_key_values=mine).logits
    answered = list(notes)
    expected = layers(**call, **options, past_key_values=theirs).logits
    near = {"rtol": tolerance, "atol": tolerance * max(1.0, float(expected.abs().max()))}
    torch.testing.assert_close(found[real], expected[real], **near)
    if mine is not None:
        assert int(mine.get_seq_length()) == int(theirs.get_seq_length()) == real.shape[1]
        for a, b in zip(mine.layers, theirs.layers, strict=True):
            for name in ("keys", "values"):
                one, two = (getattr(layer, name).transpose(1, 2)[:, : real.shape[1]] for layer in (a, b))
                there = real[:, -one.shape[1] :]  # fewer in a cache that slides
                torch.testing.assert_close(one[there], two[there], **near)
                assert answered != [None] or not bool(one[~there].any())
        more = torch.cat([call["attention_mask"], torch.ones(len(real), 1, dtype=torch.long)], 1)
        step = {"input_ids": call["input_ids"][:, -1:], "attention_mask": more}
        one, two = (m(**step, past_key_values=c).logits for m, c in ((model, mine), (layers, theirs)))
        torch.testing.assert_close(one, two, **near)
    (note,) = notes
    return note


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_architecture(name, attention):
    model = sparse(name, attention=attention)
    for batch, length, padding in ((1, 1, "none"), (1, 70, "none"), (3, 20, "none"), (3, 20, "left")):
        for kind in ("dynamic", "static", "none"):
            assert same(model, prompt(batch, length, padding), kind) is None, (batch, length, padding, kind)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_that_is_not_in_front_is_the_layers(attention):
    """They give its tokens hidden states of the tokens before, which heads read that know of no padding."""
    model = sparse("llama", attention=attention)
    reason = "there is padding behind a token of the prompt, whose hidden states may be read"
    assert same(model, prompt(3, 33, "right")) == reason
    hole = prompt(1, 9)
    hole["attention_mask"][0, 3] = 0
    assert same(model, hole) == reason
    expected = undone(model)(**hole).logits
    torch.testing.assert_close(model(**hole).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_dtype(dtype):
    """What the core writes is float32 whatever torch makes by default."""
    model, call = sparse("llama"), prompt(2, 20, "left")
    assert same(model, call) is None
    cold = copy.deepcopy(model)  # whose programs are made, and proven, by its first calls
    torch.set_default_dtype(dtype)
    try:
        assert same(model, call) is None
        assert same(cold, call) is None
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("when", ["call", "config before", "config behind", "another attention"])
@torch.no_grad()
def test_attention_that_sees_what_is_behind(when):
    model = make("llama", attention="eager" if when == "another attention" else "sdpa")
    if when == "config before":
        model.config.is_causal = False
    if when == "another attention":
        for layer in body(model).layers:
            layer.self_attn.is_causal = False
    sp.prune_(model, sparsity=0.5)
    sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program")
    ids = prompt(1, 30)["input_ids"]
    causal = model(ids).logits
    if when == "config behind":
        model.config.is_causal = False
    if when == "another attention":
        model.config._attn_implementation = "sdpa"
    options = {"is_causal": False} if when == "call" else {}
    with programs(model) as notes:
        found = model(ids, **options).logits
    expected = undone(model)(ids, **options).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "is_causal" in notes[0] or "differ by" in notes[0], notes
    assert when == "config before" or not torch.allclose(found, causal, atol=0.1)


def test_a_refusal_ends_with_its_cause():
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    for layer in body(model).layers:
        layer.self_attn.is_causal = False
    sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program")
    assert "differ by" in same(model, prompt(1, 20))
    for layer in body(model).layers:
        layer.self_attn.is_causal = True
    assert same(model, prompt(1, 20)) is None
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        body(model).layers[0].mlp.up_proj.values.fill_(float("nan"))
        model(prompt(1, 5)["input_ids"])
    assert "differ by nan" in stack_of(body(copy.deepcopy(model))).why_not(input_ids=prompt(1, 5)["input_ids"])
    model.load_state_dict(state)
    assert same(model, prompt(1, 20)) is None


def test_each_sequence_has_its_own_places():
    """Rotary tables of a batch whose sequences begin at different places."""
    model, call = sparse("llama"), prompt(3, 20, "left")
    places = (call["attention_mask"].cumsum(1) - 1).clamp_min(0)
    assert same(model, {**call, "position_ids": places}, "none") is None


def test_tokens_behind_others_are_no_prompt():
    from transformers import DynamicCache

    model, call = sparse("llama"), prompt(1, 40)
    mine, theirs, layers = DynamicCache(), DynamicCache(), undone(model)
    for begin, end in ((0, 20), (20, 40)):
        ids = call["input_ids"][:, begin:end]
        with torch.no_grad(), programs(model) as notes:
            found, expected = model(ids, past_key_values=mine).logits, layers(ids, past_key_values=theirs).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert notes == ["the call has 1 x 20 new tokens; the program takes 1 to 16"]


def test_a_window_shorter_than_the_prompt():
    model = sparse("mistral", window=14)
    assert same(model, prompt(2, 14)) is None
    assert "what a token sees depends on its place" in same(model, prompt(2, 30))


def test_masks_that_say_more():
    model, call = sparse("llama"), prompt(1, 8)
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    apart = causal.clone()
    apart[4:, :4] = False  # two texts, packed into one row
    for mask, expected in ((causal, None), (apart, "what a token sees depends"), (causal | True, "on its place")):
        layers = undone(model)
        with torch.no_grad(), programs(model) as notes:
            found = model(call["input_ids"], attention_mask=mask[None, None]).logits
        torch.testing.assert_close(found, layers(call["input_ids"], attention_mask=mask[None, None]).logits)
        assert notes == [None] if expected is None else expected in notes[0]


def test_a_sequence_of_padding_alone_is_the_layers():
    model, call = sparse("llama", attention="eager"), prompt(2, 6)
    call["attention_mask"][1] = 0
    assert same(model, call) in (
        "a sequence of the prompt is padding alone",
        "the mask of the prompt says more than padding: what a token sees depends on its place",
    )


def test_what_masks_say():
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert real_in_prompt(None, 2, 4) is None and real_in_prompt(causal[None, None], 2, 4) is None
    added = torch.zeros(2, 1, 4, 6).masked_fill(~torch.nn.functional.pad(causal, (0, 2))[None, None], float("-inf"))
    assert real_in_prompt(added, 2, 4, whole=True) is None
    with pytest.raises(Unsupported, match=r"shape \[2, 1, 4, 6\]"):
        real_in_prompt(added, 2, 4)  # places of a cache that is not there
    left = causal & torch.tensor([False, True, True, True])
    both = torch.stack([left, causal])[:, None]
    assert torch.equal(real_in_prompt(both, 2, 4), torch.tensor([[False, True, True, True], [True] * 4]))
    for wrong, match in (
        (torch.ones(2, 1, 4, 6, dtype=torch.bool), "its place"),  # sees places that are empty
        (added * 0 + 0.5, "more than 0 or minus infinity"),
        (causal[None], r"shape \[1, 4, 4\]"),
        (causal[None, None].long(), "dtype torch.int64"),
        (added.double(), "dtype torch.float64"),
        (causal & torch.tensor([True, True, False, True]), r"shape \[4, 4\]"),
        ((causal & torch.tensor([True, True, False, True]))[None, None], "padding behind a token"),
        (causal[None, None].expand(3, 1, 4, 4), r"shape \[3, 1, 4, 4\] for a prompt of 2 x 4"),
        ("mask", "the mask is str"),
    ):
        with pytest.raises(Unsupported, match=match):
            real_in_prompt(wrong, 2, 4, whole=True)


def test_forms_for_few_tokens_alone():
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    report = sp.sparsify_(model, layout="csr", tokens=(1,), engine="program")
    forms = {m._packed(m._forms.largest).plan.kind for m in model.modules() if isinstance(m, sp.SparseLinear)}
    reason = same(model, prompt(1, 20))
    if forms == {Kind.GROUPS}:  # this machine reads a token's weights in the form of many
        assert reason is None and report.stacks[0].prompts == "program"
    else:
        assert "tokens=(1, 128)) packs it for prompts too" in reason and reason in report.stacks[0].prompts
        assert f"its prompts: layers: {reason}" in str(report)


@pytest.mark.parametrize("exact", [True, False])
def test_packed_forms_alone(exact):
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    values = "float32" if exact else "bfloat16"
    sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program", keep="packed", value_dtype=values)
    held = sum(m.packed_nbytes for m in model.modules() if isinstance(m, sp.SparseLinear))
    assert same(model, prompt(2, 20, "left")) is None
    bound = stack_of(body(model)).prompts()
    places = {p.data_ptr() for m in model.modules() if isinstance(m, sp.SparseLinear) for p in
              (t for form in m.packed for t in (form.values, form.index))}  # fmt: skip
    weights = [bound.built.tensors[i] for w in bound.built.program.weights for i in (w.values, w.indices)]
    assert {t.data_ptr() for t in weights} <= places  # nothing was packed once more
    assert held == sum(m.packed_nbytes for m in model.modules() if isinstance(m, sp.SparseLinear))


def test_activations_in_8_bits():
    """Quads, which round a panel of features once for all that read it."""
    model = make("llama", layers=1)
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "self_attn" in fqn, granularity=sp.Block(1, 4))
    sp.sparsify_(
        model, layout="bsr", blocksize=(1, 4), tokens=(1, 64), engine="program", value_dtype="int8", activations="int8",
        filter_fn=lambda m, fqn: "self_attn" in fqn,
    )  # fmt: skip
    kinds = {w.plan.kind for w in stack_of(body(model)).prompts().built.program.weights}
    assert Kind.QUADS in kinds
    assert same(model, prompt(2, 20, "left"), tolerance=3e-2) is None


def test_new_weights_are_noticed():
    model, call = sparse("llama"), prompt(1, 20)
    assert same(model, call) is None
    down = body(model).layers[1].mlp.down_proj
    with torch.no_grad():
        down.values.mul_(-2)
    assert same(model, call) is None
    body(model).layers[0].input_layernorm.weight.data = body(model).layers[0].input_layernorm.weight.data * 3
    assert same(model, call) is None
    mixed = make("llama")
    sp.prune_(mixed, sparsity=0.5, filter_fn=lambda m, fqn: "q_proj" in fqn)
    sp.sparsify_(mixed, layout="csr", engine="program", filter_fn=lambda m, fqn: "q_proj" in fqn)
    assert same(mixed, call) is None
    up = body(mixed).layers[1].mlp.up_proj.weight
    up.data = up.data * 3  # dense: read where it lies, and it lies elsewhere now
    assert same(mixed, call) is None
    up.data.mul_(2)
    assert same(mixed, call) is None


def test_prompts_that_are_faster_by_layers(monkeypatch):
    """By a measurement: kept with copies, and told."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5)

    def slower(candidates, *, tokens, **options):
        for name in candidates:
            candidates[name](tokens[0])()
        faster = tokens[0] <= 8
        ratios = {"program": dict.fromkeys(tokens, 2.0 if faster else 0.5)}
        return bench.Choice("program" if faster else "layers", 2.0 if faster else 1.0, "measured", ratios, {})

    monkeypatch.setattr(bench, "choose_fastest", slower)
    from sparseprune.nn.stacks import use_stacks_

    sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="layers")
    (choice,) = use_stacks_(model, "auto", (1, 64))
    assert choice.engine == "program" and choice.prompts == "layers: measured"
    reason = "prompts run layer by layer: measured"
    assert same(model, prompt(1, 20)) == same(model, prompt(1, 5)) == reason
    assert stack_of(body(copy.deepcopy(model))).by_layers == reason
    assert stack_of(body(pickle.loads(pickle.dumps(model)))).by_layers == reason


@pytest.mark.parametrize("kind", ["dynamic", "static", "no config"])
def test_a_forward_that_asks_a_layer_again_is_the_layers(kind):
    """Behind the last layer the program has filled the cache already: it is then as empty as before."""
    from transformers import DynamicCache

    model = sparse("llama")
    inner = body(model)

    class Twice(type(inner)):
        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            if kwargs["past_key_values"] is mine:
                self.layers[0](result.last_hidden_state)
            return result

    inner.__class__ = Twice
    mine, theirs = caches(model, kind, 6) if kind != "no config" else (DynamicCache(), DynamicCache())
    ids = prompt(1, 6)["input_ids"]
    with torch.no_grad(), programs(model) as notes:
        body(undone(model))(input_ids=ids, past_key_values=theirs)
        with pytest.raises(TypeError):  # the layer itself gets less than it needs: the class's own error
            inner(input_ids=ids, past_key_values=mine)
    assert "more between two layers" in notes[0]
    assert int(mine.get_seq_length()) == 6  # once: the layers' own call has gone through all but the last line
    for one, two in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-4)


def test_gradients_and_training():
    model, ids = sparse("llama"), prompt(1, 20)["input_ids"]
    stack = stack_of(body(model))
    assert stack.why_not(input_ids=ids) is None
    assert "one native call of" in sp.explain(body(model), input_ids=ids)
    model.requires_grad_(True)
    assert stack.why_not(input_ids=ids) == "a gradient is needed"
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert body(model).layers[0].mlp.up_proj.values.grad is not None
    model.requires_grad_(False).train()
    assert "training" in stack.why_not(input_ids=ids)


def test_layers_that_do_something_else_have_no_program(monkeypatch):
    """What the proof of prompts refuses leaves tokens to their program, and names itself."""
    monkeypatch.setattr(decoder_proof, "_PROMPTS", ((1, 1), (1, 7)))
    model = make("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False  # without a mask a token sees what is behind it
    sp.prune_(model, sparsity=0.5)
    (choice,) = sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program").stacks
    assert choice.engine == "program" and "differ by" in choice.prompts
    assert "prompts have no program" in same(model, prompt(1, 20))
