"""A directory that is not trusted, of which files are read by name.

Links: a file may be a symbolic link only if it leads to a file below the directory itself, or, when the directory is a
snapshot of a Hugging Face cache (`models--ORG--NAME/snapshots/COMMIT`), below that repository's own folder (`blobs/`).
Anything else would let a downloaded directory hand out files of this machine.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .companions import CONFIG
from .digest import MANIFEST
from .safetensors import parse_json
from .sharded import is_companion
from .tensor import Companion

MAX_TEXT_BYTES = 200_000_000
"""No config, index or manifest is larger."""


class Folder:
    """A directory that is not trusted: every file is checked before it is opened."""

    def __init__(self, path: Path, ref: str | None = None):
        self.path, self.ref = path, ref or str(path)
        self._real = Path(os.path.realpath(path))
        in_cache = self._real.parent.name == "snapshots" and self._real.parent.parent.name.startswith("models--")
        self._allowed = self._real.parent.parent if in_cache else self._real

    def names(self) -> list[str]:
        """Relative names of the files in the directory and one level below, hidden ones left out."""
        found = []
        for entry in sorted(os.scandir(self._real), key=lambda e: e.name):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                found += [f"{entry.name}/{e.name}" for e in os.scandir(entry) if not e.is_dir(follow_symlinks=False)]
            else:
                found.append(entry.name)
        return sorted(found)

    def file(self, name: str) -> Path:
        """The file's resolved path.

        Raises:
            BadInput: missing, not a regular file, or it leads out: by its name (absolute, `..`) or as a link.
        """
        if name.startswith("/") or not {"..", "."}.isdisjoint(name.split("/")):
            raise BadInput(f"{self.ref}: {name[:200]!r} is not the name of a file below the directory")
        real = Path(os.path.realpath(self._real / name))
        if not real.is_relative_to(self._allowed):
            raise BadInput(
                f"{self.ref}: {name} is a link that leads out of the directory ({real}); put the file itself there"
            )
        if not real.is_file():
            kind = "not a regular file" if real.exists() else "missing"
            raise BadInput(f"{self.ref}: {name} is {kind}; the download or copy is incomplete")
        return real

    def read(self, name: str) -> bytes:
        """A small file's bytes.

        Raises:
            BadInput: as `file`, or too large, or unreadable.
        """
        path = self.file(name)
        try:
            if path.stat().st_size > MAX_TEXT_BYTES:
                raise BadInput(f"{self.ref}: {name} has {path.stat().st_size} bytes; no real one is that large")
            return path.read_bytes()
        except OSError as error:
            raise BadInput(f"{self.ref}: {name} cannot be read: {error.strerror}") from error

    def config(self) -> dict[str, Any]:
        return parse_json(self.read(CONFIG), f"{self.ref}: {CONFIG}")

    def companions(self) -> list[Companion]:
        return [Companion(name, path=self.file(name)) for name in self.names() if is_companion(name)]

    def provenance(self, files: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """Names, sizes and times of `files`; licence and manifest digest where they are known."""
        stats = [(name, os.stat(self.file(name))) for name in files]
        seen = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        known: dict[str, Any] = {}
        names = set(self.names())
        if MANIFEST in names:
            digest = parse_json(self.read(MANIFEST), f"{self.ref}: {MANIFEST}").get("digest")
            if isinstance(digest, str):
                known["manifest_digest"] = digest
        if "README.md" in names and (found := card_license(self.read("README.md"))):
            known["license"] = found
        return seen, known


def card_license(card: bytes) -> str | None:
    """The `license:` of a model card's front matter, None when it has none."""
    front = re.match(r"---\r?\n(.*?)\r?\n---", card.decode("utf-8", "replace"), re.DOTALL)
    line = re.search(r"^license:[ \t]*([\w.+-]+)", front[1], re.MULTILINE) if front else None
    return line[1] if line else None
