"""A checkpoint in safetensors files, wherever they lie: what a local directory and a Hub repository have in common."""

from __future__ import annotations

import hashlib
import threading
from abc import abstractmethod
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .index import join_shards
from .safetensors import Header, SafetensorsFile
from .tensor import Extent, TensorInfo

COMPANIONS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "tekken.json", "*.jinja", "additional_chat_templates/*.jinja", "generation_config.json", "*processor_config.json",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files that travel with the weights. Code (`*.py`) and the model card do not: both speak of another model."""
_NEVER = ("*.py", "*.safetensors", "*.bin", "*.gguf", "*.partial")


def is_companion(name: str) -> bool:
    """Whether a file of this (relative, posix) name travels with the weights."""
    return any(fnmatch(name, p) and name.count("/") == p.count("/") for p in COMPANIONS) and not any(
        fnmatch(name, p) for p in _NEVER
    )


class ShardedCheckpoint(Checkpoint):
    """Tensors in one or more safetensors files whose headers have been read.

    Args:
        shards: file name -> header.
        weight_map: the index's tensor -> file map; None for a single file.
    """

    def __init__(self, ref: str, root: Path | None, config: dict[str, Any], shards: Mapping[str, Header],
                 weight_map: Mapping[str, str] | None):  # fmt: skip
        self.ref, self.root, self.config = ref, root, config
        if weight_map is None:
            weight_map = {name: file for file, header in shards.items() for name in header.tensors}
        placed = join_shards(weight_map, shards, ref)
        if not placed:
            raise BadInput(f"{ref}: {', '.join(shards)} holds no tensors")
        self.tensors: Mapping[str, TensorInfo] = {name: info for name, (_, info) in placed.items()}
        self._place = {name: file for name, (file, _) in placed.items()}
        self._headers = dict(shards)
        self._files: dict[str, SafetensorsFile] = {}
        self._lock = threading.Lock()

    @abstractmethod
    def _local(self, file: str) -> Path:
        """Where `file` lies on local disk (fetched first if need be).

        Raises:
            BadInput, MachineLacks: it cannot be had.
        """

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._place:
            raise BadInput(f"{self.ref}: no tensor {name!r}")
        file = self._place[name]
        with self._lock:
            if file not in self._files:
                self._files[file] = SafetensorsFile(self._local(file), self._headers[file], f"{self.ref}: {file}")
            return self._files[file]

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._file(name).read(name, rows)

    def extent(self, name: str) -> Extent | None:
        return self._file(name).extent(name)

    def header_digest(self, *more: str) -> str:
        """Cheap identity: config, headers, and `more` (sizes, times or a commit)."""
        state = hashlib.sha256(repr((sorted(self.config.items(), key=str), more)).encode())
        for file, header in sorted(self._headers.items()):
            state.update(file.encode() + hashlib.sha256(header.raw).digest())
        return "sha256:" + state.hexdigest()

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
