"""The proof that a program computes what its layers compute: both run on random input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...native.encoder import BoundEncoder
from ..modes import evaluating
from ..packed_only import PackedLinear
from .build import build
from .recognise import LayerParts, UnknownLayer, foreign
from .weights import exact, rounds

__all__ = ["example", "prove", "run_layers"]

_BATCH, _LENGTHS = 2, (1, 5, 19)
_LONGEST = 300  # tokens: a wider window is believed
_TOLERANCE = 1e-4  # of the largest value
_ROUNDED_TOLERANCE = 5e-2


def example(
    parts: Sequence[LayerParts], real: Tensor, masked: bool, generator: torch.Generator
) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """(what each layer is called with beside the hidden states, the tables of the program). real: bool `[B, S]`."""
    batch, length = real.shape
    lowest = torch.finfo(torch.float32).min
    place = torch.arange(length)
    positions: dict[str, Any] = {}
    tables: list[Tensor] = []
    for layer in parts:
        if layer.kind in positions or not (layer.rotary or layer.biased):
            continue
        if layer.rotary:
            angle = torch.rand(length, layer.depth // 2, generator=generator, dtype=torch.float32)
            angle = angle.mul_(6).repeat(1, 2)
            tables += [angle.cos(), angle.sin()]
            positions[layer.kind] = {"position_embeddings": (angle.cos().unsqueeze(0), angle.sin().unsqueeze(0))}
        else:
            bias = torch.randn(layer.heads, length, length, generator=generator, dtype=torch.float32)
            tables.append(bias.transpose(1, 2).contiguous())
            positions[layer.kind] = {"position_bias": bias.unsqueeze(0)}
    calls = []
    for layer in parts:
        window = 0 <= layer.window < length - 1
        mask = None
        if layer.mask == "src_key_padding_mask":
            added = torch.zeros(batch, length, dtype=torch.float32).masked_fill_(~real, float("-inf"))
            mask = added if masked else None
        elif masked or window:
            seen = real[:, None, None, :].expand(batch, 1, length, length)
            if window:
                seen = seen & ((place[:, None] - place).abs() <= layer.window)
            mask = torch.zeros(seen.shape, dtype=torch.float32).masked_fill_(~seen, lowest)
        calls.append({layer.mask: mask, **positions.get(layer.kind, {})})
    return calls, tables


def run_layers(layers: Sequence[nn.Module], calls: Sequence[dict[str, Any]], hidden: Tensor) -> tuple[Tensor, bool]:
    """(hidden states behind the last layer, whether the layers give tuples). :class:`UnknownLayer` on other results."""
    in_tuples = False
    for layer, call in zip(layers, calls):
        result = layer(hidden, **call)
        in_tuples = isinstance(result, tuple)
        hidden = result[0] if isinstance(result, tuple) and len(result) == 1 else result
        if not isinstance(hidden, Tensor):
            raise UnknownLayer(f"a layer gives {type(result).__name__} where hidden states are expected")
    return hidden, in_tuples


def prove(layers: Sequence[nn.Module], parts: Sequence[LayerParts], bound: BoundEncoder) -> bool:
    """Whether the layers give tuples. :class:`UnknownLayer` where layers and program do not agree on what is real.

    Where products round activations, the same steps are proven without any rounding, and then once more with it, less
    strictly: what differs in the last bit may round to the next number.
    """
    projections = [p for part in parts for p in part.projections]
    if not any(map(rounds, projections)):
        return _prove(layers, parts, bound, _TOLERANCE)
    if not any(isinstance(p.module, PackedLinear) for p in projections):  # which have nothing exact left
        with exact(projections):
            built = build(parts)
            _prove(layers, parts, BoundEncoder(built.tensors, *built.program.encode()), _TOLERANCE)
    return _prove(layers, parts, bound, _ROUNDED_TOLERANCE)


def _prove(layers: Sequence[nn.Module], parts: Sequence[LayerParts], bound: BoundEncoder, tolerance: float) -> bool:
    generator = torch.Generator().manual_seed(0)
    windows = {p.window + 7 for p in parts if 0 <= p.window <= _LONGEST}
    in_tuples, first = False, parts[0].sequence_first
    with torch.no_grad(), evaluating(*layers):
        for length in (*_LENGTHS, *sorted(windows)):
            hidden = torch.randn(_BATCH, length, parts[0].hidden, generator=generator, dtype=torch.float32)
            real = torch.rand(_BATCH, length, generator=generator) < 0.7
            real[:, length // 2] = True  # a sequence of padding alone is nobody's business
            for masked in (False, True):
                counted = real if masked else torch.ones_like(real)
                calls, tables = example(parts, counted, masked, generator)
                x = hidden.transpose(0, 1) if first else hidden
                with foreign("its layers do not take the call that was tried"):
                    expected, in_tuples = run_layers(layers, calls, x)
                    expected = expected.transpose(0, 1) if first else expected
                found = bound(hidden, real if masked else None, tables)
                if expected.shape != found.shape:
                    raise UnknownLayer(f"its layers give {list(expected.shape)}, the program {list(found.shape)}")
                expected, found = expected[counted], found[counted]
                far = float((expected - found).abs().max())
                if not far <= tolerance * max(1.0, float(expected.abs().max())):
                    raise UnknownLayer(f"layers and program differ by {far:.1e} on random input")
    return in_tuples
