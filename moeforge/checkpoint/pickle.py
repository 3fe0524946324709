"""Pickled `pytorch_model*.bin`, read only when asked for: `torch.load` with `weights_only`, which makes tensors and
nothing else, mapped from disk.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .folder import Folder
from .index import Weights, read_index
from .safetensors import row_range
from .tensor import NUMPY_DTYPES, Companion, TensorInfo

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


class PickledFile:
    """One file of named tensors.

    Attributes:
        tensors: their headers.

    Raises:
        BadInput: it is damaged or holds anything but named tensors.
    """

    def __init__(self, folder: Folder, file: str):
        self._ref = folder.ref
        self._tensors = _load(folder, file)
        self.tensors = {name: _info(self._ref, name, tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """As :meth:`moeforge.checkpoint.base.Checkpoint.read`."""
        import torch

        info, tensor = self.tensors[name], self._tensors[name]
        shape, _ = row_range(info, rows)
        taken = (tensor if rows is None else tensor[rows]).detach().contiguous().reshape(-1).view(torch.uint8)
        return taken.numpy().copy().view(NUMPY_DTYPES[info.dtype]).reshape(shape)


class PickleCheckpoint(Checkpoint):
    """Pickled weights in a directory.

    Raises:
        BadInput: a file is damaged or holds anything but named tensors.
    """

    def __init__(self, folder: Folder, weights: Weights, *, revision: str | None = None):
        self._folder, self._revision = folder, revision
        self.ref, self.root, self.config = folder.ref, folder.path, folder.config()
        placed = None
        if weights.index is not None:
            placed = read_index(folder.read(weights.index), f"{self.ref}: {weights.index}", ".bin")
        self._files = sorted(set(placed.values())) if placed else [weights.file or ""]
        self._holders: dict[str, PickledFile] = {}
        for file in self._files:
            opened = PickledFile(folder, file)
            for name in opened.tensors:
                if name in self._holders or (placed is not None and placed.get(name) != file):
                    raise BadInput(f"{self.ref}: tensor {name!r} stands in {file}, where the index does not place it")
                self._holders[name] = opened
        if placed is not None and (lost := sorted(placed.keys() - self._holders.keys())):
            raise BadInput(
                f"{self.ref}: the index places tensor {lost[0]!r} in {placed[lost[0]]}, which does not hold it"
            )
        self.tensors = {name: opened.tensors[name] for name, opened in self._holders.items()}

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self.tensors:
            raise BadInput(f"{self.ref}: no tensor {name!r}")
        return self._holders[name].read(name, rows)

    def companions(self) -> Sequence[Companion]:
        return self._folder.companions()

    def provenance(self) -> dict[str, Any]:
        seen, known = self._folder.provenance(self._files)
        identity = repr((sorted(self.config.items(), key=str), sorted(self.tensors.items()), self._revision or seen))
        found = {
            "ref": self.ref,
            "format": "pickle",
            "digest": "sha256:" + hashlib.sha256(identity.encode()).hexdigest(),
            **known,
        }
        return found | ({"revision": self._revision} if self._revision else {})

    def close(self) -> None:
        self._holders = {}


def _load(folder: Folder, file: str) -> dict[str, torch.Tensor]:
    import torch

    path = folder.file(file)
    try:
        with open(path, "rb") as opened:
            mapped = opened.read(4) == b"PK\x03\x04"  # files of before torch 1.6 cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged or hostile pickle raises whatever it likes
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = (
            f"it would run {code[1]}" if code else f"damaged, or of a kind that torch refuses ({type(error).__name__})"
        )
        raise BadInput(f"{folder.ref}: {file} does not hold plain tensors: {why}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{folder.ref}: {file} holds {type(found).__name__}, expected named tensors")
    for name, tensor in found.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, torch.Tensor):
            raise BadInput(
                f"{folder.ref}: {file}: {str(name)[:200]!r} is {type(tensor).__name__}, expected a named tensor"
            )
    return found


def _info(ref: str, name: str, tensor: torch.Tensor) -> TensorInfo:
    dtype = _TORCH_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.is_sparse or tensor.is_quantized:
        raise BadInput(f"{ref}: tensor {name!r} is {tensor.dtype}, {tensor.layout}; only plain tensors are read")
    return TensorInfo(name, dtype, tuple(tensor.shape))
