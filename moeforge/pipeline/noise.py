"""What libraries say on stderr while a verb works, brought under the rule that every line there starts with the verb.

Python warnings, logging and plain writes to `sys.stderr` become warnings of the verb, one line each and each said once;
what tells nothing to a person who runs a verb is dropped. What C code writes to the descriptor itself is not seen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from ..errors import one_line
from .progress import Progress

CHATTER = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
"""Kinds of warnings that address whoever maintains the code."""
HARMLESS = (
    r"Failed to load CPU gemm_4bit_forward from kernels-community",  # bitsandbytes then takes a slower path, same result
    r"The attention mask (is not set|and the pad token)",
    r"Setting `pad_token_id` to `eos_token_id`",
    r"generation flags are not valid",
    r"loss_type=None",
    r"Token indices sequence length is longer than",  # texts are cut into sequences after they are tokenised
    r"NOTE: Redirects are currently not supported",
    r"^\s*$",
)
"""Patterns of what libraries are known to say without anything being wrong."""
_HARMLESS = re.compile("|".join(HARMLESS))
_OLD = re.compile(r"(is|has been) deprecated|will be removed in|DeprecationWarning")
"""What addresses whoever maintains the code, unless it is said as an error."""
_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BAR = re.compile(r"^.*?(\d+%\|.*?\|( *[\d.]+[kKMGTB]*/[\d.]+[kKMGTB]*)?( *\[[^\]]*\])?|[\d.]+\w* \[\d\d:\d\d[^\]]*\])")
"""A progress bar in tqdm's style, from the start of its line."""


class _Funnel:
    """Says each thing once, as a warning of the verb."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.said: set[str] = set()

    def __call__(self, text: str, level: int = logging.WARNING) -> None:
        text = one_line(_COLOUR.sub("", text))
        if text in self.said or _HARMLESS.search(text) or (level < logging.ERROR and _OLD.search(text)):
            return
        self.said.add(text)
        self.progress.warn(text)


class _Handler(logging.Handler):
    def __init__(self, funnel: _Funnel):
        super().__init__(logging.WARNING)
        self.funnel = funnel

    def emit(self, record: logging.LogRecord) -> None:
        self.funnel(f"{record.name.partition('.')[0]}: {record.getMessage()}", record.levelno)


class _Stderr(io.TextIOBase):
    """Stands in for `sys.stderr`: whole lines go into the funnel, without the progress bars that redraw a line."""

    def __init__(self, funnel: _Funnel, real: TextIO):
        self.funnel, self.real = funnel, real
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            redrawn, last = "\r" in line.rstrip("\r"), line.rstrip("\r").rpartition("\r")[2]
            self.funnel(_BAR.sub("", _COLOUR.sub("", last)) if redrawn else last)
        return len(text)

    def flush_rest(self) -> None:
        self.write("\n")

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False  # nobody draws a bar of his own beside ours

    def fileno(self) -> int:
        return self.real.fileno()


@contextlib.contextmanager
def tamed(progress: Progress) -> Iterator[None]:
    """Within the block, everything that Python code says on stderr goes through `progress`."""
    funnel = _Funnel(progress)
    stand_in, real = _Stderr(funnel, sys.stderr), sys.stderr
    handler, root = _Handler(funnel), logging.getLogger()

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        if not issubclass(category, CHATTER):
            funnel(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        root.addHandler(handler)
        sys.stderr = stand_in
        try:
            yield
        finally:
            sys.stderr = real
            root.removeHandler(handler)
            stand_in.flush_rest()
