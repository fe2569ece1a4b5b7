"""The op library ``torch.ops.sparseprune`` and the argument checks that every op shares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends

LIBRARY = torch.library.Library("sparseprune", "DEF")


def define(schema: str, op: str, fake: Callable[..., Any], mutates: tuple[int, ...] = ()) -> None:
    """Defines ``sparseprune::op`` with this schema; running it goes to the backend that :func:`backends.choose` names.

    ``mutates``: positions of the arguments that the op writes (a tensor, or a list of them). Kernels write through raw
    pointers, which autograd cannot see, so their version counters are raised here: a tensor saved for backward and then
    written raises.
    """

    def run(*args: Any) -> Any:
        result = backends.choose(op, *args).run(*args)
        for position in mutates:
            if args[position] is not None:
                torch.autograd.graph.increment_version(args[position])
        return result

    LIBRARY.define(schema)
    LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparseprune::{op}", fake, lib=LIBRARY)


def check_mask(op: str, tensor: Tensor, mask: Tensor) -> None:
    """ValueError unless mask is a bool tensor of the tensor's shape and device."""
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask expected dtype torch.bool, got {mask.dtype}; use mask.bool()")
    if mask.shape != tensor.shape:
        raise ValueError(f"{op}: mask expected shape {list(tensor.shape)}, got {list(mask.shape)}")
    if mask.device != tensor.device:
        raise ValueError(
            f"{op}: mask expected on {tensor.device}, got {mask.device}; use mask.to({str(tensor.device)!r})"
        )
