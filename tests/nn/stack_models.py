"""Small encoders of every architecture that stacks know, and calls to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sparseprune as sp
from sparseprune.nn.stacks import StackForward, stack_of
from sparseprune.runner.text_encoder import TextEncoder

VOCABULARY = 50


def common(hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": 2, "num_attention_heads": heads, "intermediate_size": ffn,
        "vocab_size": VOCABULARY, "max_position_embeddings": 600, "pad_token_id": 0,
    }  # fmt: skip


def make(name: str, hidden: int = 36, heads: int = 3, ffn: int = 50, attention: str = "sdpa") -> nn.Module:
    """An encoder with random weights in eval; ``name`` of its architecture."""
    torch.manual_seed(0)
    if name.startswith("torch"):
        before, batch_first, gelu = (part in name for part in ("prenorm", "batch", "gelu"))
        layer = nn.TransformerEncoderLayer(
            hidden, heads, ffn, activation="gelu" if gelu else "relu", batch_first=batch_first, norm_first=before
        )
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor="nested" in name).eval()
    if name == "text":
        return TextEncoder(VOCABULARY, 2, hidden, ffn, 2, heads, max_length=600).eval()
    import transformers as t

    options = {**common(hidden, heads, ffn), "attn_implementation": attention}
    if name == "distilbert":
        config = t.DistilBertConfig(
            dim=hidden, n_layers=2, n_heads=heads, hidden_dim=ffn, vocab_size=VOCABULARY, max_position_embeddings=600,
            attn_implementation=attention,
        )  # fmt: skip
        model = t.DistilBertModel(config)
    elif name == "mpnet":
        model = t.MPNetModel(t.MPNetConfig(**{**options, "attn_implementation": "eager"}))
    elif name == "modernbert":
        tokens = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
        model = t.ModernBertModel(
            t.ModernBertConfig(**options, **tokens, local_attention=8, global_attn_every_n_layers=2)
        )
    elif name == "vit":
        model = t.ViTModel(t.ViTConfig(**options, image_size=24, patch_size=8))
    else:
        kinds = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert",
                 "electra": "Electra"}  # fmt: skip
        extra = {"embedding_size": 20} if name == "electra" else {}
        config = getattr(t, kinds[name] + "Config")(**options, **extra)
        model = getattr(t, kinds[name] + "Model")(config)
    for parameter in model.parameters():  # far from what tolerances would hide
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model.eval()


def body(model: nn.Module, name: str) -> Callable[..., Tensor]:
    """``call(ids [B, S], real [B, S] or None)``: hidden states `[B, S, D]` of the model, or logits."""
    if name.startswith("torch"):
        batch_first = model.layers[0].self_attn.batch_first

        def encode(ids: Tensor, real: Tensor | None = None) -> Tensor:
            x = torch.sin(ids[..., None] * torch.arange(1.0, 1 + model.layers[0].linear1.in_features))
            y = model(x if batch_first else x.transpose(0, 1), src_key_padding_mask=None if real is None else ~real)
            return y if batch_first else y.transpose(0, 1)

        return encode
    if name == "text":
        return lambda ids, real=None: model(ids, real)
    return lambda ids, real=None, **more: (
        model(input_ids=ids, attention_mask=None if real is None else real.long(), **more).last_hidden_state
    )


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def stack(model: nn.Module) -> StackForward:
    """The one stack of a model that has one."""
    found = [s for s in map(stack_of, model.modules()) if s is not None]
    assert len(found) == 1
    return found[0]


@contextmanager
def programs(model: nn.Module) -> Iterator[list[str | None]]:
    """Notes for each call of the model's stack why the layers answered it, or None where the program did."""
    found, notes = stack(model), []
    run = found._run

    def noted(args: Any, kwargs: Any, dry: bool) -> Any:
        try:
            result = run(args, kwargs, dry)
        except Exception as error:
            notes.append(str(error))
            raise
        notes.append(None)
        return result

    found._run = noted  # type: ignore[method-assign]
    try:
        yield notes
    finally:
        del found._run


def prune_(model: nn.Module, density: float = 0.4) -> nn.Module:
    """Random zeros in every matrix of the layers."""
    sp.prune_(model, sparsity=1 - density, scope="layer", filter_fn=lambda module, fqn: "layer" in fqn)
    return model


def sparse(name: str, engine: str = "program", **options: Any) -> nn.Module:
    """The architecture pruned, sparse as csr and run by ``engine``."""
    model = prune_(make(name, **options))
    report = sp.sparsify_(model, layout="csr", filter_fn=lambda module, fqn: "layer" in fqn, engine=engine)
    assert [choice.engine for choice in report.stacks] == [engine], str(report)
    return model
