"""A transformers configuration brought in line with the sizes of a shrunken model, or saving made to refuse."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..nn.expose import refuse_save_pretrained_
from .units import HEAD_COUNTS, HEAD_SIZES, WIDTHS, AttentionBlock

__all__ = ["configure", "own_configurations"]

# Where a transformers configuration keeps these sizes.
_CONFIG_HEADS = (*HEAD_COUNTS, "encoder_attention_heads", "decoder_attention_heads", "num_decoder_heads")
_CONFIG_NEURONS = (
    "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "d_ff", "n_inner",
)  # fmt: skip


def configure(
    model: nn.Module, blocks: Sequence[tuple[AttentionBlock, int]], neurons: Mapping[str, tuple[int, int]]
) -> str:
    """Brings a transformers configuration in line with the model's sizes: ``blocks`` with the units they keep, neurons
    before and after. Where a model built from it would not have them, the configuration stays and ``save_pretrained``
    is made to refuse; returns why.
    """
    config = getattr(model, "config", None)
    heads = {block.name: (block.heads, units * block.queries) for block, units in blocks}
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return ""
    if all(before == left for before, left in (*heads.values(), *neurons.values())):
        return ""
    changes: dict[str, int] = {}
    for sizes, names in ((heads, _CONFIG_HEADS), (neurons, _CONFIG_NEURONS)):
        after: dict[int, set[int]] = {}
        for before, left in sizes.values():
            after.setdefault(before, set()).add(left)
        for before, left_in in after.items():
            if len(left_in) > 1:
                what = "heads" if sizes is heads else "neurons"
                return _refuse(model, f"the layers keep unlike numbers of {what}: {sorted(left_in)} of {before}")
            for name in names:
                own = getattr(config, name, None)
                if own == before or (name == "n_inner" and hasattr(config, name) and own is None):
                    changes[name] = next(iter(left_in))
    widths: dict[str, int] = {}  # of a head, for configurations that would derive it from the number of heads
    for block, units in blocks:
        if units < block.units:
            widths["head_dim"] = block.head_dim
            if getattr(config, "num_key_value_heads", None) == block.units:
                changes["num_key_value_heads"] = units
    why = ""
    for extra in ({}, widths):
        wanted = copy.deepcopy(config)
        for name, value in (changes | extra).items():
            setattr(wanted, name, value)
        try:
            with torch.device("meta"):
                template = type(model)(wanted)
        except Exception as error:
            why = f"no {type(model).__name__} can be built with {changes | extra}: {error}"
            continue
        if _sizes(template) == _sizes(model):
            for name, value in (changes | extra).items():
                setattr(config, name, value)
            return ""
        why = f"{type(config).__name__} cannot describe these sizes: with {changes | extra} a model differs"
    return _refuse(model, why)


def own_configurations(model: nn.Module) -> None:
    """Gives the model a copy of every configuration its modules hold, one for all that hold the same: another model,
    built from it, keeps its own sizes.
    """
    copies: dict[int, Any] = {}  # deepcopy's own: a part of a configuration that a module holds stays that part
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if hasattr(value, "model_type") or (name == "config" and hasattr(value, "__dict__")):
                setattr(module, name, copy.deepcopy(value, copies))


def _sizes(model: nn.Module) -> dict[str, Any]:
    """Everything about sizes in which two models of one class can differ."""
    found: dict[str, Any] = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for fqn, module in model.named_modules():
        for name in (*HEAD_COUNTS, *HEAD_SIZES, *WIDTHS, "num_key_value_heads", "num_key_value_groups"):
            if isinstance(getattr(module, name, None), int):
                found[f"{fqn}.{name}"] = getattr(module, name)
    return found


def _refuse(model: nn.Module, why: str) -> str:
    refuse_save_pretrained_(model, why)
    return why
