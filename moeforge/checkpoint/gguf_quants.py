"""GGUF blocks to floats, in chunks that stay in cache and straight into the wanted dtype.

The five round-to-nearest formats (one scale, perhaps one minimum, 32 codes a block) are decoded here, two to three times
faster than `gguf.quants` and to the same bits; K-quants and the rest go through `gguf.quants`.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

PLAIN = {Kind.F32: "F32", Kind.F16: "F16", Kind.BF16: "BF16"}
"""Kinds that are stored as plain numbers -> their safetensors dtype."""

_NUMPY = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
_CHUNK = 1 << 17


class _Scheme(NamedTuple):
    bits: int
    zero: int
    """Code that stands for zero (formats without a minimum)."""
    minimum: bool


_SIMPLE = {Kind.Q4_0: _Scheme(4, 8, False), Kind.Q4_1: _Scheme(4, 0, True), Kind.Q5_0: _Scheme(5, 16, False),
           Kind.Q5_1: _Scheme(5, 0, True), Kind.Q8_0: _Scheme(8, 0, False)}  # fmt: skip


def supported(kind: Kind) -> bool:
    """True where :func:`dequantize` can decode `kind`."""
    return kind in PLAIN or kind in _SIMPLE or kind in quants._type_traits


def dequantize(raw: np.ndarray, kind: Kind, dtype: np.dtype) -> np.ndarray:
    """Decode rows.

    Args:
        raw: uint8 [rows, row_bytes], C-contiguous.
        dtype: wanted dtype; float32 arithmetic, then one rounding to nearest even.

    Returns:
        [rows, columns] of `dtype`, C-contiguous.
    """
    if kind in PLAIN:
        return raw.view(_NUMPY[kind]).astype(dtype, copy=False)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), block), dtype)
    step = _CHUNK // block
    scheme = _SIMPLE.get(kind)
    for at in range(0, len(blocks), step):
        chunk = blocks[at : at + step]
        if scheme is not None:
            out[at : at + step] = _decode(chunk, scheme)
        else:  # as one row: the package loops in Python over groups of 16 rows
            out[at : at + step] = quants.dequantize(chunk.reshape(1, -1), kind).reshape(-1, block)
    return out.reshape(len(raw), raw.shape[1] // block_bytes * block)


def _decode(blocks: np.ndarray, scheme: _Scheme) -> np.ndarray:
    """float32 [n, 32] from uint8 [n, block bytes]: scale (f16), minimum (f16)?, fifth bits (u32)?, codes."""
    out = np.empty((len(blocks), 32), np.float32)
    if scheme.bits == 8:
        out[:] = blocks[:, 2:].view(np.int8)
    else:
        codes = blocks[:, -16:]
        out[:, :16] = codes & 15
        out[:, 16:] = codes >> 4
        if scheme.bits == 5:
            high = np.unpackbits(np.ascontiguousarray(blocks[:, -20:-16]), axis=1, bitorder="little")
            out += high << 4
    if scheme.zero:
        out -= np.float32(scheme.zero)
    out *= blocks[:, 0:2].view(np.float16).astype(np.float32)
    if scheme.minimum:
        out += blocks[:, 2:4].view(np.float16).astype(np.float32)
    return out
