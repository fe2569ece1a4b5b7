"""Text data: two built-in sets, any TSV or JSONL file, a vocabulary from the training split, length-sorted batches."""

from __future__ import annotations

from .augment import Augment
from .loader import TokenLoader
from .loading import SETS, Examples, TextData, load_files, load_set, read_examples
from .vocabulary import Vocabulary, detect_unit

__all__ = [
    "SETS",
    "Augment",
    "Examples",
    "TextData",
    "TokenLoader",
    "Vocabulary",
    "detect_unit",
    "load_files",
    "load_set",
    "read_examples",
]
