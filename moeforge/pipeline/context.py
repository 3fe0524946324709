"""What the core lends a running stage: progress, cancellation, places."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Interrupted, ReaderGone

if TYPE_CHECKING:
    from .progress import Bar, Progress


@dataclass
class Context:
    """Handed to `Stage.run` and `Query.answer`.

    Attributes:
        verb: prefix of every line on stderr.
        progress: where bars, messages and warnings go (stderr only).
        home: `$MOEFORGE_HOME` (default `~/.cache/moeforge`).
        resumes: the same command, run again, goes on where this run stopped: true of a stage, not of a query.
        interrupted: set by the signal handler; `check()` turns it into an exception at a safe point.
    """

    verb: str
    progress: Progress
    home: Path
    resumes: bool = True
    interrupted: bool = False
    _reader_check: object = field(default=None, repr=False)

    def check(self) -> None:
        """Call often (every tensor, every step). Stops the work when the user or the next stage is gone.

        Raises:
            Interrupted: Ctrl-C or SIGTERM was received.
            ReaderGone: the process at the other end of stdout has died.
        """
        if self.interrupted:
            raise Interrupted(f"stopped; {self.way_on}")
        if callable(self._reader_check) and not self._reader_check():
            raise ReaderGone("the next stage of the pipe is gone; stopped early")

    @property
    def way_on(self) -> str:
        """What whoever stopped the work can do."""
        return "run the same command again to resume" if self.resumes else "the same command starts from the beginning"

    def bar(self, title: str, total: float | None, unit: str = "") -> Bar:
        """A progress bar with ETA: `with ctx.bar("writing", n_bytes, "B") as bar: bar.advance(k)`. `advance` also checks."""
        return self.progress.bar(title, total, unit, self.check)

    def say(self, text: str) -> None:
        """One informative line on stderr, prefixed with the verb; silenced by `-q`."""
        self.progress.say(text)

    def warn(self, text: str) -> None:
        """One warning line on stderr."""
        self.progress.warn(text)
