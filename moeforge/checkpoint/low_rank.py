"""Rows of a low-rank product, the same however they are asked for."""

from __future__ import annotations

import numpy as np

BLOCK = 128
"""Rows that are multiplied together. Some BLAS sum in another order when a matrix has other rows, so a row comes from the same
block whichever rows are asked for."""


def whole_blocks(start: int, stop: int) -> slice:
    """The rows of the blocks in which rows `start` to `stop` lie."""
    return slice(start // BLOCK * BLOCK, -(-stop // BLOCK) * BLOCK)


def product_rows(left: np.ndarray, right: np.ndarray, scale: float, start: int, stop: int) -> np.ndarray:
    """[stop - start, N]: rows `start` to `stop` of scale L R.

    Args:
        left: the rows :func:`whole_blocks` of L, r wide. right: R, [r, N]. Both in the dtype to compute in.
    """
    first = start // BLOCK * BLOCK
    out = np.empty((max(stop - start, 0), right.shape[1]), right.dtype)
    for at in range(first, stop, BLOCK):
        block = left[at - first : at - first + BLOCK] @ right
        begin, end = max(at, start), min(at + BLOCK, stop)
        np.multiply(block[begin - at : end - at], right.dtype.type(scale), out=out[begin - start : end - start])
    return out
