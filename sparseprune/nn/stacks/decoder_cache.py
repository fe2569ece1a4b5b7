"""The caches of transformers as memory that a program appends to.

A ``StaticCache`` has its room already. The tensors of a ``DynamicCache`` grow by concatenation, a copy of everything a
token; here they become views of one buffer with room behind them, so that a token is written where it belongs and the
views become one longer. They stay ordinary tensors to everybody else: whoever reorders, crops or concatenates them gets
new ones, which are then copied into a new buffer. A buffer is only ever written behind the last view that was made of
it, and only while the cache still holds that view, so that no one who kept an older one sees it change.
"""

from __future__ import annotations

import sys
import weakref
from itertools import chain
from operator import attrgetter, is_
from typing import Any, Protocol

import torch
from torch import Tensor

from ...native.encoder import cache_numbers
from .masks import Unsupported

__all__ = ["Prompted", "Space", "is_empty", "space_in"]

_keys, _values, _lengths = attrgetter("keys"), attrgetter("values"), attrgetter("cumulative_length")
_MISSING = object()
_KEEPING = ("DynamicLayer", "StaticLayer", "DynamicSlidingWindowLayer")  # layers of caches that are known
_LEAST_ROOM, _MOST_ROOM = 64, 1024  # places made behind the last one, at least and at most


class Space(Protocol):
    """Where the new tokens of a call go. numbers: of every layer (:func:`cache_numbers`); room: places of all layers;
    past: tokens that are there.
    """

    numbers: list[int]
    room: int
    past: int
    whole: bool  # masks cover all of the room

    def commit(self, tokens: int) -> None:
        """Makes the cache hold these new tokens, which have been written."""

    def undo(self) -> None:
        """Makes the cache hold what it held before the last :meth:`commit`."""


class _Room:
    """The layers of a dynamic cache as views of one buffer `[2 layers, B, heads, room, depth]`."""

    whole = False

    def __init__(self, held: list[Tensor], past: int, tokens: int) -> None:
        batch, heads, _, depth = held[0].shape
        self.room = past + tokens + min(max(_LEAST_ROOM, past // 2), _MOST_ROOM)
        self.buffer = held[0].new_empty((len(held), batch, heads, self.room, depth))
        for i, tensor in enumerate(held):
            self.buffer[i, :, :, :past] = tensor
        self.past = past
        self.views = held
        self._before = held, past
        self.layers: list[Any] = []
        parts = self.buffer.unbind(0)
        self.numbers = [n for k, v in zip(parts[::2], parts[1::2]) for n in cache_numbers(k, v)]

    def holds(self, held: list[Tensor], tokens: int) -> bool:
        same = len(held) == len(self.views) and all(map(is_, held, self.views))
        return same and self.past + tokens <= self.room

    def commit(self, tokens: int) -> None:
        self._before = self.views, self.past
        self._hold(list(self.buffer[:, :, :, : self.past + tokens].unbind(0)), self.past + tokens)

    def undo(self) -> None:
        self._hold(*self._before)

    def _hold(self, views: list[Tensor], past: int) -> None:
        tokens = past - self.past
        self.views, self.past = views, past
        for layer, k, v in zip(self.layers, views[::2], views[1::2]):
            layer.keys, layer.values = k, v
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length += tokens


_ROOMS: weakref.WeakKeyDictionary[Any, _Room] = weakref.WeakKeyDictionary()


class _Static:
    """The layers of a static cache."""

    whole = True

    def __init__(self, layers: list[Any], held: list[Tensor], past: int) -> None:
        self.held, self.past, self._written = held, past, 0
        self._lengths: list[Tensor] = list(map(_lengths, layers))
        self.room = held[0].shape[2]
        self.numbers = [n for k, v in zip(held[::2], held[1::2]) for n in cache_numbers(k, v)]

    def commit(self, tokens: int) -> None:
        self._written = tokens
        torch._foreach_add_(self._lengths, tokens)
        tracked = [t for t in self.held if not t.is_inference()]
        if tracked:
            torch.autograd.graph.increment_version(tracked)

    def undo(self) -> None:
        torch._foreach_sub_(self._lengths, self._written)


def _exact(cache: Any) -> bool:
    """Whether this is a DynamicCache or a StaticCache, and no class of somebody's."""
    module = sys.modules.get("transformers.cache_utils")
    kinds = (getattr(module, "DynamicCache", None), getattr(module, "StaticCache", None))
    return cache is not None and type(cache) in kinds and not getattr(cache, "offloading", False)


def is_empty(cache: Any) -> bool:
    """Whether this is a DynamicCache or a StaticCache of layers that are known, in none of which is a token."""
    if not _exact(cache):
        return False
    layers = _part(cache, "layers", list)
    grown: Any = getattr(cache, "layer_class_to_replicate", None)
    kinds = [*map(type, layers), *([] if grown is None else [grown])]
    if any(k.__module__ != "transformers.cache_utils" or k.__name__ not in _KEEPING for k in kinds):
        return False
    return not any(int(layer.get_seq_length()) for layer in layers)


class Prompted:
    """The keys and values of a prompt on their way into an empty cache's layers ``places``, each of ``size`` `[B,
    heads, S, depth]`; 0 where a token is not real, unless all are ``real``.
    """

    def __init__(self, cache: Any, places: tuple[int, ...], size: tuple[int, int, int, int], real: bool) -> None:
        make = torch.empty if real else torch.zeros
        self._parts = [make(size, dtype=torch.float32, device="cpu") for _ in range(2 * len(places))]
        self._cache, self._places = cache, places
        self._before = [dict(vars(layer)) for layer in cache.layers]
        self.numbers = [n for k, v in zip(self._parts[::2], self._parts[1::2]) for n in cache_numbers(k, v)]

    def commit(self) -> None:
        """Hands them to the cache, layer by layer, as layers would."""
        for place, k, v in zip(self._places, self._parts[::2], self._parts[1::2]):
            self._cache.update(k, v, place)
        self._parts.clear()

    def undo(self) -> None:
        """Makes the cache empty again."""
        del self._cache.layers[len(self._before) :]
        for layer, before in zip(self._cache.layers, self._before):
            length = vars(layer).get("cumulative_length")
            if isinstance(length, Tensor):
                length.zero_()  # of a static cache: what it says in its other attributes, it said before
            vars(layer).clear()
            vars(layer).update(before)


def space_in(cache: Any, places: tuple[int, ...], batch: int, tokens: int, heads: int, depth: int) -> Space:
    """Room for ``tokens`` new tokens of ``batch`` sequences behind those in the cache's layers ``places``, each with
    heads of keys and of values of this depth. :class:`Unsupported` on another cache than an exact DynamicCache or
    StaticCache that holds a token already.
    """
    if not _exact(cache):
        what = "no cache" if cache is None else f"the cache {type(cache).__name__}"
        raise Unsupported(f"the call has {what}; the program appends to a DynamicCache or a StaticCache")
    found = _part(cache, "layers")
    if len(found) <= max(places):
        raise Unsupported("the cache is empty: the layers answer the first call")
    layers = [found[i] for i in places]
    names = {type(layer).__name__ for layer in layers}
    for layer in layers:
        _check_layer(layer, tokens)
    held: list[Tensor] = list(chain.from_iterable(zip(map(_keys, layers), map(_values, layers))))
    static = names == {"StaticLayer"}
    room = None if static else _ROOMS.get(cache)
    if room is not None and room.holds(held, tokens) and room.layers == layers:
        _check_shapes(held[:1], batch, heads, depth)
        return room
    _check_shapes(held, batch, heads, depth)
    if static:
        lengths = {int(_part(layer, "cumulative_length", Tensor)) for layer in layers}
        if len(lengths) != 1 or any(t.stride(2) != depth or t.stride(3) != 1 for t in held):
            raise Unsupported("the layers of the cache differ in what they hold")
        past = lengths.pop()
        if not past or past + tokens > held[0].shape[2]:
            raise Unsupported(f"the cache holds {past} of {held[0].shape[2]} tokens")
        return _Static(layers, held, past)
    _ROOMS.pop(cache, None)
    made = _Room(held, held[0].shape[2], tokens)
    made.layers = layers
    _ROOMS[cache] = made
    return made


def _part(holder: Any, name: str, kind: type = object) -> Any:
    """An attribute that transformers keeps to itself. :class:`Unsupported` where this version has none of this kind."""
    found = getattr(holder, name, _MISSING)
    if found is _MISSING or not isinstance(found, kind):
        what = "has none" if found is _MISSING else f"has {type(found).__name__}"
        raise Unsupported(f"the program reads {name} of {type(holder).__name__}, which {what} in this transformers")
    return found


def _check_layer(layer: Any, tokens: int) -> None:
    """:class:`Unsupported` unless this layer keeps all that it is given, for now."""
    kind = type(layer)
    known = kind.__name__ if kind.__module__ == "transformers.cache_utils" else ""
    if known in _KEEPING and _part(layer, "is_initialized"):
        for name in ("keys", "values"):
            _part(layer, name, Tensor)
        if known != "DynamicSlidingWindowLayer":
            return
        if _part(layer, "record_past"):
            raise Unsupported("the cache slides, and records what it would forget until it is cropped")
        if _part(layer, "cumulative_length", int) + tokens < _part(layer, "sliding_window", int):
            return
        raise Unsupported(f"the cache slides: it keeps {layer.sliding_window - 1} tokens")
    if not getattr(layer, "is_initialized", False):
        raise Unsupported("the cache is empty: the layers answer the first call")
    raise Unsupported(f"the cache has layers of {kind.__name__}")


def _check_shapes(held: list[Tensor], batch: int, heads: int, depth: int) -> None:
    first = held[0]
    for tensor in held:
        if type(tensor) is not Tensor or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            raise Unsupported(f"needs a cache in float32 on the CPU, got {type(tensor).__name__} {tensor.dtype}")
        if tensor.shape != first.shape or tensor.requires_grad:
            raise Unsupported("the layers of the cache differ in what they hold")
    if (first.shape[0], first.shape[1], first.shape[3]) != (batch, heads, depth) or first.shape[2] < 1:
        raise Unsupported(f"the cache holds {list(first.shape)} for {batch} sequences, {heads} heads of {depth}")
