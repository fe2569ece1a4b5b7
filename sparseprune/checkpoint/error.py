"""The one exception of checkpoints, and what its messages are made of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from ..encodings import shown

__all__ = ["CheckpointError", "about", "names"]

_SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, is damaged, or does not fit the model."""


@contextlib.contextmanager
def about(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a ValueError of what runs inside, and memory that does not suffice, into a CheckpointError that names the
    file.
    """
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error or 'not enough memory'}") from None


def names(found: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    text = ", ".join(name if name.isprintable() and len(name) <= 100 else shown(name) for name in found[:_SHOWN])
    return text + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
