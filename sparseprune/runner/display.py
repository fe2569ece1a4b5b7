"""Progress on the terminal: Epoch, Loss, U (the density in use), sparsity, the discriminator's accuracy."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Display", "describe_step", "kept_in_words"]


class Display:
    """With ``rich`` on a terminal one live line a stage; without it, or with output redirected, one line an epoch."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self._live: Any = None
        self._task: Any = None
        self._epoch = -1
        self._stage = ""
        self._last: dict[str, Any] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    show = say

    def begin(self, stage: str, total: int) -> None:
        """A new stage of ``total`` steps."""
        self._stop()
        self._stage, self._epoch, self._last = stage, -1, None
        if self.quiet:
            return
        if sys.stdout is not None and sys.stdout.isatty():
            try:
                from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            except ImportError:
                self.say("one line an epoch: the live display needs rich; pip install 'sparseprune[demo]'")
            else:
                self._live = Progress(
                    TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"),
                    TimeElapsedColumn(), TimeRemainingColumn(),
                )  # fmt: skip
                self._task = self._live.add_task(stage, total=total, line="")
                self._live.start()
        if self._live is None:
            self.say(f"{stage}: {total} steps")

    def step(self, record: dict[str, Any]) -> None:
        """The record of one step, see ``training.History``."""
        if self.quiet:
            return
        if self._live is not None:
            if record["step"] % 5 == 0:
                self._live.update(self._task, completed=record["step"] + 1, line=describe_step(record))
        elif record["epoch"] != self._epoch and self._last is not None:
            self.say(f"  {describe_step(self._last)}")
        self._epoch, self._last = record["epoch"], record

    def end(self) -> None:
        if not self.quiet and self._last is not None:
            line = describe_step(self._last)
            if self._live is not None:
                self._live.update(self._task, completed=self._last["step"] + 1, line=line)
            else:
                self.say(f"  {line}")
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def describe_step(record: dict[str, Any]) -> str:
    """One step in the article's words."""
    parts = [
        f"Epoch {record['epoch'] + 1}", f"Loss {record['loss']:.3f}", f"U {record['density']:.3f}",
        f"sparsity {record['sparsity']:.3f}",
    ]  # fmt: skip
    if "discriminator_accuracy" in record:
        parts.append(f"D accuracy {record['discriminator_accuracy']:.2f}")
    if record.get("phase") == "heal":
        parts.append("healing")
    return "  ".join(parts)


def kept_in_words(record: dict[str, Any]) -> str:
    """The share of the dense accuracy that a run kept, for a reader."""
    kept = record["accuracy_kept"]
    return "(the dense model has none right)" if kept is None else f"{kept:.1%}"
