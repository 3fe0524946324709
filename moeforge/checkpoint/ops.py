"""A conversion as data: which source tensors make which output tensors.

A plan is an ordered list of :class:`TensorOp`. Ops are pure: the same inputs give the same bytes, whatever the order
or the thread that runs them, which is what makes an interrupted conversion resumable tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .base import Checkpoint
from .tensor import TensorInfo


@dataclass(frozen=True)
class Input:
    """A source tensor, or some rows of it (a contiguous slice of the first axis)."""

    checkpoint: Checkpoint
    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class TensorOp:
    """Makes one or more output tensors from zero or more source tensors.

    `compute` takes the input arrays in order and returns either one array for every output (all outputs then hold the
    same bytes and are hashed once) or a sequence with one array for each output. Arrays come back in the outputs'
    dtype and shape (checked). `compute=None` means: the only input's bytes go unchanged to every output, by byte range
    where the source lies on disk. `note` is a short human sentence for the plan ("copied", "rows 0..96 scaled by 4").
    """

    outputs: tuple[TensorInfo, ...]
    inputs: tuple[Input, ...] = ()
    compute: Callable[..., np.ndarray | Sequence[np.ndarray]] | None = None
    note: str = "copied"
