"""A digest of what a run hangs on, the same in every process. Floor 0: imports nothing of the package."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest"]


def digest(values: Mapping[Any, Any]) -> str:
    """SHA-256 over names and content, of tensors dtype, shape and bytes, in lists and mappings too; of all else the
    pickle. ValueError on what cannot be pickled.
    """
    found = hashlib.sha256()
    _add(found, "", values)
    return found.hexdigest()


def _add(found: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{name}:{value.dtype}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping | tuple | list):
        found.update(f"{name}:{type(value).__name__}{len(value)}".encode())
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            _add(found, f"{name}.{key}", item)
    else:
        found.update(f"{name}:{type(value).__name__}".encode())
        found.update(_pickled(name, value))


class _Pickler(pickle.Pickler):
    """Puts the digest of a tensor in its place: torch's own pickle of it holds an address."""

    def reducer_override(self, value: Any) -> Any:
        return (str, (digest({"": value}),)) if isinstance(value, Tensor) else NotImplemented


def _pickled(name: str, value: Any) -> bytes:
    made = io.BytesIO()
    try:
        _Pickler(made, protocol=5).dump(value)
        return made.getvalue()
    except Exception as error:
        raise ValueError(
            f"{name.removeprefix('.')}: expected a tensor or what pickle takes, got {type(value).__name__} ({error}); "
            "leave it out, or do without what a run resumes from"
        ) from None
