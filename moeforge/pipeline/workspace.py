"""The staging directory of one run: where files are written, what of them is already whole, and how they become final.

`OUT.partial` is filled, its manifest is written last, and then it is renamed to `OUT`: a directory with a manifest is
whole, whatever happened to the process or the machine. The journal inside it remembers finished files, so that the same
command continues after a kill.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput, MachineLacks, UsageProblem
from .artifact import MANIFEST, read_manifest

JOURNAL = ".moeforge-journal.jsonl"


class Journal:
    """An append-only log of finished files, durable line by line.

    The first line holds the key of the run. A torn last line (the process died while writing it) is ignored.
    """

    def __init__(self, path: Path, key: str):
        self.path = path
        self.finished: dict[str, dict[str, Any]] = {}
        if not path.exists():
            self._append({"key": key})
            return
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break
            if "file" in entry:
                self.finished[entry["file"]] = entry["info"]
        self._mend()

    def _mend(self) -> None:
        """Cut a torn last line off, so that what is appended next stands on a line of its own."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(self.path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def record(self, file: str, info: dict[str, Any]) -> None:
        """`file` is whole and on disk; `info` (JSON-able) says how to recognise it."""
        self.finished[file] = info
        self._append({"file": file, "info": info})

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def key_of(path: Path) -> str | None:
        """The key of the run that owns a journal, None when unreadable."""
        try:
            with open(path, encoding="utf-8") as file:
                return json.loads(file.readline()).get("key")
        except (OSError, ValueError, AttributeError):
            return None


class Workspace:
    """A run's claim on its output path.

    Attributes:
        output: the final path.
        path: the staging directory to write into.
        journal: finished files of this or an earlier, interrupted run of the same plan.
        resumed: an earlier run left something to continue from.
    """

    def __init__(self, output: Path, path: Path, journal: Journal, resumed: bool):
        self.output, self.path, self.journal, self.resumed = output, path, journal, resumed

    def finish(self, manifest: dict[str, Any], force: bool) -> None:
        """Write the manifest, make everything durable, and rename the staging directory to the output."""
        (self.path / JOURNAL).unlink()
        write_durably(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        sync_directory(self.path)
        replace_directory(self.path, self.output, force)

    def finish_file(self, force: bool) -> None:
        """The staging directory's single file becomes the output file."""
        (self.path / JOURNAL).unlink()
        (made,) = self.path.iterdir()
        if self.output.exists() and not force:
            raise UsageProblem(f"{self.output} exists; remove it, choose another -o, or pass --force")
        os.replace(made, self.output)
        sync_directory(self.output.parent)
        self.path.rmdir()


@contextlib.contextmanager
def claim(output: Path, key: str, force: bool) -> Iterator[Workspace]:
    """Open the staging directory for `output`, resuming an unfinished run with the same key.

    Raises:
        UsageProblem: the output exists and is something else, or another process is writing it now.
        MachineLacks: the disk is full or the place is not writable.
    """
    if output.exists() and not force:
        raise UsageProblem(f"{output} exists{_describe(output)}; remove it, choose another -o, or pass --force")
    partial = output.with_name(output.name + ".partial")
    with disk_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageProblem(
                    f"another moeforge is writing {output} now; wait for it or choose another -o"
                ) from None
            owner = Journal.key_of(partial / JOURNAL)
            if owner is None and any(partial.iterdir()):
                raise UsageProblem(f"{partial} is in the way and was not left by moeforge; move it away")
            if owner not in (None, key):
                _empty(partial)
            yield Workspace(output, partial, Journal(partial / JOURNAL, key), resumed=owner == key)
        finally:
            os.close(lock)


def _empty(directory: Path) -> None:
    """Remove what an unfinished run of another plan left; its journal goes last, so that ownership stays known."""
    for entry in sorted(directory.iterdir(), key=lambda e: e.name == JOURNAL):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _describe(output: Path) -> str:
    if not output.is_dir():
        return ""
    try:
        manifest = read_manifest(output)
    except BadInput:
        return ""
    return f" (written by moeforge {manifest.get('verb')} with other options)" if manifest else ""


def replace_directory(made: Path, output: Path, force: bool) -> None:
    """Rename `made` to `output`; an existing output is moved aside first and removed only afterwards."""
    old = None
    if output.exists():
        if not force:
            raise UsageProblem(f"{output} appeared while it was being made; pass --force to replace it")
        old = output.with_name(f".{output.name}.old-{os.getpid()}")
        os.rename(output, old)
    os.rename(made, output)
    sync_directory(output.parent)
    if old is not None:
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def touch_manifest(output: Path) -> None:
    """Refresh the time of a reused artifact's manifest, so that Make sees its target as new."""
    now = time.time()
    os.utime(output / MANIFEST if output.is_dir() else output, (now, now))


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
def disk_errors(output: Path) -> Iterator[None]:
    """Turn 'disk full', 'read-only' and 'no permission' into one line each.

    Raises:
        MachineLacks: with what is free at `output`, for those three; other errors pass.
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
            raise MachineLacks(
                f"cannot write {error.filename or output}: {error.strerror}; choose another -o"
            ) from error
        raise
