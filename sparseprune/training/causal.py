"""Causal language models of transformers, whose labels are their input: what is right at a place is the next token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pruning.batches import LabelledBatch
from ..pruning.rows import IGNORED

__all__ = ["is_causal", "with_next_tokens"]

_NAMES = ("ForCausalLM", "LMHeadModel")


def is_causal(model: nn.Module) -> bool:
    """Whether it is a causal language model of transformers, compiled or not, by the names of its class and bases."""
    model = model._modules.get("_orig_mod") or model
    return any(kind.__name__.endswith(_NAMES) for kind in type(model).__mro__)


def with_next_tokens(model: nn.Module, batch: LabelledBatch) -> LabelledBatch:
    """The batch; of a causal language model with targets `[B, T]` as transformers takes them, unshifted, with the next
    one at each place and -100 at the last. ValueError where they are the next tokens already.
    """
    targets = batch.targets
    if targets.dim() != 2 or targets.is_floating_point() or not is_causal(model):
        return batch
    ids = _ids(batch.inputs)
    if ids is not None and ids.shape == targets.shape and _shifted(ids, targets):
        raise ValueError(
            f"labels of {type(model).__name__} expected as transformers takes them, the ids at the same places, got "
            "the next tokens; pass labels=input_ids (-100 where a token is not to be learned), they are shifted here"
        )
    return replace(batch, targets=F.pad(targets[:, 1:], (0, 1), value=IGNORED))


def _ids(inputs: Any) -> Tensor | None:
    first = inputs[0] if isinstance(inputs, tuple | list) and inputs else inputs
    found = inputs.get("input_ids") if isinstance(inputs, Mapping) else first
    return found if isinstance(found, Tensor) else None


def _shifted(ids: Tensor, targets: Tensor) -> bool:
    """Whether targets are the ids one place on, and not those at the same places too, as where all tokens are alike."""
    counted = targets != IGNORED
    counted[:, -1] = False  # a token that the ids do not hold
    following = torch.equal(targets[:, :-1][counted[:, :-1]], ids[:, 1:][counted[:, :-1]])
    return following and not torch.equal(targets[counted], ids[counted])
