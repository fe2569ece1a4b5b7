"""Floor 0: files are written beside their place and renamed, so that a file is either whole or not there; a folder is
held by one run at a time.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import platform
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = [
    "holding", "in_home", "kind_of", "read_checkpoint", "remove_unfinished", "replacing", "save_checkpoint",
    "write_bytes", "write_text",
]  # fmt: skip

_LOCK = "run.lock"
_LONGEST = 255  # bytes of a file's name


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path that becomes ``path`` when the block ends, and goes when the block raises.

    It lies in the folder of ``path``, or, where that is a link, in the folder of the file it leads to, which is what is
    replaced. A file that is there keeps its permissions. ``~`` is the home folder. OSError, and nothing is touched,
    where ``path`` is no regular file, may not be written, or its folder is missing.
    """
    target, there = _target(path)
    temporary = _created(target, Path(path).suffix)
    try:
        made = temporary.stat().st_mode  # as the umask says
        yield temporary
        with open(temporary, "rb+") as written:
            if there is not None and os.geteuid() == 0:  # a root that rewrites a file does not take it from its owner
                os.fchown(written.fileno(), there.st_uid, there.st_gid)
            os.fchmod(written.fileno(), stat.S_IMODE(made if there is None else there.st_mode) & 0o777)
            os.fsync(written.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(path: str | os.PathLike[str]) -> None:
    """Removes what writers of ``path`` left behind that were killed while they wrote. For a path with one writer."""
    target, suffix = _resolved(path), Path(path).suffix
    start = _start(target, suffix)
    made = re.compile(re.escape(start) + r"[a-z0-9_]{8}" + re.escape(suffix))
    for found in target.parent.iterdir() if target.parent.is_dir() else ():
        if made.fullmatch(found.name):
            found.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(
    folder: str | os.PathLike[str], remedy: str, say: Callable[[str], None], file_name: str | None = None
) -> Iterator[None]:
    """Makes the folder and holds it, or a file of this name in it alone, for one run; BlockingIOError, with the remedy,
    where another one does, in this process or elsewhere. Where its file system has no locks, ``say`` is told so.

    The system lets the lock go once the process, and what it forked, are dead, so whatever lock file they left is taken
    over.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / (_LOCK if file_name is None else f"{_cut(file_name, _LONGEST - len('.lock'))}.lock")
    held, what = (place, "folder") if file_name is None else (place / file_name, "file")
    file, why_not = _locked(path, held, remedy)
    try:
        if why_not:
            say(f"{held}: no locks here ({why_not}); take care that no second run uses this {what}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: whoever opened it meanwhile sees that it is another file
        file.close()


def _locked(path: Path, held: Path, remedy: str) -> tuple[IO[str], str | None]:
    """The open file, and why it is not locked where the system or its place has no locks."""
    while True:
        file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115  # it stays open while it is held
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError as error:
            return file, str(error)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return file, error.strerror
            with file:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
            raise BlockingIOError(f"{held}: in use by {holder}; {remedy}") from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, None
        file.close()  # its holder had finished and removed it between our opening and our locking


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes the whole file or nothing."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes the whole file, in UTF-8, or nothing."""
    write_bytes(path, text.encode("utf-8"))


def kind_of(mode: int) -> str:
    """What lies there, for an error: "a folder", "a FIFO" ... mode: st_mode of a stat."""
    kinds = {
        stat.S_IFREG: "a regular file",
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def in_home(path: str | os.PathLike[str]) -> Path:
    """The path, ``~`` the home folder. FileNotFoundError where nobody has the name behind it."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # ~nobody
        what = f"{error} For a file of that name write ./ before it"
        raise FileNotFoundError(errno.ENOENT, what, os.fspath(path)) from None


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(in_home(path)))


def _target(path: str | os.PathLike[str]) -> tuple[Path, os.stat_result | None]:
    """The file to replace, all links followed, and what is there now."""
    target = _resolved(path)
    try:
        there = os.stat(target)
    except FileNotFoundError:
        there = None
    if there is not None and not stat.S_ISREG(there.st_mode):
        kind = IsADirectoryError if stat.S_ISDIR(there.st_mode) else OSError
        number = errno.EISDIR if stat.S_ISDIR(there.st_mode) else errno.EINVAL
        raise kind(number, f"expected a regular file or none, got {kind_of(there.st_mode)}; name a file", str(path))
    if there is not None and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "expected a file that may be written, got a read-only one", str(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"expected the folder {target.parent}, found none; make it first", str(path)
        )
    return target, there


def _start(target: Path, suffix: str) -> str:
    """What the names of temporary files for ``target`` begin with."""
    return f".{_cut(target.name, _LONGEST - len('..') - 8 - len(os.fsencode(suffix)))}."


def _cut(name: str, room: int) -> str:
    """What of a file's name fits into so many bytes."""
    while len(os.fsencode(name)) > room:
        name = name[:-1]
    return name


def _created(target: Path, suffix: str) -> Path:
    """A new, empty file beside ``target``, with the permissions the umask gives."""
    while True:
        temporary = target.parent / f"{_start(target, suffix)}{secrets.token_hex(4)}{suffix}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
            return temporary


def read_checkpoint(
    path: str | os.PathLike[str], what: str, remedy: str, content: bytes | None = None, device: str = "cpu"
) -> Any:
    """``torch.load`` of tensors and plain values alone, onto ``device``; ``content``: the file's, where it is at hand.
    ValueError, which says ``what`` it should be and the remedy, where it cannot be read; OSError where it is not there.
    """
    import torch

    try:
        source = Path(path) if content is None else io.BytesIO(content)
        return torch.load(source, map_location=device, weights_only=True)
    except (MemoryError, torch.OutOfMemoryError, FileNotFoundError):
        raise
    except Exception as error:  # a damaged file can fail in every way that the reader has
        raise ValueError(f"{path}: not a readable {what} ({type(error).__name__}); {remedy}") from error


def save_checkpoint(path: str | os.PathLike[str], state: Any) -> None:
    """``torch.save`` of the whole file or nothing. OSError, with what is kept, where there is no room for it."""
    import torch

    try:
        with replacing(path) as unfinished:
            torch.save(state, unfinished)
    except (OSError, RuntimeError) as error:  # torch's writer tells of a full disk by a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        kept = "the checkpoint before it is kept" if Path(path).exists() else "there is none before it"
        raise OSError(
            f"{path}: the checkpoint cannot be written ({reason}); make room, then start again: {kept}"
        ) from error
