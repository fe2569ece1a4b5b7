"""A model of each family that users bring, taken from prune_ to densify_; random weights, real architectures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sparseprune.nn.matrices import unpack_

transformers = pytest.importorskip("transformers")

IDS = torch.randint(1, 99, (4, 12), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones_like(IDS)
PADDED[1, 8:] = 0
LABELS = torch.tensor([0, 2, 1, 2])


def classifier():
    config = transformers.BertConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    return model, {"input_ids": IDS, "attention_mask": PADDED}, {"labels": LABELS}


def causal():
    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}, {"labels": IDS}


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=99, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    inputs = {"input_ids": IDS, "attention_mask": PADDED, "decoder_input_ids": IDS[:, :5]}
    return model, inputs, {"labels": IDS[:, :5].contiguous()}


def vision():
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.1,
    )  # fmt: skip
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return transformers.ViTForImageClassification(config), {"pixel_values": pixels}, {"labels": LABELS}


def experts():
    config = transformers.MixtralConfig(
        vocab_size=99, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    unpack_(model)  # Linears of its own for each expert, whose masks the walk looks at
    return model, {"input_ids": IDS}, {"labels": IDS}


FAMILIES = [classifier, causal, encoder_decoder, vision, experts]


def walk_of(walk, family):
    _, inputs, targets = family()
    return walk(
        lambda: family()[0], lambda model: model(**inputs).logits, lambda model: model(**inputs, **targets).loss
    )


@pytest.mark.parametrize("layout", ["csr", "auto"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_from_prune_to_densify(walk, family, sparsity, layout, tmp_path):
    walk_of(walk, family).go(sparsity, layout, tmp_path / "pruned.safetensors")


@pytest.mark.parametrize("family", [causal, encoder_decoder], ids=lambda family: family.__name__)
def test_what_was_loaded_writes_the_same_text(walk, family, tmp_path):
    steps = walk_of(walk, family)
    loaded = steps.go(0.5, "csr", tmp_path / "pruned.safetensors")
    import sparseprune as sp

    def text(model):
        return model.generate(input_ids=IDS[:1], max_new_tokens=6, do_sample=False)

    sparse = text(loaded)
    sp.densify_(loaded)
    assert torch.equal(text(loaded), sparse) and sparse.shape[1] >= 6


def test_a_pruned_classifier_still_knows_its_classes(walk, tmp_path):
    """Trained to tell three marker tokens apart; half of its weights are enough, on disk and back, too."""
    import sparseprune as sp

    torch.manual_seed(0)
    ids = torch.randint(10, 99, (96, 12))
    labels = torch.arange(96) % 3
    ids[:, 0] = ids[:, 6] = labels + 1
    model = classifier()[0]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(60):
        rows = torch.arange(step * 32, step * 32 + 32) % 96
        loss = F.cross_entropy(model(input_ids=ids[rows]).logits, labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    @torch.no_grad()
    def accuracy(model):
        return float((model.eval()(input_ids=ids).logits.argmax(1) == labels).float().mean())

    assert accuracy(model) == 1.0
    sp.prune_(model, 0.5)
    pruned = accuracy(model)
    assert pruned >= 0.95
    sp.sparsify_(model, layout="csr", tokens=96)
    assert accuracy(model) == pruned
    sp.save(model, tmp_path / "pruned.safetensors")
    fresh = sp.load(classifier()[0], tmp_path / "pruned.safetensors")
    assert accuracy(fresh) == pruned
    sp.densify_(fresh)
    assert accuracy(fresh) == pruned
