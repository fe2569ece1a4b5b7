"""Which tokens are real, read off whatever mask a layer was to get; anything else in that mask is refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Unsupported", "kept", "real_in_prompt", "real_tokens"]

_LOWEST = -1e30  # what a mask adds to a score that is not to count: this or less


class Unsupported(Exception):
    """A call that the layers themselves have to answer, and why."""


def real_tokens(mask: Any, batch: int, length: int, window: int, real_is_true: bool) -> Tensor | None:
    """Bool `[B, S]`, True where a token is real; None: all are.

    mask: None; bool or additive `[B, S]`, `[B, 1, 1, S]` or `[B, 1, S, S]`; window: the most places apart that this
    layer looks, -1 for any; real_is_true: what True says in a bool mask. :class:`Unsupported` where the mask holds
    anything beside padding and that window for a real token, such as a causal triangle, a mask by head or a bias.
    """
    if mask is None:
        if 0 <= window < length - 1:
            raise Unsupported(f"no mask keeps its {length} tokens to the window of {window} places")
        return None
    if type(mask) is not Tensor or mask.device.type != "cpu":
        raise Unsupported(f"the mask is {type(mask).__name__}, not a tensor on the CPU")
    keep = kept(mask)
    if mask.dtype is torch.bool and not real_is_true:
        keep = ~keep
    if keep.dim() == 2 and keep.shape == (batch, length):
        return _with_window(keep, None, window, length)
    if keep.dim() != 4 or keep.shape[1] != 1 or keep.shape[0] not in (1, batch) or keep.shape[3] != length:
        raise Unsupported(f"the mask has shape {list(mask.shape)} for {batch} sequences of {length} tokens")
    rows = keep.shape[2]
    if rows == 1 or mask.stride(2) == 0:
        real = keep[:, 0, 0]
        return _with_window(real.expand(batch, length), None, window, length)
    if rows != length:
        raise Unsupported(f"the mask has {rows} rows for {length} queries")
    by_query = keep[:, 0]
    real = by_query.diagonal(dim1=1, dim2=2)  # every token sees itself
    return _with_window(real.expand(batch, length), by_query, window, length)


def kept(mask: Tensor) -> Tensor:
    """What a bool or additive mask lets count; :class:`Unsupported` where it adds anything else."""
    if mask.dtype is torch.bool:
        return mask
    if not mask.is_floating_point():
        raise Unsupported(f"the mask has dtype {mask.dtype}")
    keep = mask == 0
    if not bool((keep | (mask <= _LOWEST)).all()):
        raise Unsupported("the mask adds more than 0 or minus infinity to the scores")
    return keep


def real_in_prompt(mask: Any, batch: int, length: int, whole: bool = False) -> Tensor | None:
    """Bool `[B, S]`, True where a token of a prompt is real; None: all are.

    mask: None, where each token sees those up to itself; bool or float32, added, `[B or 1, 1, S, S]`, or where it is of
    a ``whole`` cache `[.., S or more]`, of whose places those from S on are empty. :class:`Unsupported` where it says
    more than that a token sees the real ones up to itself, one that would see none may see all; and on padding that is
    not in front of a sequence, for layers give such tokens hidden states that may be read.
    """
    if mask is None:
        return None
    if type(mask) is not Tensor or not mask.is_cpu:
        raise Unsupported(f"the mask is {type(mask).__name__}, not a tensor on the CPU")
    if mask.dtype not in (torch.bool, torch.float32):
        raise Unsupported(f"the mask has dtype {mask.dtype}")
    keys = mask.shape[-1]
    fits_in = keys == length or (whole and keys > length)
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:3] != (1, length) or not fits_in:
        raise Unsupported(f"the mask has shape {list(mask.shape)} for a prompt of {batch} x {length} tokens")
    keep = kept(mask)[:, 0]
    real = keep[:, -1, :length]  # what the last token sees, of padding in front and behind alike
    expected = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None]
    fits = (keep[..., :length] == expected).all(2) & ~keep[..., length:].any(2)
    if not bool((fits | (keep.all(2) & ~expected.any(2))).all()):
        raise Unsupported("the mask of the prompt says more than padding: what a token sees depends on its place")
    if not bool((real[:, 1:] >= real[:, :-1]).all()):
        raise Unsupported("there is padding behind a token of the prompt, whose hidden states may be read")
    return None if bool(real.all()) else real.expand(batch, length).contiguous()


def _with_window(real: Tensor, by_query: Tensor | None, window: int, length: int) -> Tensor:
    """real `[B, S]`, if the mask `[B, S queries, S keys]` says just that and the window for each real query."""
    inside = None
    if 0 <= window < length - 1:
        place = torch.arange(length)
        inside = (place[:, None] - place).abs() <= window
    if by_query is None:
        if inside is not None:
            raise Unsupported(f"the mask does not keep tokens to the window of {window} places")
        return real.contiguous()
    expected = real[:, None, :] if inside is None else real[:, None, :] & inside
    if not bool(((by_query == expected) | ~real[:, :, None]).all()):
        raise Unsupported("the mask holds more than padding: what a token may see depends on its place")
    return real.contiguous()
