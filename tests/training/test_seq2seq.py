"""Models of transformers with encoder and decoder: what the decoder reads is made of the labels, as their forward does
it.
"""

from __future__ import annotations

import pytest
import torch

from sparseprune.training import DistillConfig, DistillPruner, evaluate, predictions

transformers = pytest.importorskip("transformers")

BART = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "dropout": 0.0}  # fmt: skip


def bart(kind="BartForConditionalGeneration", config="BartConfig", **more):
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**BART, **more)).eval()


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, dropout_rate=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def batch(places=5):
    """Eight places to read, the last ones padding in one row, and ``places`` to write, of which one has no label."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(3, 40, (4, n), generator=generator) for n in (8, places))
    mask = torch.ones_like(ids)
    ids[0, 5:], mask[0, 5:], labels[1, -1] = 1, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("make", [bart, t5])
@pytest.mark.parametrize("places", [5, 8])
def test_the_loss_is_that_of_transformers(make, places):
    model, given = make(), batch(places)
    with torch.no_grad():
        out = model(**given)
    assert evaluate(model, [given])["loss"] == pytest.approx(float(out.loss), rel=1e-5)
    logits, targets = predictions(model, [given])
    counted = given["labels"] != -100
    assert torch.equal(targets, given["labels"][counted])
    torch.testing.assert_close(logits, out.logits[counted])
    ready = {**given, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=given["labels"])}
    assert evaluate(model, [ready]) == evaluate(model, [given])
    other = {**given, "decoder_input_ids": torch.full_like(given["labels"], 7)}
    assert evaluate(model, [other])["loss"] != evaluate(model, [given])["loss"]


@pytest.mark.parametrize("make", [bart, t5])
def test_training_reads_the_labels_before_each(make):
    model, given, seen = make(), batch(), []
    expected = model.prepare_decoder_input_ids_from_labels(labels=given["labels"])
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    settings = DistillConfig(density=0.5, steps=3, compensation="best")
    DistillPruner(model, settings).fit([given] * 3, [given])
    assert len(seen) > 3 and all(torch.equal(ids, expected) for ids in seen)


def test_a_model_that_does_not_make_them_wants_them_in_each_batch():
    model, given = bart("BlenderbotForConditionalGeneration", "BlenderbotConfig"), batch()
    said = "a batch for BlenderbotForConditionalGeneration expected a dict with decoder_input_ids"
    with pytest.raises(ValueError, match=f"{said}.*got input_ids, attention_mask"):
        evaluate(model, [given])
    with pytest.raises(ValueError, match=said):
        DistillPruner(model, DistillConfig(steps=2)).fit([given])
    with pytest.raises(ValueError, match=r"expected a dict with decoder_input_ids.*got Tensor"):
        evaluate(bart(), [(given["input_ids"], given["labels"])])
    assert evaluate(model, [{**given, "decoder_input_ids": given["labels"].clamp_min(0)}])["loss"] > 0


def test_one_that_classifies_makes_its_own():
    model, given = bart("BartForSequenceClassification", num_labels=3), batch()
    given["input_ids"][:, 4] = 2  # the end of the text, which it is judged by
    given["labels"] = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        assert evaluate(model, [given])["loss"] == pytest.approx(float(model(**given).loss), rel=1e-5)
