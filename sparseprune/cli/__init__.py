"""The command line: ``sparseprune COMMAND``, one file a command in :mod:`.commands`.

Every command prints one clear line and exits with 2 on bad input, and with 1 where the work itself failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from .. import __version__
from .._arguments import Parser, one_line
from . import commands

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status."""
    given = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a label the terminal cannot show must not end a run
    command = given[0] if given and not given[0].startswith("-") else ""
    resumes = any(
        name == command and getattr(module, "RESUMES", False) and not _takes_over(module, given[1:])
        for name, module in _commands()
    )
    goes_on = "; the same command goes on from its last checkpoint" if resumes else ""
    try:
        status = _run(given)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _complain(f"sparseprune: stopped{goes_on}")
        return 130
    except BrokenPipeError:
        if goes_on:
            _complain(f"sparseprune: stopped, for nobody reads standard output any more{goes_on}")
        _drop_output()
        return 128 + 13  # as a program that SIGPIPE ends
    except (ValueError, OSError, ImportError, KeyError) as error:
        if "--debug" in given:
            raise
        text = str(error) if not isinstance(error, KeyError) else f"unknown name {error}"
        _complain(f"sparseprune {command}: error: {text}")
        return 2
    except (RuntimeError, MemoryError) as error:
        if "--debug" in given:
            raise
        text = str(error).strip() or type(error).__name__
        _complain(f"sparseprune {command}: error: {text} (--debug shows where)")
        return 1


def _commands() -> list[tuple[str, ModuleType]]:
    """(name, module) of each command, in the order of the help."""
    names = [found.name for found in pkgutil.iter_modules(commands.__path__)]
    modules = [(name, importlib.import_module(f".commands.{name}", __name__)) for name in names]
    return sorted(modules, key=lambda entry: (getattr(entry[1], "PLACE", 100), entry[0]))


def _takes_over(module: ModuleType, rest: list[str]) -> bool:
    """Whether the command reads these options itself: always, or where it says so."""
    if not hasattr(module, "take_over"):
        return False
    return not hasattr(module, "takes_over") or module.takes_over(rest)


def _run(given: list[str]) -> int:
    try:
        for name, module in _commands():
            if given[:1] == [name] and _takes_over(module, given[1:]):
                return module.take_over(given[1:])
        arguments = parser().parse_args(given)
    except SystemExit as stop:
        if stop.code == 2:
            return 2  # the parser has said what is wrong
        raise
    return arguments.run(arguments)


def _complain(text: str) -> None:
    if sys.stderr is not None:  # print would turn to standard output
        print(one_line(text), file=sys.stderr)


def _drop_output() -> None:
    """Leaves nothing that Python would fail to write when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    result = Parser(
        prog="sparseprune", description="Prune language models, run them sparse, see the gain measured here."
    )
    result.add_argument("--version", action="version", version=f"sparseprune {__version__}")
    subparsers = result.add_subparsers(required=True, metavar="command")
    for name, module in _commands():
        if not hasattr(module, "options"):
            subparsers.add_parser(name, help=module.ABOUT)
            continue
        command = subparsers.add_parser(
            name,
            help=module.ABOUT,
            description=module.ABOUT,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=module.run, command=name)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.options(command)
    return result
