"""The staging directory of one run: where files are written, what of them is already whole, and how they become final.

`OUT.partial` is filled, its manifest is written last, then it is renamed to `OUT`, and only then its journal goes: a
directory with a manifest is whole, and at every moment journal or manifest say whose it is, whatever happened to the
process or the machine. The journal remembers finished files, so that the same command continues after a kill.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import BadInput, UsageProblem
from .artifact import MANIFEST, read_manifest
from .disk import disk_errors, place_errors, sync_directory, write_durably
from .journal import JOURNAL, Journal
from .manifest import whole
from .place import Kind, check_free, empty, recover, replace_directory


class Workspace:
    """A run's claim on its output path.

    Attributes:
        output: the final path.
        path: the staging directory to write into.
        journal: finished files of this or an earlier, interrupted run of the same plan.
        resumed: an earlier run left something to continue from.
        manifest: that of an earlier run which died between its manifest and its rename; only `publish` is left to do.
    """

    def __init__(
        self, output: Path, path: Path, journal: Journal, resumed: bool, manifest: dict[str, Any] | None = None
    ):
        self.output, self.path, self.journal, self.resumed = output, path, journal, resumed
        self.manifest = manifest

    def finish(self, manifest: dict[str, Any], force: bool) -> None:
        """Write the manifest, make everything durable, and rename the staging directory to the output."""
        write_durably(self.path / MANIFEST, json.dumps(manifest, indent=2) + "\n")
        sync_directory(self.path)
        self.publish(force)

    def publish(self, force: bool) -> None:
        """Rename the staging directory, manifest and all, to the output."""
        replace_directory(self.path, self.output, force)
        (self.output / JOURNAL).unlink(missing_ok=True)

    def finish_file(self, made: Path, force: bool) -> None:
        """`made`, the staging directory's single file, becomes the output file."""
        check_free(self.output, "file", force)
        os.replace(made, self.output)
        sync_directory(self.output.parent)
        empty(self.path)
        self.path.rmdir()


@contextlib.contextmanager
def claim(output: Path, key: str, force: bool, kind: Kind = "directory", named: str = "-o") -> Iterator[Workspace]:
    """Open the staging directory for `output`, resuming an unfinished run with the same key.

    Args:
        named: the option or variable that chose `output`, for messages.

    Raises:
        UsageProblem: the output exists and may not be replaced, cannot be made, or another process is writing it now.
        MachineLacks: the disk is full or the place is not writable.
    """
    check_free(output, kind, force)
    partial = output.with_name(output.name + ".partial")
    with disk_errors(output, named):
        with place_errors(output, named):
            output.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(partial, output)
        try:
            recover(output)
            try:
                check_free(output, kind, force)
            except UsageProblem:
                if not any(partial.iterdir()):
                    partial.rmdir()
                raise
            yield _adopt(output, partial, key)
        finally:
            os.close(lock)


def _lock(partial: Path, output: Path) -> int:
    """A descriptor that holds the only lock on the staging directory, which is made when missing."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # a run that has just finished may have renamed it away under our hands
            if os.path.samestat(os.fstat(lock), os.stat(partial)):
                return lock
        except BlockingIOError:
            os.close(lock)
            raise UsageProblem(f"another moeforge is writing {output} now; wait for it or choose another -o") from None
        except FileNotFoundError:
            pass
        os.close(lock)


def _adopt(output: Path, partial: Path, key: str) -> Workspace:
    """The workspace in a locked staging directory, with whatever an earlier run of this key left there.

    Raises:
        UsageProblem: it holds files of somebody else's.
    """
    try:
        manifest = read_manifest(partial)
    except BadInput:  # torn: the run died while writing it
        manifest = None
    logged = Journal.key_of(partial / JOURNAL)
    owner = logged or (manifest or {}).get("key")
    # a journal that is torn in its first line was being made: nothing else can be there yet
    if owner is None and any(entry.name != JOURNAL for entry in partial.iterdir()):
        raise UsageProblem(f"{partial} is in the way and was not left by moeforge; move it away")
    if manifest is not None and manifest.get("key") == key and whole(partial, manifest):
        return Workspace(output, partial, Journal(partial / JOURNAL, key), True, manifest)
    if logged == key:
        (partial / MANIFEST).unlink(missing_ok=True)
    else:
        empty(partial)
    return Workspace(output, partial, Journal(partial / JOURNAL, key), resumed=logged == key)


def touch_manifest(output: Path) -> None:
    """Refresh the time of a reused artifact's manifest, so that Make sees its target as new."""
    now = time.time()
    os.utime(output / MANIFEST if output.is_dir() else output, (now, now))
