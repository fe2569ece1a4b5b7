"""Causal language models: labels are those of transformers, which each place is judged by the next token of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparseprune import CubicSchedule
from sparseprune.training import DistillConfig, DistillPruner, evaluate, predictions
from sparseprune.training.causal import is_causal

transformers = pytest.importorskip("transformers")

SIZE = {"vocab_size": 20, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0, resid_pdrop=0,
        embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZE, intermediate_size=48, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def counting(rows=64):
    """Rows that count on in threes from any token."""
    start = torch.randint(0, 20, (rows, 1), generator=torch.Generator().manual_seed(0))
    return (start + torch.arange(16) * 3) % 20


@pytest.mark.parametrize("make", [gpt2, llama])
def test_the_loss_is_that_of_transformers(make):
    model, ids = make(), counting(8)
    labels = ids.clone()
    labels[:, :5] = labels[2, 9:] = -100
    with torch.no_grad():
        out = model(input_ids=ids, labels=labels)
    found = evaluate(model, [{"input_ids": ids, "labels": labels}])
    assert found["loss"] == pytest.approx(float(out.loss), rel=1e-5)
    counted = labels[:, 1:] != -100
    right = out.logits[:, :-1].argmax(-1) == labels[:, 1:]
    assert found["accuracy"] == pytest.approx(float(right[counted].float().mean()))
    assert evaluate(model, [(ids, labels)]) == found
    logits, targets = predictions(model, [{"input_ids": ids, "labels": labels}])
    assert torch.equal(targets, labels[:, 1:][counted]) and torch.equal(logits, out.logits[:, :-1][counted])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_training_keeps_what_the_model_learned(make):
    model, ids = make(), counting()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    batches = [{"input_ids": rows, "labels": rows} for rows in ids.split(16)]
    settings = DistillConfig(schedule=CubicSchedule(0.9), steps=40, lr=3e-3, ce=1.0, kd=0.0, hidden=0.0)
    pruner = DistillPruner(model, settings)
    history = pruner.fit(batches, batches)
    with torch.no_grad():
        found = float(pruner.finalize()(input_ids=ids, labels=ids).loss)
    assert found < 0.1
    assert history.evaluations[-1]["accuracy"] > 0.95
    assert evaluate(model, batches)["loss"] == pytest.approx(found, rel=1e-3)


def test_labels_that_are_shifted_already_are_refused():
    ids = counting(8)
    for batch in [(ids[:, :-1], ids[:, 1:]), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}]:
        with pytest.raises(ValueError, match="the ids at the same places, got the next tokens; pass labels=input_ids"):
            evaluate(gpt2(), [batch])
    alike = torch.zeros(2, 8, dtype=torch.int64)
    assert evaluate(gpt2(), [(alike, alike)])["loss"] > 0


def test_what_is_causal_is_told_by_the_class():
    class Mine(transformers.GPT2LMHeadModel):
        pass

    assert is_causal(gpt2()) and is_causal(Mine(gpt2().config)) and is_causal(torch.compile(llama()))
    assert not is_causal(nn.Linear(2, 2))
    assert not is_causal(transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, intermediate_size=48)))


def test_a_masked_language_model_is_compared_in_place():
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZE, intermediate_size=48)).eval()
    ids = counting(4)
    with torch.no_grad():
        expected = float(model(input_ids=ids, labels=ids).loss)
    assert evaluate(model, [{"input_ids": ids, "labels": ids}])["loss"] == pytest.approx(expected, rel=1e-5)
