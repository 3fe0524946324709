"""Reading the values of tensors piece by piece: what `diff` and `report` compare."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moeforge.checkpoint.tensor import TensorInfo


def row_runs(info: TensorInfo, chunk_bytes: int) -> Iterator[slice | None]:
    """Runs of whole rows of about `chunk_bytes`, so that memory does not grow with the tensor; None: all of it."""
    if info.nbytes <= chunk_bytes or not info.shape:
        yield None
        return
    step = max(1, chunk_bytes * info.shape[0] // info.nbytes)
    for start in range(0, info.shape[0], step):
        yield slice(start, min(start + step, info.shape[0]))


def wide(array: np.ndarray) -> np.ndarray:
    """In float32, which holds every 16- and 8-bit value exactly; wider types in float64."""
    return array.astype(np.float64 if array.dtype.itemsize > 2 else np.float32)
