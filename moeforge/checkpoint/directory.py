"""A local directory in Hugging Face layout: `config.json`, safetensors in one file or in shards, tokenizer files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Checkpoint
from .folder import Folder
from .index import Weights, choose_weights, read_index
from .pickle import PickleCheckpoint
from .safetensors import read_header
from .sharded import ShardedCheckpoint
from .tensor import Companion


class DirectoryCheckpoint(ShardedCheckpoint):
    """Safetensors in a local directory.

    Args:
        ref: how the user named it; default the path.
        revision: the commit, for a snapshot of a Hub repository.

    Raises:
        BadInput: config, index or weights are missing, damaged, or lead out of the directory.
    """

    def __init__(self, folder: Folder, weights: Weights, *, revision: str | None = None):
        self._folder, self._revision = folder, revision
        config = folder.config()
        if weights.index is None:
            assert weights.file is not None
            weight_map, files = None, [weights.file]
        else:
            weight_map = read_index(folder.read(weights.index), f"{folder.ref}: {weights.index}")
            files = sorted(set(weight_map.values()))
        shards = {file: read_header(folder.file(file), f"{folder.ref}: {file}") for file in files}
        super().__init__(folder.ref, folder.path, config, shards, weight_map)

    def _local(self, file: str) -> Path:
        return self._folder.file(file)

    def companions(self) -> Sequence[Companion]:
        return self._folder.companions()

    def provenance(self) -> dict[str, Any]:
        seen, known = self._folder.provenance(sorted(self._headers))
        found = {"ref": self.ref, "format": "safetensors", "digest": self.header_digest(*seen), **known}
        if self._revision:
            found |= {"revision": self._revision, "digest": self.header_digest(self._revision)}
        return found


def open_directory(
    path: Path, *, ref: str | None = None, revision: str | None = None, allow_pickle: bool = False
) -> Checkpoint:
    """The checkpoint in a directory, whichever way its weights are stored.

    Raises:
        BadInput: see :class:`DirectoryCheckpoint`; also pickled weights without `allow_pickle`.
    """
    folder = Folder(path, ref)
    weights = choose_weights(folder.names(), folder.ref, allow_pickle)
    if not weights.pickled:
        return DirectoryCheckpoint(folder, weights, revision=revision)
    return PickleCheckpoint(folder, weights, revision=revision)
