"""One module put in the place of another."""

from __future__ import annotations

from torch import nn

from .fusion import hand_on_hooks_

__all__ = ["replace_"]


def replace_(model: nn.Module, replacements: dict[int, nn.Module]) -> None:
    """Puts each replacement wherever the module with that id hangs, be it under one name or several, with its hooks."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and id(child) in replacements:
                hand_on_hooks_(child, replacements[id(child)])
                setattr(module, name, replacements[id(child)])
