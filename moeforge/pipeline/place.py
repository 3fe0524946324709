"""Where an output may go: not over, around or inside what it is made from, and never over what moeforge did not write.

`--force` replaces an empty directory or one with a moeforge manifest; where a verb writes one file (a receipt, a page), an empty
file or one of those. Of a symlink only the link goes. Everything else is the user's to remove.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput, UsageProblem
from .artifact import MANIFEST, SCHEMA, read_manifest
from .disk import sync_directory
from .journal import JOURNAL, Journal

Kind = Literal["directory", "file"]
PAGE = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="moeforge">\n'
)
"""How a page of ours begins."""
MAX_RECEIPT = 1 << 20
"""Bytes; a larger file is none of ours, and is not read to find out."""


def keep_apart(output: Path, sources: Iterable[Path], named: str = "-o") -> None:
    """Refuse an output that is, contains or lies inside something that the run reads.

    Args:
        named: the option or variable that chose `output`, for messages.

    Raises:
        UsageProblem: naming both.
    """
    # where it is, and where it leads when it is a symlink
    places = {Path(os.path.realpath(output.parent)) / output.name, Path(os.path.realpath(output))}
    for source in sources:
        held = Path(os.path.realpath(source))
        for place in sorted(places):
            how = "is" if place == held else "contains" if place in held.parents else ""
            if held in place.parents:
                how = "lies inside"
            if how:
                raise UsageProblem(f"{named} {output} {how} {source}, which this run reads; choose another {named}")


def check_free(output: Path, kind: Kind, force: bool) -> None:
    """Refuse an output that exists and may not be replaced.

    Raises:
        UsageProblem: says whose it is and what to do.
    """
    if not os.path.lexists(output):
        return
    why = _kept(output, kind)
    if why is None and not force:
        raise UsageProblem(f"{output} exists{_describe(output)}; remove it, choose another -o, or pass --force")
    if why is not None:
        what = f"the {'directory' if output.is_dir() else 'file'} {output}"
        told = f"--force does not replace {what}" if force else f"{what} exists and is kept even with --force"
        raise UsageProblem(f"{told}: {why}; move it away or choose another -o")


def _kept(output: Path, kind: Kind) -> str | None:
    """Why even `--force` leaves an existing output alone, None when it may go."""
    if output.is_symlink():
        return None
    if output.is_dir():
        if kind == "file":
            return "this verb writes one file"
        return None if _made_here(output) or not any(output.iterdir()) else f"it has no {MANIFEST} of moeforge's"
    if kind == "directory":
        return "this verb writes a directory"
    ours = file_kind(output) is not None or is_page(output)
    return None if ours or not output.stat().st_size else "moeforge did not write it"


def is_page(file: Path) -> bool:
    """Whether a file is a page that moeforge wrote: it says so in its first bytes."""
    try:
        with open(file, "rb") as held:
            return file.is_file() and held.read(len(PAGE)) == PAGE
    except OSError:
        return False


def file_kind(file: Path) -> str | None:
    """The `kind` of a file that moeforge wrote (a receipt), None of any other: much JSON has a `kind`, ours says `moeforge` too."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_RECEIPT:
            return None
        body = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    ours = isinstance(body, dict) and body.get("moeforge") == SCHEMA and isinstance(body.get("kind"), str)
    return body["kind"] if ours else None


def replace_directory(made: Path, output: Path, force: bool) -> None:
    """Rename `made` to `output`; an existing output is moved aside first and removed only afterwards.

    A kill between the two renames leaves the old one as `.NAME.old-PID`; see :func:`recover`.
    """
    check_free(output, "directory", force)
    old = None
    if output.is_symlink():
        output.unlink()
    elif output.exists():
        old = output.with_name(f".{output.name}.old-{os.getpid()}")
        os.rename(output, old)
    os.rename(made, output)
    sync_directory(output.parent)
    if old is not None:
        empty(old)
        old.rmdir()


def recover(output: Path) -> None:
    """Put back what a killed `--force` had moved aside; remove it where the new output had come into place.

    Only with the staging directory locked: a live run may be between its two renames.
    """
    for old in _moved_aside(output):
        if not os.path.lexists(output):
            os.rename(old, output)
    tidy(output)


def tidy(output: Path) -> None:
    """Remove what a run that was killed after its last rename left behind: its journal, the output that it replaced."""
    if not output.is_dir() or not _made_here(output):
        return
    (output / JOURNAL).unlink(missing_ok=True)
    for old in _moved_aside(output):
        # the run that moved it aside may be removing it at this moment
        with contextlib.suppress(FileNotFoundError):
            empty(old)
            old.rmdir()


def empty(directory: Path) -> None:
    """Remove all that is in a directory; what tells whose it is goes last, so that a kill leaves it known."""
    for entry in sorted(directory.iterdir(), key=lambda e: (e.name in (JOURNAL, MANIFEST), e.name)):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _moved_aside(output: Path) -> list[Path]:
    """What runs that were killed had moved aside; what only has such a name, and nothing of moeforge's in it, is the user's."""
    found = output.parent.glob(f".{glob.escape(output.name)}.old-*")
    return sorted(path for path in found if path.name.rpartition("-")[2].isdigit() and _left_here(path))


def _left_here(directory: Path) -> bool:
    """Whether moeforge made a directory: its manifest or its journal goes last, see :func:`empty`."""
    if directory.is_symlink() or not directory.is_dir():
        return False
    known = _made_here(directory) is not None or Journal.key_of(directory / JOURNAL) is not None
    return known or not any(directory.iterdir())


def _made_here(directory: Path) -> dict[str, Any] | None:
    """The directory's manifest; None when there is none that this release can read."""
    try:
        return read_manifest(directory)
    except BadInput:
        return None


def _describe(output: Path) -> str:
    manifest = _made_here(output) if output.is_dir() else None
    return f" (written by moeforge {manifest.get('verb')} with other options or inputs)" if manifest else ""
