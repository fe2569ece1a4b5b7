"""Tiny random models of transformers, and what they answer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

SIZES = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "cat", "dog", "bird", "sees", "old", "house"]
IDS = torch.randint(5, 13, (3, 9), generator=torch.Generator().manual_seed(1))


def _make(name: str, **changes) -> nn.Module:
    """A model in eval mode, with the same weights at every call."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vocabulary = {"vocab_size": len(WORDS), "pad_token_id": 0}
    llama = {**vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.1}  # fmt: skip
    experts = {**llama, "num_local_experts": 4, "num_experts_per_tok": 2}
    qwen = {**llama, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    t5 = {**vocabulary, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
          "decoder_start_token_id": 0, "eos_token_id": 1}  # fmt: skip
    gpt2 = {**vocabulary, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1,
            "eos_token_id": 1, "initializer_range": 0.1}  # fmt: skip
    kinds = {
        "bert": ("BertForSequenceClassification", "BertConfig", {**vocabulary, "num_labels": 3, **SIZES}),
        "llama": ("LlamaForCausalLM", "LlamaConfig", {**llama, "tie_word_embeddings": True}),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config", gpt2),
        "t5": ("T5ForConditionalGeneration", "T5Config", t5),
        "mixtral": ("MixtralForCausalLM", "MixtralConfig", experts),
        "qwen": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", qwen),
    }
    kind, config, options = kinds[name]
    made = getattr(transformers, config)(**{**options, **changes})
    return getattr(transformers, kind)(made).eval()


@torch.no_grad()
def _answers(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits.clone()


@pytest.fixture(scope="session")
def make():
    """``make("bert", **changes)``: a model of that kind."""
    return _make


@pytest.fixture(scope="session")
def answers():
    """``answers(model)``: its logits for the same input, without a gradient."""
    return _answers


@pytest.fixture(scope="session")
def ids():
    return IDS


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer of thirteen words."""
    transformers = pytest.importorskip("transformers")
    place = tmp_path / "words"
    place.mkdir()
    (place / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return transformers.BertTokenizer(str(place / "vocab.txt"))
