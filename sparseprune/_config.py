"""Configurations: frozen dataclasses that go to JSON and back. Floor 0: imports nothing of the package.

A configuration names its class under ``"kind"``, looked up in a table of those that exist, so that reading one runs no
code. Classes of this package go by their bare names, any other by its module too: a user's own class may have any name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

__all__ = ["Config", "described"]

C = TypeVar("C", bound="Config")

_PACKAGE = __name__.partition(".")[0]
_KINDS: dict[str, type[Config]] = {}


def kind_of(cls: type[Config]) -> str:
    """What files call this class."""
    own = cls.__module__.partition(".")[0] == _PACKAGE
    return cls.__name__ if own else f"{cls.__module__}.{cls.__qualname__}"


class Config:
    """Base of every configuration. Subclasses are frozen dataclasses; fields are numbers, strings, bools, None, tuples,
    dicts keyed by strings, or further configurations.

    ``to_json`` / ``from_json`` (and ``to_dict`` / ``from_dict``) are inverse. An unknown key, a missing one, a value of
    another type or another ``VERSION`` raises ValueError with a one-line remedy.
    """

    VERSION: ClassVar[int] = 1

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _KINDS[kind_of(cls)] = cls

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts and scalars, with ``kind`` and ``version``."""
        return {"kind": kind_of(type(self)), "version": self.VERSION, **_fields_out(self)}

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_dict(cls: type[C], data: Any) -> C:
        value = _config_in(data, cls.__name__, cls)
        if not isinstance(value, cls):
            raise ValueError(f"{cls.__name__}: expected this kind, got kind {type(value).__name__!r}")
        return value

    @classmethod
    def from_json(cls: type[C], text: str | bytes) -> C:
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: not valid JSON: {error}") from None
        return cls.from_dict(data)


def described(config: Config) -> dict[str, Any]:
    """As ``to_dict``, with the names of functions, and of the classes of other objects, in their places: what two
    processes say alike of one configuration.
    """
    return {"kind": kind_of(type(config)), "version": config.VERSION, **_fields_out(config, _named)}


def _named(value: Any, path: str) -> str:
    known = value if hasattr(value, "__qualname__") else type(value)
    return f"{known.__module__}.{known.__qualname__}"


def _refused(value: Any, path: str) -> Any:
    raise ValueError(f"{path}: {value!r} cannot be written as JSON; register it under a name and use the name")


def _out(value: Any, path: str, other: Callable[[Any, str], Any]) -> Any:
    if isinstance(value, Config):
        return {"kind": kind_of(type(value)), **_fields_out(value, other)}
    if isinstance(value, (list, tuple)):
        return [_out(item, path, other) for item in value]
    if isinstance(value, dict):
        return {str(key): _out(item, f"{path}[{key!r}]", other) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return other(value, path)


def _fields_out(config: Config, other: Callable[[Any, str], Any] = _refused) -> dict[str, Any]:
    kind = type(config).__name__
    return {f.name: _out(getattr(config, f.name), f"{kind}.{f.name}", other) for f in _fields(type(config))}


def _fields(cls: type[Config]) -> tuple[dataclasses.Field[Any], ...]:
    return tuple(f for f in dataclasses.fields(cls) if f.init)  # type: ignore[arg-type]


def _config_in(data: Any, path: str, default: type[Config] | None) -> Config:
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, got {data!r}")
    data = dict(data)
    kind = data.pop("kind", kind_of(default) if default is not None else None)
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None or not dataclasses.is_dataclass(cls):
        raise ValueError(f"{path}: unknown kind {kind!r}{_near(str(kind), list(_KINDS))}")
    name = cls.__name__
    version = data.pop("version", cls.VERSION)
    if version != cls.VERSION:
        raise ValueError(f"{path}: version {version!r} of {kind} is not known here, expected {cls.VERSION}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in _fields(cls)]
    for key in data:
        if key not in names:
            raise ValueError(f"{name}: unknown key {key!r}{_near(key, names)}; known: {', '.join(names) or 'none'}")
    values = {}
    for field in _fields(cls):
        if field.name in data:
            values[field.name] = _in(data[field.name], hints[field.name], f"{name}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{name}: key {field.name!r} is missing")
    return cls(**values)


def _in(value: Any, hint: Any, path: str) -> Any:
    """The value as the field holds it: lists become tuples, objects become configurations where the hint says so."""
    options = _options(hint)
    configs = [o for o in options if isinstance(o, type) and issubclass(o, Config)]
    if isinstance(value, dict) and configs and ("kind" in value or dict not in _origins(options)):
        built = _config_in(value, path, configs[0] if len(configs) == 1 else None)
        if not isinstance(built, tuple(configs)):
            raise ValueError(f"{path}: expected {_words(options)}, got kind {type(built).__name__!r}")
        return built
    for option in options:
        origin = typing.get_origin(option) or option
        arguments = typing.get_args(option)
        if isinstance(value, list) and origin in (tuple, list):
            if origin is tuple and arguments and arguments[-1] is not Ellipsis:
                if len(value) != len(arguments):
                    raise ValueError(f"{path}: expected {len(arguments)} entries, got {len(value)}")
                return tuple(_in(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, arguments)))
            inner = arguments[0] if arguments else Any
            return origin(_in(v, inner, f"{path}[{i}]") for i, v in enumerate(value))
        if isinstance(value, dict) and origin in (dict, typing.get_origin(typing.Mapping[str, Any])):
            inner = arguments[1] if len(arguments) == 2 else Any
            return {key: _in(item, inner, f"{path}[{key!r}]") for key, item in value.items()}
        if option is Any or _is_scalar(value, origin, arguments):
            return float(value) if origin is float else value
    raise ValueError(f"{path}: expected {_words(options)}, got {value!r}")


def _is_scalar(value: Any, origin: Any, arguments: tuple[Any, ...]) -> bool:
    if origin is typing.Literal:
        return value in arguments and type(value) in {type(a) for a in arguments}
    if origin is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is type(None):
        return value is None
    return origin in (str, bool) and isinstance(value, origin)


def _options(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [hint]


def _origins(options: list[Any]) -> list[Any]:
    mapping = typing.get_origin(typing.Mapping[str, Any])
    origins = [typing.get_origin(option) or option for option in options]
    return [dict if origin is mapping else origin for origin in origins]


def _words(options: list[Any]) -> str:
    names = []
    for option in options:
        if typing.get_origin(option) is typing.Literal:
            names += [repr(argument) for argument in typing.get_args(option)]
        elif option is type(None):
            names.append("null")
        else:
            names.append(option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option))
    return " or ".join(names)


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
