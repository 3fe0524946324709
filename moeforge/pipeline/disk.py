"""Durable writes, and the operating system's complaints about places in one line each."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import BadInput, MachineLacks, UsageProblem


def write_durably(path: Path, text: str) -> None:
    """Write a small file and fsync it."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """fsync a directory: makes creations and renames in it durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(output: Path, named: str = "-o") -> Iterator[None]:
    """Turn 'disk full', 'read-only' and 'no permission' into one line each.

    Args:
        named: the option or variable that chose `output`.

    Raises:
        MachineLacks: with what is free at `output`, for those three; other errors pass.
        BadInput: what may not be touched is a file that is read, not one under `output`.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            existing = next(p for p in (output, *output.parents) if p.exists())
            free = shutil.disk_usage(existing).free
            raise MachineLacks(f"the disk at {existing} is full ({free / 1e9:.2f} GB free); free some room and run the "
                               "same command again, it resumes") from error  # fmt: skip
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            where = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else output
            # the staging directory stands beside the output, and both may have to be made
            if not where.is_relative_to(output.parent) and not output.is_relative_to(where):
                raise BadInput(f"{where}: cannot be used: {error.strerror}; look at its permissions") from error
            raise MachineLacks(
                f"cannot write {error.filename or output}: {error.strerror}; choose another {named}"
            ) from error
        raise


@contextlib.contextmanager
def place_errors(output: Path, named: str = "-o") -> Iterator[None]:
    """Turn 'not a directory', 'name too long' and the like, met while a place is made, into one line.

    Args:
        named: see :func:`disk_errors`.

    Raises:
        UsageProblem: nothing can be made at `output`, whoever asks; see :func:`disk_errors` for what this machine lacks.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP):
            where = f" (at {error.filename})" if error.filename and str(error.filename) != str(output) else ""
            raise UsageProblem(
                f"{named} {output} cannot be made: {error.strerror}{where}; choose another {named}"
            ) from error
        raise
