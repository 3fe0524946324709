"""Numbers into another float format, with overflow refused instead of written."""

from __future__ import annotations

import numpy as np

from moeforge.checkpoint.tensor import NUMPY_DTYPES
from moeforge.errors import BadInput

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""`--type` -> safetensors' name."""


def narrow(values: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """`values` rounded to nearest in `dtype`.

    Raises:
        BadInput: a finite value lies beyond the largest number of `dtype`.
    """
    if NUMPY_DTYPES[dtype] == values.dtype:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        out = values.astype(NUMPY_DTYPES[dtype])
        if np.isinf(out.max(initial=0)) or np.isinf(out.min(initial=0)) or np.isnan(out).any():
            largest = np.abs(values.astype(np.float32)).max()
            if np.isfinite(largest):
                raise BadInput(
                    f"tensor {name!r} holds {largest:.4g}, beyond the largest {dtype} number; export with --type bf16 or f32"
                )
    return out
