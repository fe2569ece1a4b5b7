"""Perplexity, generation speed and the sensitivity sweep on tiny models."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparseprune as sp
from sparseprune import language
from sparseprune.pruning.oneshot import calibration_batches, sensitivity
from sparseprune.pruning.oneshot.densities import Sensitivity, block_of


def llama(**more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    options = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, **more,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options)).eval()


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def test_windows_do_not_overlap_and_short_texts_are_refused() -> None:
    assert language.token_windows(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert language.token_windows(range(12), 3, windows=2).tolist() == [[0, 1, 2], [9, 10, 11]]
    with pytest.raises(ValueError, match="do not fill one window of 16"):
        language.token_windows([1, 2, 3], 16)
    for bad, message in (
        (torch.rand(40), r"whole numbers, .* got torch\.float32"),
        ([1, 2.5] * 20, r"got torch\.float32"),
        (torch.zeros(2, 3, 40, dtype=torch.long), r"expected \[T\], .* got \[2, 3, 40\]"),
    ):
        with pytest.raises(ValueError, match=message):
            language.token_windows(bad, 16)
        with pytest.raises(ValueError, match=message):
            language.perplexity(Bigram(), bad, context=16)
    with pytest.raises(ValueError, match=r"perplexity: tokens expected whole numbers, .* got torch\.float32"):
        language.perplexity(Bigram(), torch.rand(2, 16))


def test_perplexity_is_the_mean_over_all_predicted_tokens() -> None:
    model, ids = Bigram(), torch.randint(0, 5, (70,))
    got = language.perplexity(model, ids, context=8, batch_tokens=20)
    losses = [F.cross_entropy(model.table(w[:-1]), w[1:], reduction="sum") for w in ids[:64].view(8, 8)]
    assert got.tokens == 56 and got.windows == 8 and got.context == 8
    assert got.loss == pytest.approx(float(sum(losses).detach()) / 56, rel=1e-5)
    assert got.value == pytest.approx(math.exp(got.loss))
    assert "56 tokens" in str(got)
    assert model.training


def test_windows_are_taken_as_they_are_in_any_form() -> None:
    model, windows = Bigram(), torch.randint(0, 5, (6, 12))
    wanted = language.perplexity(model, windows, context=8)
    assert (wanted.tokens, wanted.windows, wanted.context) == (66, 6, 12)
    for given in (windows.tolist(), windows.numpy(), windows.int(), windows.numpy().astype("int32")):
        assert language.perplexity(model, given, context=8) == wanted
    for bad, message in (
        ("a text", r"tokens expected ids, got str; pass tokenizer=, or its input_ids"),
        (["a", "b"], r"tokens expected ids, got str"),
        ({"input_ids": windows}, r"tokens expected ids, got dict; pass its input_ids"),
        ([[1, 2, 3], [4]], r"expected ids \[T\], or \[N, T\] of texts of one length, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            language.perplexity(model, bad, context=2)
        with pytest.raises(ValueError, match=message):
            language.token_windows(bad, 2)
        with pytest.raises(ValueError, match=message):
            language.tokens_per_second({"one": model}, bad)


def test_perplexity_refuses_other_vocabularies_and_nan() -> None:
    model = Bigram()
    with pytest.raises(ValueError, match="vocabulary has 5"):
        language.perplexity(model, torch.full((16,), 5), context=8)
    with torch.no_grad():
        model.table.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        language.perplexity(model, torch.zeros(16, dtype=torch.long), context=8)


def test_speed_reports_every_model_and_the_counts() -> None:
    models = {"dense": llama(), "other": llama()}
    speeds = language.tokens_per_second(models, range(12), new_tokens=3, repeats=2)
    assert list(speeds) == ["dense", "other"]
    for s in speeds.values():
        assert s.prompt_tokens == 12 and s.new_tokens == 3 and s.repeats == 2
        assert s.prompt_range[0] <= s.prompt <= s.prompt_range[1]
        assert s.generation_range[0] <= s.generation <= s.generation_range[1]
    assert len(language.speed_table(speeds).splitlines()) == 4
    with pytest.raises(ValueError, match="prompt is empty"):
        language.tokens_per_second(models, [])
    with pytest.raises(ValueError, match=r"expected ids \[P\] or \[B, P\]"):
        language.tokens_per_second(models, torch.zeros(1, 2, 3, dtype=torch.long))


def test_speed_refuses_what_is_no_prompt_and_a_model_without_a_cache(monkeypatch) -> None:
    """Which would be timed on one token at a time."""
    model = llama()
    with pytest.raises(ValueError, match="tokens_per_second: tokens expected whole numbers"):
        language.tokens_per_second({"one": model}, [3.7, 4.2])
    with pytest.raises(ValueError, match="tokens_per_second: token ids reach from 3 to 1000"):
        language.tokens_per_second({"one": model}, [1000, 3])
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: forward(*args, **{**kwargs, "use_cache": False}))
    with pytest.raises(ValueError, match=r"expected to return past_key_values.*got none in CausalLMOutputWithPast"):
        language.tokens_per_second({"one": model}, [3, 4, 5], new_tokens=1, repeats=1)


def test_speed_counts_the_tokens_of_all_sequences_and_asks_for_the_last_logits(monkeypatch) -> None:
    model, calls = llama(), []
    original = model.forward

    def forward(input_ids=None, logits_to_keep=0, **kwargs):
        calls.append((tuple(input_ids.shape), logits_to_keep))
        return original(input_ids=input_ids, logits_to_keep=logits_to_keep, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    clock = iter(range(100))  # every look at the clock is a second after the last one
    monkeypatch.setattr(language.time, "perf_counter", lambda: float(next(clock)))
    prompt = torch.ones(3, 7, dtype=torch.long)
    (speed,) = language.tokens_per_second({"one": model}, prompt, new_tokens=4, repeats=1).values()
    assert (speed.prompt, speed.generation, speed.sequences, speed.prompt_tokens) == (21, 12, 3, 7)
    assert calls[:3] == [((3, 7), 1), ((3, 1), 0), ((3, 1), 0)] and calls[3] == ((3, 7), 1) and len(calls) == 8
    assert "3 sequences, each a prompt of 7 tokens" in language.speed_table({"one": speed})


def test_generation_is_unchanged_on_the_sparsified_model() -> None:
    model = llama()
    ids = torch.randint(0, 61, (4, 32))
    sp.prune_(model, 0.5, criterion="wanda", data=ids)
    prompt = ids[:2, :7]
    arguments = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, **arguments)
    without = model.generate(prompt, use_cache=False, **arguments)
    sp.sparsify_(model, layout="csr")
    assert any(isinstance(m, sp.SparseLinear) for m in model.modules())
    got = model.generate(prompt, **arguments)
    assert torch.equal(got, expected) and torch.equal(without, expected)


def test_sensitivity_measures_one_group_at_a_time_and_puts_it_back(tmp_path: Any) -> None:
    model = llama()
    ids = torch.randint(0, 61, (6, 32))
    linears = sp.nn.filters.prunable_linears(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []

    def loss(m: nn.Module) -> float:
        blocks = block_of(m, linears)
        seen.append({blocks[f] for f in linears if not torch.equal(linears[f].weight, before[f + ".weight"])})
        return language.perplexity(m, ids).loss

    sweep = sensitivity(model, linears, list(ids.split(2)), loss, densities=(0.5, 0.2))
    first, second = "model.layers.0", "model.layers.1"
    assert seen == [set(), {first}, {first}, {second}, {second}]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert first in sweep.table() and f"{sweep.dense:.4f}" in sweep.table()
    densities = sweep.suggest(0.6)
    sizes = {f: m.weight.numel() for f, m in linears.items()}
    assert sum(densities[f] * sizes[f] for f in sizes) / sum(sizes.values()) == pytest.approx(0.6)
    report = sp.prune_(model, 0.4, criterion="wanda", data=ids, densities=densities)
    assert report.kept == report.total - round(0.4 * report.total)
    pytest.importorskip("matplotlib")
    sweep.plot(tmp_path / "sweep.svg")
    assert (tmp_path / "sweep.svg").read_text().startswith("<?xml")
    assert [p.name for p in tmp_path.iterdir()] == ["sweep.svg"]


def test_sensitivity_restores_on_errors() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = [p.clone() for p in model.parameters()]
    calls = []

    def loss(_model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")
        return 1.0

    linears = {"0": model[0], "1": model[1]}
    with pytest.raises(RuntimeError, match="stop"):
        sensitivity(model, linears, calibration_batches(torch.randn(8, 4), model, 1), loss)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_suggested_densities_give_more_to_what_hurts_more() -> None:
    sweep = Sensitivity(
        dense=1.0,
        losses={"a": {0.5: 1.1, 0.25: 5.0}, "b": {0.5: 1.01, 0.25: 1.02}},
        sizes={"a": 100, "b": 100},
        members={"a": ("a",), "b": ("b",)},
    )
    got = sweep.suggest(0.5)
    assert got["a"] > got["b"] and got["a"] + got["b"] == pytest.approx(1.0)
    assert sweep.suggest(1.0) == {"a": 1.0, "b": 1.0}
    low = sweep.suggest(0.1)
    assert sum(low.values()) == pytest.approx(0.2)
