"""One quantised matrix: what is stored of it, and how it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .base import Checkpoint
from .tensor import TensorInfo

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Coded:
    """One quantised matrix.

    Attributes:
        info: the matrix as plain weights.
        parts: role -> stored tensor; all of them disappear behind `info.name`.
        decode: the parts as read -> float32 array of `info.shape`, or of those rows of it whose stored rows it is given.
        step: rows of the matrix that can be decoded apart from the others; 0: it is decoded whole.
        stored: role -> rows of the part that `step` rows of the matrix take; other parts are read whole.
    """

    info: TensorInfo
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    step: int = 0
    stored: Mapping[str, int] = field(default_factory=dict)


Scheme = Callable[[Checkpoint, Mapping[str, Any], str], list[Coded]]
"""(checkpoint, quantization_config, dtype of the weights) -> every quantised matrix."""
