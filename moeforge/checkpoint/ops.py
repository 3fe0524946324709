"""A conversion as data: which source tensors make which output tensors.

A plan is an ordered list of :class:`TensorOp`. Ops are pure: the same inputs give the same bytes, whatever the order
or the thread that runs them, which is what makes an interrupted conversion resumable tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .safetensors import row_range
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


def input_info(source: Input) -> TensorInfo:
    """Name, dtype and shape of what an input reads.

    Raises:
        BadInput: its checkpoint has no such tensor.
    """
    info = source.checkpoint.tensors.get(source.name)
    if info is None:
        raise BadInput(f"{source.checkpoint.ref}: no tensor {source.name!r}")
    return TensorInfo(info.name, info.dtype, row_range(info, source.rows)[0])


def check_op(op: TensorOp) -> None:
    """Raises BadInput when a copy would change dtype or shape."""
    if op.compute is not None:
        return
    if len(op.inputs) != 1:
        raise BadInput(f"{op.outputs[0].name!r}: a copy has one input, the plan gives {len(op.inputs)}")
    source = input_info(op.inputs[0])
    for info in op.outputs:
        if (info.dtype, info.shape) != (source.dtype, source.shape):
            raise BadInput(f"{info.name!r} is planned as {info.dtype} {list(info.shape)}, but is a copy of {source.name!r}, "
                           f"which is {source.dtype} {list(source.shape)}")  # fmt: skip
