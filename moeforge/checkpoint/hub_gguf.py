"""A GGUF file in a repository on the Hugging Face Hub: its header comes by range requests; the file is downloaded into the
Hub's own cache when its weights are first asked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput
from .gguf import GGUFCheckpoint
from .gguf_header import GGUFHeader, Truncated, parse_header, read_header
from .hub import hub_errors, read_range

FIRST_REQUEST = 4_000_000
"""Bytes of a file asked for at first; a vocabulary of 128,000 tokens with its merges takes about 8 MB."""
MAX_HEADER_BYTES = 256_000_000
SMALL = 1_000_000
"""Tensors up to this size (factors of rotary embeddings, norms) do not make the whole file come."""


class HubGGUF(GGUFCheckpoint):
    """See the module. Made by :func:`moeforge.checkpoint.hub.open_hub`.

    Args:
        ref: how the user named it.
        name: the repository, `org/name`.
        commit: the revision that is read.
        file: path of the file in the repository.
    """

    def __init__(self, ref: str, name: str, commit: str, file: str, licence: str | None):
        from huggingface_hub import try_to_load_from_cache

        self.ref, self.root, self._fd = ref, None, -1
        self._name, self._commit, self._file, self._license = name, commit, file, licence
        self._lock = threading.Lock()
        held = try_to_load_from_cache(name, file, revision=commit)
        self._lay_out(read_header(Path(held)) if isinstance(held, str) else self._fetch_header())

    def _fetch_header(self) -> GGUFHeader:
        data, size = read_range(self._name, self._file, self._commit, 0, FIRST_REQUEST, self.ref)
        while True:
            try:
                return parse_header(data, size, self.ref)
            except Truncated as error:
                if len(data) >= MAX_HEADER_BYTES:
                    raise BadInput(
                        f"{self.ref}: its header is longer than {MAX_HEADER_BYTES} bytes: damaged"
                    ) from error
            more, _ = read_range(self._name, self._file, self._commit, len(data), len(data), self.ref)
            if not more:
                raise BadInput(f"{self.ref}: the Hub sent {len(data)} of {size} bytes and no more; try again")
            data += more

    def _local(self) -> Path:
        from huggingface_hub import hf_hub_download

        with self._lock:
            if self.root is None:
                with hub_errors(self.ref):
                    self.root = Path(hf_hub_download(self._name, self._file, revision=self._commit))
                self._fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
            return self.root

    def _bytes(self, offset: int, nbytes: int, name: str) -> np.ndarray:
        if self.root is None and nbytes <= SMALL:
            data, _ = read_range(self._name, self._file, self._commit, offset, nbytes, self.ref)
            if len(data) != nbytes:
                raise BadInput(f"{self.ref}: tensor {name!r}: the Hub sent {len(data)} of {nbytes} bytes; try again")
            return np.frombuffer(bytearray(data), np.uint8)
        self._local()
        return super()._bytes(offset, nbytes, name)

    def _version(self) -> str:
        return self._commit

    def provenance(self) -> dict[str, Any]:
        found = super().provenance() | {"revision": self._commit}
        return found if self._license is None else {**found, "license": self._license}
