"""Weights that are infinite or not a number, found in the bytes that a conversion reads anyway.

In every IEEE format a magnitude read as an integer grows with the number, and infinities and NaN come after all numbers.
So two integer maxima, one of the signed and one of the unsigned view, tell for positive and negative values, with no float
made and no array beside the piece itself.
"""

from __future__ import annotations

import numpy as np

from ..errors import BadInput
from .tensor import NUMPY_DTYPES, TensorInfo

_FIRST_BAD = {
    "F64": 0x7FF << 52,
    "F32": 0xFF << 23,
    "F16": 0x1F << 10,
    "BF16": 0xFF << 7,
    "F8_E5M2": 0x1F << 2,
    "F8_E4M3": 0x7F,
}
"""dtype -> the magnitude, as an integer, from which on a value is not finite."""  # fmt: skip


def check_finite(data: memoryview, info: TensorInfo, where: str, start: int = 0) -> None:
    """Refuse bytes of a tensor that hold infinities or NaN; tensors of other dtypes than floats pass.

    Args:
        data: whole elements of the tensor in row-major order, as bytes.
        info: the tensor; its shape names the place.
        where: the file or source that a message names.
        start: elements of the tensor before `data`.

    Raises:
        BadInput: names tensor, source, value and index of the first one in `data`, and how many there are in `data`'s piece.
    """
    first = _FIRST_BAD.get(info.dtype)
    if first is None or not len(data):
        return
    width = NUMPY_DTYPES[info.dtype].itemsize
    signed, unsigned = np.frombuffer(data, f"i{width}"), np.frombuffer(data, f"u{width}")
    sign = 1 << (8 * width - 1)
    if signed.max() < first and unsigned.max() < sign + first:
        return
    bad = np.flatnonzero((unsigned & unsigned.dtype.type(sign - 1)) >= first)
    value = np.frombuffer(data, NUMPY_DTYPES[info.dtype])[bad[0]]
    index = [int(i) for i in np.unravel_index(start + int(bad[0]), info.shape)]
    raise BadInput(f"{where}: tensor {info.name!r} {info.dtype} {list(info.shape)} holds weights that are infinite or not a number, "
                   f"first {float(value)} at {index}; the file is damaged or its training diverged: download it again or "
                   "take another checkpoint")  # fmt: skip
