"""Text data: two built-in sets, any TSV or JSONL file, a vocabulary from the training split, length-sorted batches."""

from __future__ import annotations

from .augment import Augment
from .hashing import RowLoader, hashed_rows
from .loader import TokenLoader
from .loading import SETS, Examples, TextData, load_files, load_folder, load_set, read_examples
from .quality import DataReport, check_data
from .rows import read_names
from .vocabulary import Vocabulary, detect_unit

__all__ = [
    "SETS",
    "Augment",
    "DataReport",
    "Examples",
    "RowLoader",
    "TextData",
    "TokenLoader",
    "Vocabulary",
    "check_data",
    "detect_unit",
    "hashed_rows",
    "load_files",
    "load_folder",
    "load_set",
    "read_examples",
    "read_names",
]
