"""What the loopback Hub stores: repositories with commits, branches and pull requests, in memory."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

LFS_FROM = 1_000_000
"""Files from this size on, and all binary weight files, go through LFS."""
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".model")


def goes_through_lfs(path: str, size: int) -> bool:
    """Whether the Hub asks for this file through LFS."""
    return size >= LFS_FROM or (size > 0 and path.endswith(_WEIGHTS))


@dataclass(frozen=True)
class File:
    """One file of a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """The git blob id; of the pointer for an LFS file."""
        body = self.data
        if self.lfs:
            body = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.lfs:
            out["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return out


@dataclass
class Repo:
    """A model repository: commits by id, and refs."""

    name: str
    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.refs["main"] = self.add({".gitattributes": File(b"*.safetensors filter=lfs\n", False)}, "initial commit")

    def add(self, files: dict[str, File], message: str) -> str:
        text = json.dumps([len(self.messages), message, sorted((n, f.oid) for n, f in files.items())])
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.messages.append(message)
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str) -> dict[str, bytes]:
        """Path -> content at a branch or commit."""
        return {name: file.data for name, file in self.commits[self.refs.get(revision, revision)].items()}
