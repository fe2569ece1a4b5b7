"""A small transformer encoder for text classification, made of plain Linears, so that the demo needs no download."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TextEncoder"]


class FeedForward(nn.Module):
    """Linear, GELU, Linear. x: `[..., hidden]`; returns the same shape."""

    def __init__(self, hidden: int, ffn: int):
        super().__init__()
        self.expand = nn.Linear(hidden, ffn)
        self.activation = nn.GELU()
        self.contract = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.activation(self.expand(x)))


class EncoderLayer(nn.Module):
    """Pre-norm self-attention and a GELU feed-forward, residuals. x: `[B, T, hidden]`, keep: bool `[B, 1, 1, T]`."""

    def __init__(self, hidden: int, ffn: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden)
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.output = nn.Linear(hidden, hidden)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.ffn = FeedForward(hidden, ffn)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        q, k, v = (
            layer(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.output(attended))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))


class TextEncoder(nn.Module):
    """Token and position embeddings, ``layers`` encoder layers, the mean over real tokens, a linear ``classifier``.

    input_ids: int64 `[B, T]`, T <= max_length; attention_mask: `[B, T]`, 1 = real token (default: all but ``pad_id``);
    returns logits `[B, num_labels]`.
    """

    def __init__(
        self, vocab_size: int, num_labels: int, hidden: int = 256, ffn: int = 1024, layers: int = 3, heads: int = 4,
        max_length: int = 64, dropout: float = 0.1, pad_id: int = 0,
    ):  # fmt: skip
        super().__init__()
        if hidden % heads:
            raise ValueError(f"TextEncoder: heads ({heads}) must divide hidden ({hidden})")
        self.settings = {
            "vocab_size": vocab_size, "num_labels": num_labels, "hidden": hidden, "ffn": ffn, "layers": layers,
            "heads": heads, "max_length": max_length, "dropout": dropout, "pad_id": pad_id,
        }  # fmt: skip
        self.pad_id, self.max_length = pad_id, max_length
        self.tokens = nn.Embedding(vocab_size, hidden, padding_idx=pad_id)
        self.positions = nn.Embedding(max_length, hidden)
        self.embedding_norm = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(hidden, ffn, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        whole = input_ids.dtype in (torch.int64, torch.int32)
        if not whole or input_ids.dim() != 2 or input_ids.shape[1] > self.max_length:
            raise ValueError(
                f"TextEncoder: expected input_ids [B, T <= {self.max_length}] in int64, the ids of tokens, got "
                f"{list(input_ids.shape)} in {input_ids.dtype}"
            )
        real = input_ids != self.pad_id if attention_mask is None else attention_mask != 0
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        x = self.dropout(self.embedding_norm(x))
        keep = real[:, None, None, :]
        for layer in self.layers:
            x = layer(x, keep)
        weights = real.unsqueeze(-1).to(x.dtype)
        pooled = (self.norm(x) * weights).sum(1) / weights.sum(1).clamp(min=1)
        return self.classifier(self.dropout(pooled))
