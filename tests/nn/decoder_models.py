"""Small decoders of every architecture that stacks know."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.nn.stacks import drop_stacks_

VOCABULARY = 99
EVERY = ["llama", "mistral", "qwen2", "qwen3", "smollm", "gemma", "phi", "phi normed", "neox", "neox serial", "gpt2"]


def make(name: str, layers: int = 2, attention: str = "sdpa", window: int | None = None) -> Any:
    """A causal model with random weights, frozen and in eval; ``name`` of its architecture."""
    import transformers as t

    torch.manual_seed(0)
    kinds = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm": "Llama",
             "gemma": "Gemma", "phi": "Phi", "neox": "GPTNeoX", "gpt2": "GPT2"}  # fmt: skip
    family = name.split()[0]
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": layers,
        "num_attention_heads": 4, "max_position_embeddings": 300, "attn_implementation": attention,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi"):
        options["num_key_value_heads"] = 2
    if family in ("mistral", "qwen3", "gemma"):
        options["head_dim"] = 16
    if family == "smollm":
        options |= {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "tie_word_embeddings": True}
    if family == "mistral":
        options["sliding_window"] = window
    if family == "neox":
        options |= {"hidden_size": 64, "use_parallel_residual": "serial" not in name}  # 4 features of 16 are turned
    if name == "phi normed":
        options["qk_layernorm"] = True
    head = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    model = getattr(t, kinds[family] + head)(getattr(t, kinds[family] + "Config")(**options)).eval()
    for parameter in model.parameters():  # far from what tolerances would hide
        parameter.data.mul_(4) if parameter.dim() == 2 else parameter.data.add_(0.1 * torch.randn(parameter.shape))
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False)


def sparse(name: str, engine: str = "program", value_dtype: str = "float32", **options: Any) -> Any:
    """The architecture pruned, sparse as csr and run by ``engine``."""
    model = make(name, **options)
    sp.prune_(model, sparsity=0.5)
    report = sp.sparsify_(model, layout="csr", tokens=(1, 64), engine=engine, value_dtype=value_dtype)
    assert [choice.engine for choice in report.stacks] == [engine], str(report)
    return model


def prompts(batch: int = 1, length: int = 7) -> dict[str, Tensor]:
    """Prompts of different lengths, padded in front."""
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch))
    real = torch.ones_like(ids)
    for i in range(batch):
        real[i, : i % 3] = 0
    return {"input_ids": ids.masked_fill(real == 0, 0), "attention_mask": real}


def undone(model: Any) -> Any:
    """The same model layer by layer."""
    layers = copy.deepcopy(model)
    assert drop_stacks_(layers)
    return layers


def body(model: nn.Module) -> nn.Module:
    """The module whose loop the program runs."""
    found: nn.Module = model.base_model  # type: ignore[assignment]
    return found
