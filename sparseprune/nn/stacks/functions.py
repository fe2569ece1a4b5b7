"""The functions that a forward calls by their names, and whether those names still mean them: whoever replaces one
(``modeling_llama.apply_rotary_pos_emb = mine``) changes what layers compute, and no module of theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from operator import is_
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

__all__ = ["CalledFunctions"]

_Kind = type[nn.Module] | None
# Packages whose functions are not read, for what they call in turn is their own; of torch's modules methods are.
_OWN = sys.stdlib_module_names | {__name__.partition(".")[0]}
_LEFT = _OWN | {"torch"}


class CalledFunctions:
    """What the forwards of these classes, and ``others``, call by name, as it was: methods of the classes, functions of
    their modules and of modules that these name, torch's among them, and what those functions call in turn.
    """

    def __init__(self, kinds: Iterable[type[nn.Module]], others: Iterable[Any]) -> None:
        self._methods: dict[tuple[type[nn.Module], str], Any] = {}
        self._spaces: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}  # a namespace, and what of it is called
        self._waiting: list[tuple[_Kind, Any]] = [(None, other) for other in others]
        for kind in kinds:
            self._add_method(kind, "forward")
        seen: set[tuple[_Kind, CodeType]] = set()
        while self._waiting:
            owner, function = self._waiting.pop()
            if not isinstance(function, FunctionType) or (owner, function.__code__) in seen:
                continue
            seen.add((owner, function.__code__))
            self._waiting.append((owner, getattr(function, "__wrapped__", None)))
            if _root(function.__globals__) not in (_LEFT if owner is None else _OWN):
                self._read(owner, function)
        self._called = [(space.get, list(held), list(held.values())) for space, held in self._spaces.values()]

    def _add_method(self, kind: type[nn.Module], name: str) -> None:
        self._methods[kind, name] = method = getattr(kind, name)
        self._waiting.append((kind, method))

    def _read(self, kind: _Kind, function: FunctionType) -> None:
        names = list(dict.fromkeys(_names(function.__code__)))
        if kind is not None:
            for name in names:
                method = getattr(kind, name, None)
                new = (kind, name) not in self._methods and not hasattr(nn.Module, name)
                if new and isinstance(method, FunctionType):
                    self._add_method(kind, name)
        spaces = [function.__globals__]
        for space in spaces:  # which grows by the modules that are named
            for name in names:
                value = space.get(name)
                if isinstance(value, ModuleType):
                    inside = vars(value)
                    if _root(inside) not in sys.stdlib_module_names and all(inside is not one for one in spaces):
                        spaces.append(inside)
                elif callable(value):
                    self._spaces.setdefault(id(space), (space, {}))[1][name] = value
                    self._waiting.append((None, value))

    def same(self) -> bool:
        """Whether each name means what it meant."""
        return all(getattr(kind, name, None) is meant for (kind, name), meant in self._methods.items()) and all(
            all(map(is_, map(get, names), values)) for get, names, values in self._called
        )


def _root(space: dict[str, Any]) -> str:
    """The package that a namespace belongs to."""
    return str(space.get("__name__", "")).partition(".")[0]


def _names(code: CodeType) -> Iterator[str]:
    """The names that this code, and what is defined in it, looks up outside itself."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
