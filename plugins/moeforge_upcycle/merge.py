"""Ways to make one tensor out of those of several parents.

A tensor with a row for each token has fewer rows in a parent whose vocabulary is shorter; no parent has more rows than the
first one. A row is then made from the parents that hold it.

All arithmetic is float64 on the stored values, so equal float32 (or narrower) tensors come back to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 1 << 22
"""Elements that are widened to float64 at once, beside the result."""
PARALLEL = 1e-6
"""Below this sine of the angle between two tensors there is no arc to follow, and they are mixed along the line."""


def average(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The mean over the holders of each row: float64, of the first array's shape."""
    total = arrays[0].astype(np.float64)
    for array in arrays[1:]:
        total[: len(array)] += array
    total /= _holders(arrays)
    return total


def slerp(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Spherical interpolation (Shoemake, SIGGRAPH 1985) of whole tensors, each taken as one vector.

    Two parents meet half-way on the arc between them. Of more, each next one is joined to what the earlier ones gave, with a
    share of 1/2, 1/3, 1/4, ...: all weigh the same, but the result depends a little on their order.
    """
    merged = arrays[0].astype(np.float64)
    holders = np.ones((len(merged), *[1] * (merged.ndim - 1)))
    for array in arrays[1:]:
        held = holders[: len(array)]
        held += 1
        _rotate(merged[: len(array)], array, 1 / held)
    return merged


def task_vector(arrays: Sequence[np.ndarray], base: np.ndarray, scale: float) -> np.ndarray:
    """base + scale * sum over parents of (parent - base) (task arithmetic, 2212.04089).

    Rows that the base lacks are the mean over their holders.
    """
    merged = np.zeros(arrays[0].shape)
    rows = len(base)
    for array in arrays:
        held = min(len(array), rows)
        merged[:held] += array[:held]
        merged[:held] -= base[:held]
    merged[:rows] *= scale
    merged[:rows] += base
    if rows < len(merged):
        merged[rows:] = average([array[rows:] for array in arrays])
    return merged


def _holders(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[rows, 1, ...]: how many arrays have each row of the first."""
    counts = np.zeros((len(arrays[0]), *[1] * (arrays[0].ndim - 1)))
    for array in arrays:
        counts[: len(array)] += 1
    return counts


def _rotate(into: np.ndarray, array: np.ndarray, share: np.ndarray) -> None:
    """Move `into` (float64, in place) along the arc towards `array`, by `share` [rows, 1, ...] of the angle."""
    dot = here = there = 0.0
    for rows in _blocks(into):
        a, b = into[rows].ravel(), array[rows].astype(np.float64).ravel()
        dot, here, there = dot + a @ b, here + a @ a, there + b @ b
    cosine = dot / math.sqrt(here * there) if here * there else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    for rows in _blocks(into):
        b, t = array[rows].astype(np.float64), share[rows]
        if math.sin(angle) < PARALLEL:
            into[rows] += t * (b - into[rows])
        else:
            into[rows] *= np.sin((1 - t) * angle) / math.sin(angle)
            into[rows] += np.sin(t * angle) / math.sin(angle) * b


def _blocks(array: np.ndarray) -> Iterator[slice]:
    step = max(1, BLOCK * len(array) // max(1, array.size))
    return (slice(start, start + step) for start in range(0, len(array), step))
