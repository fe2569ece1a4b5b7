"""Layers against programs of a decoder, for new tokens and for prompts, timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import bench
from .decoder_forward import DecoderForward
from .decoder_parts import DecoderParts
from .decoder_proof import Example, Grown
from .masks import Unsupported

__all__ = ["FEW", "measure_decoder", "measure_prompts"]

FEW = 8  # new tokens, up to which a count of ``tokens`` is one of decoding
_PAST = 64  # tokens in the cache


class _Grows:
    """A cache that hands on what it would hold, and stays as it is."""

    def __init__(self, keys: dict[int, Tensor], values: dict[int, Tensor]) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, place: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self._keys[place], keys], 2), torch.cat([self._values[place], values], 2)

    def get_seq_length(self, place: int = 0) -> int:
        return self._keys[place].shape[2]


def measure_decoder(
    stack: DecoderForward, layers: nn.ModuleList, tokens: Sequence[int], min_ratio: float, note: str
) -> bench.Choice:
    """One new token of as many sequences as each number of ``tokens`` up to 8 says, with 64 in the cache.
    :class:`Unsupported` where there is none. Timed is what a call does: what it is called with is there, and the
    program asks whether it is still that of its layers.
    """
    few = sorted(count for count in tokens if count <= FEW)
    if not few:
        raise Unsupported(f"no call of up to {FEW} tokens among tokens={tuple(tokens)}")
    parts = stack.ready().parts
    cases: dict[int, tuple[Example, list[Tensor], list[Tensor]]] = {}

    def case(count: int) -> tuple[Example, list[Tensor], list[Tensor]]:
        """One cache for both: the program writes behind what the layers read, the same at every call."""
        if count not in cases:
            cases.clear()  # numbers come one after the other
            generator = torch.Generator().manual_seed(0)
            sizes = [(count, p.kv_heads, _PAST + 1, p.depth) for p in parts]
            keys, values = ([torch.randn(s, generator=generator, dtype=torch.float32) for s in sizes] for _ in range(2))
            cases[count] = Example(parts, count, _PAST, 1, False), keys, values
        return cases[count]

    def one_by_one(count: int) -> Callable[[], object]:
        made, keys, values = case(count)
        held = [{p.place: t[:, :, :_PAST] for p, t in zip(parts, some)} for some in (keys, values)]
        return made.by_layers(list(layers), _Grows(*held), _PAST, _PAST + 1, True)

    def program(count: int) -> Callable[[], object]:
        made, keys, values = case(count)
        return made.by_program(lambda: stack.ready().program, keys, values, True)

    try:
        return _fastest(one_by_one, program, few, parts, min_ratio, f"one token,{note}")
    finally:
        cases.clear()


def measure_prompts(
    stack: DecoderForward, layers: nn.ModuleList, tokens: Sequence[int], note: str
) -> bench.Choice | None:
    """One prompt of as many tokens as each number of ``tokens`` above 8 says, into an empty cache; None where there is
    no such number. :class:`Unsupported` where there is no program.
    """
    many = sorted(count for count in tokens if count > FEW)
    if not many:
        return None
    parts = stack.ready().parts
    stack.prompts()  # proven, so that no timing holds the proof

    def one_by_one(count: int) -> Callable[[], object]:
        made = Example(parts, 1, 0, count, False)
        return lambda: made.by_layers(list(layers), Grown(), 0, count, True)()

    def program(count: int) -> Callable[[], object]:
        made = Example(parts, 1, 0, count, False)
        return lambda: made.by_prompt(stack.prompts())[0]

    return _fastest(one_by_one, program, many, parts, 1.0, f"prompt,{note}")


def _fastest(
    layers: Callable[[int], Callable[[], object]], program: Callable[[int], Callable[[], object]],
    tokens: Sequence[int], parts: Sequence[DecoderParts], min_ratio: float, note: str,
) -> bench.Choice:  # fmt: skip
    first = parts[0]
    shape = f"heads={first.heads}/{first.kv_heads}x{first.depth},ffn={first.inner},{note}"
    return bench.choose_fastest(
        {"layers": layers, "program": program},
        tokens=tokens,
        baseline="layers",
        min_ratio=min_ratio,
        key=lambda label, count: bench.layer_key((len(parts), first.hidden), 1.0, label, count, torch.float32, shape),
    )
