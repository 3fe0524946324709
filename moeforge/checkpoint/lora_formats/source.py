"""An adapter directory of another program: its config and the headers of its weights, nothing more until a tensor is asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import BadInput
from ..digest import PREFIX as DIGEST
from ..folder import Folder
from ..pickle import PickledFile
from ..safetensors import SafetensorsFile, parse_json, read_header
from ..tensor import TensorInfo

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"


class Source:
    """See the module.

    Attributes:
        settings: adapter_config.json.
        file: name of the file that holds the weights.
        tensors: their headers.

    Raises:
        BadInput: no such directory, no weights, damaged, or pickled without leave to read that.
    """

    def __init__(self, path: Path, *, ref: str | None = None, revision: str | None = None, allow_pickle: bool = False):
        self.path, self.ref, self.revision = path, ref or str(path), revision
        self._folder = folder = Folder(path, self.ref)
        names = folder.names()
        self.settings: dict[str, Any] = parse_json(folder.read(CONFIG), f"{self.ref}: {CONFIG}")
        self.file = WEIGHTS if WEIGHTS in names else PICKLED
        if self.file not in names:
            raise BadInput(f"{self.ref}: neither {WEIGHTS} nor {PICKLED}; the adapter is incomplete")
        where = self.where
        if self.file == WEIGHTS:
            weights = folder.file(WEIGHTS)
            self._file: SafetensorsFile | PickledFile = SafetensorsFile(weights, read_header(weights, where), where)
            self.tensors: Mapping[str, TensorInfo] = self._file.header.tensors
        elif allow_pickle:
            self._file = PickledFile(folder, PICKLED)
            self.tensors = self._file.tensors
        else:
            raise BadInput(f"{where}: pickled, and a pickle can run code; pass --allow-pickle to read it with torch's restricted unpickler")  # fmt: skip

    @property
    def where(self) -> str:
        """The file of weights, for an error."""
        return f"{self.ref}: {self.file}"

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name)

    def origin(self) -> dict[str, Any]:
        """Where it came from: `source`, `revision`, `license`, `sha256` of the weights' bytes, which are read for it."""
        digest = hashlib.sha256()
        with open(self._folder.file(self.file), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        _, known = self._folder.provenance([self.file])
        return {"source": self.ref, "revision": self.revision, "license": known.get("license"), "sha256": digest.hexdigest()}  # fmt: skip

    def provenance(self) -> dict[str, Any]:
        """As :meth:`moeforge.checkpoint.base.Checkpoint.provenance`."""
        seen, known = self._folder.provenance([self.file])
        identity = repr((sorted(self.settings.items(), key=str), sorted(self.tensors.items()), self.revision or seen))
        found = {"ref": self.ref, "format": "foreign adapter", "digest": DIGEST + hashlib.sha256(identity.encode()).hexdigest(), **known}  # fmt: skip
        return found | ({"revision": self.revision} if self.revision else {})

    def close(self) -> None:
        if isinstance(self._file, SafetensorsFile):
            self._file.close()
