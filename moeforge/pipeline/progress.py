"""Everything that goes to stderr: bars with ETA, messages, warnings, events.

Two stages of a pipe share a terminal, so each line starts with its verb and a bar is drawn only while work is going on.
Without a terminal a line appears at most every 30 s. `--progress json` writes one event a line for front ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, TextIO

from ..options import format_bytes

LINE_INTERVAL_S = 30.0
DRAW_INTERVAL_S = 0.1
POLL_INTERVAL_S = 0.2

Style = Literal["auto", "bar", "lines", "json", "none"]


def mute() -> TextIO:
    """A stream that nobody reads, for a process whose peer says the same."""
    return open(os.devnull, "w", encoding="utf-8")


class Progress:
    """Where a run reports to. `style` auto: a bar on a terminal, else lines."""

    def __init__(self, verb: str, style: Style = "auto", quiet: bool = False, stream: TextIO | None = None):
        self.verb = verb
        self.stream = stream if stream is not None else sys.stderr
        if style == "auto":
            style = "bar" if self.stream.isatty() else "lines"
        self.style: Style = "none" if quiet and style != "json" else style
        self.quiet = quiet
        self._console: Any = None

    def say(self, text: str) -> None:
        if self.style == "json":
            self._event("message", text=text)
        elif not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        if self.style == "json":
            self._event("warning", text=text)
        else:
            self._line(f"warning: {text}")

    def bar(self, title: str, total: float | None, unit: str, check: Callable[[], None]) -> Bar:
        return Bar(self, title, total, unit, check)

    def _event(self, event: str, **fields: Any) -> None:
        self.stream.write(json.dumps({"event": event, "verb": self.verb, **fields}) + "\n")
        self.stream.flush()

    def _line(self, text: str) -> None:
        line = f"{self.verb}: {text}"
        if self._console is not None:
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            self.stream.write(line + "\n")
            self.stream.flush()


class Bar:
    """One running piece of work. `advance` is cheap and may be called for every tensor or step, from one thread."""

    def __init__(self, progress: Progress, title: str, total: float | None, unit: str, check: Callable[[], None]):
        self.progress, self.title, self.total, self.unit = progress, title, total, unit
        self.done = 0.0
        self._check = check
        self._rich: Any = None
        self._task: Any = None
        self._note = ""

    def __enter__(self) -> Bar:
        self._start = self._last_line = time.monotonic()
        self._last_draw = self._last_check = 0.0
        return self

    def advance(self, amount: float = 1.0, note: str | None = None) -> None:
        """Report `amount` more units done; `note` is shown behind the bar (`loss 3.21`).

        Raises:
            Interrupted, ReaderGone: the work should stop.
        """
        self.done += amount
        if note is not None:
            self._note = note
        now = time.monotonic()
        if now - self._last_check >= POLL_INTERVAL_S:
            self._last_check = now
            self._check()
        style = self.progress.style
        if style == "bar" and now - self._last_draw >= DRAW_INTERVAL_S:
            self._last_draw = now
            self._draw()
        elif style in ("lines", "json") and now - self._last_line >= (LINE_INTERVAL_S if style == "lines" else 1.0):
            self._last_line = now
            if style == "json":
                self.progress._event("progress", title=self.title, done=self.done, total=self.total, unit=self.unit,
                                     eta_s=self.eta_s, note=self._note)  # fmt: skip
            else:
                self.progress._line(f"{self.title} {self.describe()}")

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the average speed so far."""
        if not self.total or not self.done:
            return None
        return (time.monotonic() - self._start) * (self.total - self.done) / self.done

    def describe(self) -> str:
        """`431 MB of 1.38 GB, 31 %, 12 s left, loss 3.2`"""
        amount = format_bytes if self.unit == "B" else lambda n: f"{n:g}"
        parts = [amount(self.done) + (f" of {amount(self.total)}" if self.total else "")
                 + ("" if self.unit in ("B", "") else f" {self.unit}")]  # fmt: skip
        if self.total:
            parts.append(f"{100 * self.done / self.total:.0f} %")
        if self.eta_s is not None:
            parts.append(f"{self.eta_s:.0f} s left")
        return ", ".join(parts + ([self._note] if self._note else []))

    def _draw(self) -> None:
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            self.progress._console = Console(file=self.progress.stream)
            self._rich = RichProgress(
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"),
                console=self.progress._console, transient=True,
                # what others write to stderr gets its prefix from moeforge.pipeline.noise
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._task = self._rich.add_task(f"{self.progress.verb}: {self.title}", total=self.total, told="")
            self._rich.start()
        self._rich.update(self._task, completed=self.done, told=self.describe())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._rich is not None:
            self._rich.stop()
            self.progress._console = None
        if self.progress.style == "json":
            self.progress._event("finished" if kind is None else "stopped", title=self.title, done=self.done,
                                 seconds=round(time.monotonic() - self._start, 3))  # fmt: skip
