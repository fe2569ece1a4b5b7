"""What a checkpoint says about a model besides its tensors: to JSON and back. Everything read is checked by itself
here; against the tensors in :mod:`.file`, against a model in :mod:`.fit`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..activations import ACTIVATIONS
from ..encodings import LARGEST, check_spec, shown
from ..nn.rounded import ROUNDED_DTYPES
from ..packing import ACTIVATION_DTYPES, VALUE_DTYPES
from .error import names

__all__ = ["FACTORS", "Structure", "bits_spec", "check_shape", "prefixed"]

FACTORS = ("low_rank_a", "low_rank_b")
_MOST_DIMS = 64  # of a tensor of torch


@dataclass
class Structure:
    """``ties``: name -> the name it shares its tensor with; ``linears``: fqn -> (out_features, in_features);
    ``sparse``: fqn -> how its SparseLinear ran; ``masked``: fqns of MaskedLinears; ``fused``: whether fuse_ had been at
    work; ``rounded``: fqn -> [up to how many rows of x a RoundedLinear answers from its copy, in which value_dtype];
    ``programs``: fqns of modules whose layers ran as one program; ``layered_prompts``: those of them whose prompts ran
    layer by layer; ``encoded``: name of a tensor that is not stored plainly -> how, as
    :meth:`sparseprune.encodings.Encoded.spec` or :func:`bits_spec`.
    """

    encoded: dict[str, dict[str, Any]] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    linears: dict[str, list[int]] = field(default_factory=dict)
    sparse: dict[str, dict[str, Any]] = field(default_factory=dict)
    masked: list[str] = field(default_factory=list)
    fused: bool = False
    rounded: dict[str, list[Any]] = field(default_factory=dict)
    programs: list[str] = field(default_factory=list)
    layered_prompts: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        found = {key: getattr(self, key) for key in _FIELDS}
        return json.dumps({k: v for k, v in found.items() if v or k not in _OPTIONAL}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Structure:
        """ValueError on anything that :meth:`to_json` does not write."""
        try:
            found = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"structure expected JSON ({error})") from None
        if not isinstance(found, dict) or not set(_FIELDS) - _OPTIONAL <= set(found) <= set(_FIELDS):
            got = sorted(found) if isinstance(found, dict) else found
            raise ValueError(f"structure expected the keys {sorted(set(_FIELDS) - _OPTIONAL)}, got {shown(got)}")
        for key, value in found.items():
            if not isinstance(value, _FIELDS[key]):
                raise ValueError(f"structure: {key} expected {_FIELDS[key].__name__}, got {type(value).__name__}")
        structure = cls(**found)
        structure._check()
        return structure

    def _check(self) -> None:
        for name, spec in self.encoded.items():
            try:
                _check_bits(spec) if isinstance(spec, dict) and spec.get("encoding") == "bits" else check_spec(spec)
            except ValueError as error:
                raise ValueError(f"{names([name])}: {error}") from None
        for name, other in self.ties.items():
            if not isinstance(other, str):
                raise ValueError(
                    f"structure: {names([name])} expected to share a tensor of the file, got {shown(other)}"
                )
        for fqn, shape in self.linears.items():
            if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_size, shape)):
                raise ValueError(
                    f"structure: size of {names([fqn])} expected [out_features, in_features], got {shown(shape)}"
                )
        for fqn, how in self.sparse.items():
            wrong = _why_not(how, self.linears[fqn]) if fqn in self.linears else "it is no Linear of the file"
            if wrong:
                raise ValueError(
                    f"structure: how {names([fqn])} ran sparse expected layout and options, got {shown(how)}: {wrong}"
                )
        for fqn in self.masked:
            if not isinstance(fqn, str) or fqn not in self.linears or fqn in self.sparse:
                raise ValueError(f"structure: masked expected names of Linears in the file, got {shown(fqn)}")
        for fqn, held in self.rounded.items():
            dense = fqn in self.linears and fqn not in self.sparse and fqn not in self.masked
            if not dense or not _is_copy(held):
                raise ValueError(
                    "structure: rounded expected [rows, value_dtype] of a dense Linear in the file, with value_dtype "
                    f"one of {ROUNDED_DTYPES}, got {shown(fqn)}: {shown(held)}; save the model again"
                )
        for fqn in self.programs:
            if not isinstance(fqn, str):
                raise ValueError(f"structure: programs expected names of modules, got {shown(fqn)}")
        known = set(self.programs)
        for fqn in self.layered_prompts:
            if not isinstance(fqn, str) or fqn not in known:
                raise ValueError(f"structure: layered_prompts expected names among programs, got {shown(fqn)}")


_FIELDS = {
    "encoded": dict,
    "ties": dict,
    "linears": dict,
    "sparse": dict,
    "masked": list,
    "fused": bool,
    "rounded": dict,
    "programs": list,
    "layered_prompts": list,
}
# Later than the first files, and written only where it says something.
_OPTIONAL = {"rounded", "programs", "layered_prompts"}


def prefixed(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name


def bits_spec(shape: list[int]) -> dict[str, Any]:
    """How a bool tensor is stored: one bit an entry."""
    return {"encoding": "bits", "shape": shape}


def check_shape(shape: Any) -> None:
    """ValueError unless shape is one a tensor of torch can have."""
    if not isinstance(shape, list) or len(shape) > _MOST_DIMS or not all(type(v) is int and v >= 0 for v in shape):
        raise ValueError(f"shape expected up to {_MOST_DIMS} whole numbers, got {shown(shape)}")
    if math.prod(max(1, v) for v in shape) > 1 << 60:  # its strides are 64-bit numbers, even where it is empty
        raise ValueError(f"shape expected a tensor that fits memory, got {shown(shape)}")


def _check_bits(spec: dict[str, Any]) -> None:
    if set(spec) != {"encoding", "shape"}:
        raise ValueError(f"bits expected the keys ['encoding', 'shape'], got {shown(sorted(spec))}")
    check_shape(spec["shape"])


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST


def _is_copy(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_count(value[0]) and value[1] in ROUNDED_DTYPES


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


# What may be said about a SparseLinear, and what it must be. A key that a later version writes is an error here.
_HOW: dict[str, Callable[[Any], bool]] = {
    "layout": lambda v: v in ("csr", "bsr", "nm"),
    "blocksize": lambda v: v is None or _is_pair(v),
    "nm": lambda v: v is None or _is_pair(v),
    "activation": lambda v: v in ACTIVATIONS,
    "value_dtype": lambda v: isinstance(v, str) and v in VALUE_DTYPES,
    # since activations can be rounded too; written where they are
    "activations": lambda v: v in ACTIVATION_DTYPES,
    # one number before several call sizes had a form each
    "tokens": lambda v: _is_count(v) or (isinstance(v, list) and bool(v) and all(map(_is_count, v))),
    "dense_from": lambda v: v is None or _is_count(v),
    # the activation belongs to the layer; without this key a fusion moved it there, which loading does again
    "own_activation": lambda v: v is True,
}
_HOW_OPTIONAL = {"dense_from", "own_activation", "activations"}  # later than the first files


def _why_not(how: Any, size: list[int]) -> str:
    """What is wrong with how a SparseLinear of this size ran; empty where nothing is."""
    if not isinstance(how, dict):
        return "it is no dictionary"
    if not set(_HOW) - _HOW_OPTIONAL <= set(how) <= set(_HOW):
        return f"its keys are {shown(sorted(how))}"
    for key, value in how.items():
        if not _HOW[key](value):
            return f"{key} is {shown(value)}"
    layout, blocksize, nm = how["layout"], how["blocksize"], how["nm"]
    if (blocksize is None) == (layout == "bsr") or (nm is None) == (layout == "nm"):
        return "blocksize belongs to bsr, and nm to nm"
    if blocksize and (size[0] % blocksize[0] or size[1] % blocksize[1] or math.prod(blocksize) > LARGEST):
        return f"the blocks do not divide {size}"
    if nm and (not nm[0] <= nm[1] <= 256 or size[1] % nm[1]):
        return f"n of every m expected n <= m <= 256, and m to divide {size[1]}"
    return ""


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")
