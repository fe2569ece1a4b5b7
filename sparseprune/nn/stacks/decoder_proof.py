"""The proof that a program computes what decoder layers compute: both run on random input, behind what is in a cache,
or as a prompt that fills one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...native.decoder import BoundDecoder, mask_numbers, table_numbers
from ...native.encoder import cache_numbers
from ..modes import evaluating
from ..packed_only import PackedLinear
from ..rounded import RoundedLinear
from .decoder_build import build_decoder
from .decoder_parts import DecoderParts
from .decoder_prompt import BoundPrompt
from .proof import run_layers
from .recognise import UnknownLayer, foreign
from .weights import exact, rounds

__all__ = ["Example", "Grown", "prove_decoder", "prove_prompt"]

_CASES = ((1, 1, 1), (2, 6, 1), (2, 9, 3))  # sequences, tokens in the cache, new ones
_PROMPTS = ((1, 1), (2, 9), (1, 70))  # sequences, tokens
_TOLERANCE = 1e-4  # of the largest value
_ROUNDED_TOLERANCE = 5e-2
_WHOLE_TOLERANCE = 1e-2  # of all layers of a prompt


class Grown:
    """The least that a layer asks of a cache."""

    def __init__(self) -> None:
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, place: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for held, new in ((self.keys, keys), (self.values, values)):
            held[place] = torch.cat([held[place], new], 2) if place in held else new
        return self.keys[place], self.values[place]

    def get_seq_length(self, place: int = 0) -> int:
        return self.keys[place].shape[2] if place in self.keys else 0


class Example:
    """Random hidden states of ``batch`` sequences, ``past`` of whose tokens are in a cache and ``tokens`` are new.
    seen: bool `[B, past + tokens, past + tokens]`, which keys each token sees.
    """

    def __init__(self, parts: Sequence[DecoderParts], batch: int, past: int, tokens: int, padded: bool) -> None:
        self.parts, self.past = parts, past
        generator = torch.Generator().manual_seed(past)
        whole = past + tokens
        self.hidden = torch.randn(batch, whole, parts[0].hidden, generator=generator, dtype=torch.float32)
        self.seen = torch.ones(batch, whole, whole, dtype=torch.bool).tril()
        if padded:
            self.seen[0, :, : past // 2] = False
            self.seen |= torch.eye(whole, dtype=torch.bool)  # a token that sees nothing is nobody's business
        self.tables: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in parts:
            if layer.kind not in self.tables:
                angle = torch.rand(1, whole, layer.turned // 2, generator=generator, dtype=torch.float32)
                angle = angle.mul_(6).repeat(1, 1, 2)
                self.tables[layer.kind] = angle.cos(), angle.sin()

    def layers(self, layers: Sequence[nn.Module], cache: Any, begin: int, end: int) -> Tensor:
        """What the layers give for the tokens [begin, end), as they are called with a cache."""
        return self.by_layers(layers, cache, begin, end)()

    def by_layers(
        self, layers: Sequence[nn.Module], cache: Any, begin: int, end: int, plain: bool = False
    ) -> Callable[[], Tensor]:
        """The same as a call for which everything is made; plain: without a mask."""
        lowest = torch.finfo(torch.float32).min
        mask = torch.zeros(self.seen[:, None, begin:end, :end].shape, dtype=torch.float32)
        mask.masked_fill_(~self.seen[:, None, begin:end, :end], lowest)
        calls = []
        for layer, parts in zip(layers, self.parts):
            call: dict[str, Any] = {parts.mask: None if plain else mask, parts.cache: cache}
            if parts.turned:
                cos, sin = self.tables[parts.kind]
                call["position_embeddings"] = (cos[:, begin:end], sin[:, begin:end])
            if "use_cache" in inspect.signature(type(layer).forward).parameters:
                call["use_cache"] = True
            calls.append(call)
        hidden = self.hidden[:, begin:end].contiguous()
        return lambda: run_layers(layers, calls, hidden)[0]

    def program(self, bound: BoundDecoder, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """The same of the new tokens by the program; keys, values: of each layer, with room."""
        return self.by_program(lambda: bound, keys, values)()

    def by_program(
        self, bound: Callable[[], BoundDecoder], keys: list[Tensor], values: list[Tensor], plain: bool = False
    ) -> Callable[[], Tensor]:
        """The same as a call for which everything but ``bound`` is made; plain: without a mask."""
        past, whole = self.past, self.hidden.shape[1]
        cache = [n for k, v in zip(keys, values) for n in cache_numbers(k, v)]
        seen = self.seen[:, past:].contiguous()
        masks = [(0, 0, 0, whole) if plain else mask_numbers(seen) for _ in self.tables]
        turned = [(cos[:, past:].contiguous(), sin[:, past:].contiguous()) for cos, sin in self.tables.values()]
        tables = [table_numbers(*pair) for pair in turned]
        hidden, room = self.hidden[:, past:].contiguous(), keys[0].shape[2]
        numbers = _flat(masks), _flat(tables)
        held = keys, values, seen, turned  # what the numbers point to

        def run() -> Tensor:
            assert held
            return bound()(hidden, cache, room, past, *numbers)

        return run

    def by_prompt(self, bound: BoundPrompt, real: Tensor | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """(the same of a prompt, the keys and the values of each layer); real: bool `[B, S]`, None: all tokens are."""
        batch, tokens, _ = self.hidden.shape
        sizes = [(batch, p.kv_heads, tokens, p.depth) for p in self.parts]
        keys, values = ([torch.zeros(size, dtype=torch.float32) for size in sizes] for _ in range(2))
        turning = {p.kind for p in self.parts if p.turned}
        pairs = [pair for kind, pair in self.tables.items() if kind in turning]
        tables = [table.expand(batch, -1, -1).contiguous() for pair in pairs for table in pair]
        numbers = [n for k, v in zip(keys, values) for n in cache_numbers(k, v)]
        return bound(self.hidden, real, tables, numbers), keys, values


def _flat(groups: Sequence[Sequence[int]]) -> list[int]:
    return [n for group in groups for n in group]


def prove_decoder(layers: Sequence[nn.Module], parts: Sequence[DecoderParts], bound: BoundDecoder) -> bool:
    """Whether the layers give tuples. :class:`UnknownLayer` where layers and program do not agree.

    Where products round activations, the same steps are proven without any rounding, and then layer by layer with it,
    less strictly: what differs in the last bit may round to the next number, which many layers make more of. Layers
    that read a rounded copy for so many rows read it here for all that are tried, as the program does.
    """
    projections = [p for part in parts for p in part.projections]
    with _rounded_rows([p.module for p in projections], max(batch * tokens for batch, _, tokens in _CASES)):
        if not any(map(rounds, projections)):
            return _prove(layers, parts, bound, False)
        if not any(isinstance(p.module, PackedLinear | RoundedLinear) for p in projections):
            with exact(projections):  # of packed and rounded ones nothing exact is read
                _prove(layers, parts, _bound(parts), False)
        in_tuples = False
        for layer, part in zip(layers, parts):
            in_tuples = _prove([layer], [part], _bound([part]), True)
        return in_tuples


def prove_prompt(layers: Sequence[nn.Module], parts: Sequence[DecoderParts], bound: BoundPrompt) -> bool:
    """Whether calls without a mask were tried too, which layers that add masks to scores do not get.
    :class:`UnknownLayer` where the layers and their program for prompts do not agree: layer by layer, and less
    strictly, for in many layers on random input the last bit becomes more, all of them. With rounded activations as
    :func:`prove_decoder`; of weights that are rounded for few rows both read the exact ones.
    """
    projections = [p for part in parts for p in part.projections]
    rounded = any(map(rounds, projections))
    with _rounded_rows([p.module for p in projections], 0):
        if not rounded:
            _prove_prompt(layers, parts, bound, _WHOLE_TOLERANCE)
        elif not any(isinstance(p.module, PackedLinear) for p in projections):
            with exact(projections):
                _prove_prompt(layers, parts, BoundPrompt(parts), _WHOLE_TOLERANCE)
        for layer, part in zip(layers, parts):
            _prove_prompt([layer], [part], BoundPrompt([part]), _ROUNDED_TOLERANCE if rounded else _TOLERANCE)
    return not _eager(layers)


@contextmanager
def _rounded_rows(modules: Sequence[nn.Module], most: int) -> Iterator[None]:
    held = {module: module.rows for module in modules if isinstance(module, RoundedLinear)}
    try:
        for module in held:
            module.rows = most
        yield
    finally:
        for module, rows in held.items():
            module.rows = rows


def _bound(parts: Sequence[DecoderParts]) -> BoundDecoder:
    built = build_decoder(parts)
    return BoundDecoder(built.tensors, *built.program.encode())


def _prove(
    layers: Sequence[nn.Module], parts: Sequence[DecoderParts], bound: BoundDecoder, rounded: bool
) -> bool:
    in_tuples, tolerance = False, _ROUNDED_TOLERANCE if rounded else _TOLERANCE
    with torch.no_grad(), evaluating(*layers):
        for batch, past, tokens in _CASES:
            example, cache = Example(parts, batch, past, tokens, past > 1), Grown()
            whole = past + tokens
            with foreign("its layers do not take the call that was tried"):
                example.layers(layers, cache, 0, past)
                if len(cache.keys) != len(layers):
                    raise UnknownLayer("its layers keep no keys in the cache they are given")
                held = [[_with_room(t[p.place], whole) for t in (cache.keys, cache.values)] for p in parts]
                expected = example.layers(layers, cache, past, whole)
                first = example.hidden[:, :1]
                in_tuples = isinstance(layers[0](first, **_first_call(layers[0], parts[0], example)), tuple)
            keys, values = [k for k, _ in held], [v for _, v in held]
            if any(k.shape[1:] != (p.kv_heads, whole + 1, p.depth) for p, k in zip(parts, keys)):
                raise UnknownLayer(f"its cache holds {list(keys[0].shape)}")
            found = example.program(bound, keys, values)
            _compare(expected, found, tolerance)
            for p, k, v in zip(parts, keys, values):
                _compare(cache.keys[p.place], k[:, :, :whole], tolerance)
                _compare(cache.values[p.place], v[:, :, :whole], tolerance)
    return in_tuples


def _prove_prompt(
    layers: Sequence[nn.Module], parts: Sequence[DecoderParts], bound: BoundPrompt, tolerance: float
) -> None:
    with torch.no_grad(), evaluating(*layers):
        for batch, tokens in _PROMPTS:
            example, cache = Example(parts, batch, 0, tokens, False), Grown()
            real = torch.ones(batch, tokens, dtype=torch.bool)
            if batch > 1:
                real[0, : tokens // 2] = False
                example.seen &= real[:, None]
                example.seen |= torch.eye(tokens, dtype=torch.bool)
            with foreign("its layers do not take the prompt that was tried"):
                expected = example.layers(layers, cache, 0, tokens)
                plain = example.by_layers(layers, Grown(), 0, tokens, True)() if batch == 1 else expected
                held = [(cache.keys[p.place], cache.values[p.place]) for p in parts]
            found, keys, values = example.by_prompt(bound, real if batch > 1 else None)
            for given in (expected, plain):
                _check_shape(given, found)
            _compare(expected[real], found[real], tolerance)
            if not _eager(layers):  # they attend to all where there is no mask; the program takes no such call
                _compare(plain[real], found[real], tolerance)
            for k, v, (their_k, their_v) in zip(keys, values, held):
                for mine, theirs in ((k, their_k), (v, their_v)):
                    _check_shape(theirs, mine)
                    _compare(theirs.transpose(1, 2)[real], mine.transpose(1, 2)[real], tolerance)


def _eager(layers: Sequence[nn.Module]) -> bool:
    configs = (vars(m).get("config") for layer in layers for m in layer.modules())
    return any(getattr(config, "_attn_implementation", None) == "eager" for config in configs)


def _first_call(layer: nn.Module, parts: DecoderParts, example: Example) -> dict[str, Any]:
    call: dict[str, Any] = {parts.mask: None}
    if parts.turned:
        cos, sin = example.tables[parts.kind]
        call["position_embeddings"] = (cos[:, :1], sin[:, :1])
    return call


def _with_room(tensor: Tensor, whole: int) -> Tensor:
    room = tensor.new_zeros((*tensor.shape[:2], whole + 1, tensor.shape[3]))
    room[:, :, : tensor.shape[2]] = tensor
    return room


def _check_shape(given: Any, found: Tensor) -> None:
    if not isinstance(given, Tensor) or given.shape != found.shape:
        shape = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise UnknownLayer(f"its layers give {shape}, the program {list(found.shape)}")


def _compare(expected: Any, found: Tensor, tolerance: float) -> None:
    _check_shape(expected, found)
    far = float((expected - found).abs().max())
    if not far <= tolerance * max(1.0, float(expected.abs().max())):
        raise UnknownLayer(f"layers and program differ by {far:.1e} on random input")
