"""What watches a module, and what was put in place of its forward."""

from __future__ import annotations

from torch import nn

__all__ = ["hand_on_hooks_", "hooked"]

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


def hooked(*modules: nn.Module) -> bool:
    """Whether something watches these modules, or has replaced the forward of one."""
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks or "forward" in vars(m)
        for m in modules
    )


def hand_on_hooks_(module: nn.Module, replacement: nn.Module) -> None:
    """What watches ``module`` watches what comes in its place; handles given out for that go on removing it."""
    for name in _HOOKS:
        vars(replacement)[name] = vars(module)[name]
