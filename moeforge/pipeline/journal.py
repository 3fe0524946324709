"""What of an unfinished run is already whole: an append-only log in its staging directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .disk import sync_directory

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
            # whose directory this is must outlive a power cut as surely as the files in it
            sync_directory(path.parent)
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
        """The key of the run that owns a journal, None when there is none or its first line is torn."""
        try:
            with open(path, encoding="utf-8") as file:
                line = file.readline()
            return json.loads(line).get("key") if line.endswith("\n") else None
        except (OSError, ValueError, AttributeError):
            return None
