"""Floor 0: what the command lines share: errors of one line, numbers with their range, files that can be written."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["Given", "Parser", "check_file", "check_folder", "one_line", "path_of", "real", "whole"]


def one_line(text: object) -> str:
    """The text of a message in one line, whatever was given to the command and is told back in it."""
    return " ".join(str(text).split())


class Parser(argparse.ArgumentParser):
    """An error is one line on stderr and exit status 2; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}; see {self.prog} --help\n")


class Given(argparse.Action):
    """Stores the value and notes in ``namespace.given`` (option name by destination) that the user gave it; with
    ``const=list`` each use adds one more.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if self.const is list:
            values = [*(getattr(namespace, self.dest) or []), values]
        setattr(namespace, self.dest, values)
        namespace.given = {**(getattr(namespace, "given", None) or {}), self.dest: option or self.dest}


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number >= low, and <= high where one is given."""
    wanted = f"a whole number of at least {low}" if high is None else f"a whole number from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text[:80]!r}") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text[:80]!r}")
        return value

    return parse


def real(interval: str) -> Callable[[str], float]:
    """An argparse type: a finite number in an interval written as in mathematics, such as "(0, 1]" or "(0, inf)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        inside = (low < value if interval[0] == "(" else low <= value) and (
            value < high if interval[-1] == ")" else value <= high
        )
        if not (math.isfinite(value) and inside):
            raise argparse.ArgumentTypeError(f"expected a number in {interval}, got {text[:80]!r}")
        return value

    return parse


def path_of(text: str) -> Path:
    """An argparse type: a path, ``~`` the home folder also where a shell leaves it, as in ``--out=~/runs``."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text[:80]!r}: {error}") from None


def check_file(path: Path, what: str) -> None:
    """Raises an OSError where ``path``, named ``what`` in the message, cannot be written; its folder must exist."""
    if path.is_dir():
        raise IsADirectoryError(f"{what} expected a file to write, got the folder {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{what} {path}: there is no folder {path.parent}; make it first")
    _try(path.parent, f"{what} {path}")


def check_folder(path: Path, what: str) -> None:
    """Raises an OSError where the folder ``path`` is not there and cannot be made, or takes no files."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise NotADirectoryError(f"{what} {path}: {there} is a file; expected a folder")
    _try(there, f"{what} {path}")


def _try(folder: Path, what: str) -> None:
    try:
        with tempfile.NamedTemporaryFile(prefix=".", dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{what}: cannot write in {folder} ({error.strerror}); choose another place") from None
