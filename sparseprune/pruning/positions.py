"""Which positions of a batch are real, for each module of its model: an encoder-decoder has two inputs, and a mask of
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batches import Batch, real_rows_of

__all__ = ["Positions", "decoder_of"]

# Names of the attention of a decoder to the encoder's states, and of its projections that read those states.
_CROSS = {"encoder_attn", "EncDecAttention", "crossattention", "cross_attn"}
_STATES = {"k", "v", "key", "value", "k_proj", "v_proj"}


def decoder_of(model: nn.Module) -> str | None:
    """The name of an encoder-decoder's decoder, None of any other model."""
    get = getattr(model, "get_decoder", None)
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not callable(get):
        return None
    found = get()
    return next((name for name, module in model.named_modules() if name and module is found), None)


@dataclass(frozen=True)
class Positions:
    """mask: bool `[B, T]` of the model's input, True = real, None: all of it is. decoder: the name of an
    encoder-decoder's decoder; decoder_mask `[B, S]`: of the decoder's input; shape: that of this input, where the batch
    has it.
    """

    mask: Tensor | None
    decoder: str | None = None
    decoder_mask: Tensor | None = None
    shape: torch.Size | None = None

    @classmethod
    def of(cls, batch: Batch, decoder: str | None) -> Positions:
        """decoder: `decoder_of` the batch's model."""
        if decoder is None:
            return cls(batch.positions)
        given: dict[str, Any] = batch.kwargs
        ids, features = given.get("decoder_input_ids"), given.get("decoder_inputs_embeds")
        shape = ids.shape if ids is not None else features.shape[:-1] if features is not None else None
        own = Batch({"attention_mask": given.get("decoder_attention_mask")}).positions
        return cls(batch.positions, decoder, own, shape)

    def of_module(self, name: str, x: Tensor) -> Tensor | None:
        """The mask of what the module of this name reads or gives, x `[B, L, K]`.

        In a decoder that is its own input's, except of the encoder's states: known by their length, or where that says
        nothing by the names of the projections that read them.
        """
        if self.decoder is None or not name.startswith(f"{self.decoder}."):
            return self.mask
        *path, last = name.split(".")
        other = x.dim() > 2 and self.shape is not None and x.shape[:-1] != self.shape
        return self.mask if other or (last in _STATES and not _CROSS.isdisjoint(path)) else self.decoder_mask

    def rows(self, name: str, x: Tensor) -> Tensor:
        """The real positions `[M, K]` of what the module of this name reads or gives."""
        return real_rows_of(x, self.of_module(name, x))
