"""The one interface behind which every source of weights stands.

A checkpoint is a config, a table of tensor headers, and a way to read a tensor or some of its rows. Opening one reads
headers only. Directories, Hub ids, GGUF files, adapters merged on the fly and planned (not yet written) checkpoints
all look the same from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .tensor import Companion, Extent, TensorInfo

COMPRESSION = "moeforge_compression"
"""The config key of weights that one of our own compression methods wrote; that method reads them as they are stored."""


class Checkpoint(ABC):
    """A readable checkpoint. Safe to read from several threads at once.

    Attributes:
        ref: what the user asked for (path or `org/name@revision`).
        root: the local directory or file, or None when there is none.
        config: the parsed `config.json` (a fresh dict that callers may not change).
        tensors: header of every tensor, in file and offset order.
    """

    ref: str
    root: Path | None
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    @abstractmethod
    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or rows `rows` of its first axis, as a fresh C-contiguous array of its own dtype.

        Raises:
            BadInput: no such tensor, or its file is shorter than its header says.
        """

    def read_memory(self, name: str, nbytes: int) -> int:
        """Bytes held at most while `nbytes` of the tensor's rows are read, the result included; a bound for planning."""
        return nbytes

    def extent(self, name: str) -> Extent | None:
        """Where the tensor's bytes lie on local disk, ready to be copied; None when they must be computed."""
        return None

    @abstractmethod
    def companions(self) -> Sequence[Companion]:
        """The files that travel with the weights, without config, weights, index and manifest."""

    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """JSON-able identity: `ref`, `format`, `digest` (`sha256:...`, cheap to compute: headers, sizes, times or a
        commit; not a hash of 100 GB), and where known `revision`, `license`, `manifest_digest`."""

    def close(self) -> None:  # noqa: B027 - most sources hold nothing open
        """Give back file descriptors. Reading afterwards is an error."""

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
