"""What a tensor of a checkpoint is, before anyone reads it: name, dtype, shape, where its bytes lie.

dtype names are those of the safetensors format. numpy holds every one of them (bfloat16 and float8 through
`ml_dtypes`), so that the conversion path needs no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

NUMPY_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
SAFETENSORS_DTYPES: dict[np.dtype, str] = {dtype: name for name, dtype in NUMPY_DTYPES.items()}
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that weights are computed in (quantised storage types excluded)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's header: everything known without reading its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes of the row-major encoding."""
        return self.size * NUMPY_DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a local file that holds a tensor exactly as safetensors would store it."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Companion:
    """A file that travels with the weights (tokenizer, chat template, generation config, licence).

    Exactly one of `path` and `data` is set.
    """

    name: str
    path: Path | None = None
    data: bytes | None = None

    def read(self) -> bytes:
        if self.data is not None:
            return self.data
        assert self.path is not None
        return self.path.read_bytes()
