"""Errors a user can cause, and the exit code that each one ends the process with.

A leaf module: it imports nothing of ours, and every package may import it.

An error message has three parts in one line: what was asked, what was found (values, file, tensor), what to do.
"""

import re
from enum import IntEnum

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ExitCode(IntEnum):
    """Exit codes of every verb. Scripts may rely on them."""

    OK = 0
    """Done, or already up to date."""
    FAILED = 1
    """The work itself failed."""
    USAGE = 2
    """The command line or the config file is wrong."""
    BAD_INPUT = 3
    """No input artifact, or one that is damaged or not of the kind the verb takes."""
    GATE = 4
    """A quality gate refused: an equality proof failed, a loss is above its bound, a search found nothing."""
    MACHINE = 5
    """The machine lacks something: accelerator, memory, disk."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM."""
    READER_GONE = 141
    """The next stage of the pipe has died."""


MAX_MESSAGE = 3000
"""Characters of a message; the longest honest ones list every reason why a conversion is refused."""

KEPT_END = 500
"""Of those, how many are the message's last."""


class MoeforgeError(Exception):
    """Base of every error that is shown as one line instead of a traceback."""

    exit_code = ExitCode.FAILED

    def __str__(self) -> str:
        # messages quote what was found, and what was found may come from a stranger
        text = printable(super().__str__())
        if len(text) <= MAX_MESSAGE:
            return text
        # the reason and what to do stand at the end
        return f"{text[: MAX_MESSAGE - KEPT_END]}... ({len(text)} characters) ...{text[-KEPT_END:]}"


class UsageProblem(MoeforgeError):
    """The options contradict each other or name something that does not exist."""

    exit_code = ExitCode.USAGE


class BadInput(MoeforgeError):
    """The input artifact is missing, damaged, hostile, or not what the verb takes."""

    exit_code = ExitCode.BAD_INPUT


class GateRefused(MoeforgeError):
    """The work was done but its result did not pass the check that was asked for."""

    exit_code = ExitCode.GATE


class MachineLacks(MoeforgeError):
    """The machine has too little of something."""

    exit_code = ExitCode.MACHINE


class Interrupted(MoeforgeError):
    """The user stopped the run; what was finished can be resumed."""

    exit_code = ExitCode.INTERRUPTED


class ReaderGone(MoeforgeError):
    """The process that would have read our output is dead, so the work stops."""

    exit_code = ExitCode.READER_GONE


def printable(text: str) -> str:
    """`text` with what a terminal would obey (control characters, line breaks) written out as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def tame(text: str) -> str:
    """`text` of many lines with what a terminal would obey written out as escapes; line breaks and tabs stay, and so does
    every character that is only unusual."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)


def one_line(text: object) -> str:
    """`text` with every run of white space, line breaks included, folded to one space."""
    return " ".join(str(text).split())
