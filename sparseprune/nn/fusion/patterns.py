"""What may be fused, by structure: a claim that :mod:`.fuse` tries before it holds."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from ..linear import SparseLinear
from .modules import EPS_NAMES, FUSED, FusedOutput

__all__ = ["epilogue_of", "eps_of", "is_output_block", "neighbours"]

# Class name of an activation module -> the epilogue that computes the same function.
_EPILOGUES = {
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


_PACKAGES = ("torch", "transformers")  # whose classes of these names compute that; a user's may do anything


def epilogue_of(module: nn.Module) -> str | None:
    """The epilogue that computes what this activation module does, or None."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _EPILOGUES.get(kind.__name__) if kind.__module__.partition(".")[0] in _PACKAGES else None


def is_output_block(module: nn.Module) -> bool:
    """Whether its children are those of LayerNorm(dropout(dense(x)) + residual), ``dense`` a SparseLinear."""
    children = dict(module.named_children())
    return (
        set(children) == {"dense", "LayerNorm", "dropout"}
        and isinstance(children["dense"], SparseLinear)
        and type(children["LayerNorm"]) is nn.LayerNorm
        and isinstance(children["dropout"], nn.Dropout)
        and type(module) is not FusedOutput
    )


def eps_of(module: nn.Module) -> float | None:
    """The eps of a module that may be an RMSNorm: no children, one parameter, the gain, and an eps; else None."""
    weight = module._parameters.get("weight")
    if list(module._parameters) != ["weight"] or weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    if module._buffers or module._modules or isinstance(module, FUSED) or not weight.is_floating_point():
        return None
    for name in EPS_NAMES:
        if isinstance(eps := getattr(module, name, None), float):
            return eps
    if not isinstance(module, nn.RMSNorm):
        return None
    return torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps  # what torch takes where none is given


def neighbours(module: nn.Module) -> list[tuple[str, str]]:
    """(name of a Linear, name of the activation that may follow it): next to each other, or with the module's only
    activation.
    """
    names = [name for name, child in module._modules.items() if child is not None]
    if isinstance(module, nn.Sequential):
        children = list(module._modules.values())
        return [
            (one, two)
            for one, two in itertools.pairwise(names)
            if children.count(module._modules[one]) == children.count(module._modules[two]) == 1
        ]
    activations = [name for name in names if epilogue_of(getattr(module, name)) is not None]
    return [(name, activations[0]) for name in names] if len(activations) == 1 else []
