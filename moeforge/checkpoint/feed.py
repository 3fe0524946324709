"""How the inputs of ops come into memory: a piece at a time where they are copied, whole where they are computed with.

Every source tensor of a conversion passes here once, so here it is checked that its weights are finite.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import numpy as np

from .finite import check_finite
from .ops import Input, TensorOp, input_info
from .safetensors import pieces, row_range
from .tensor import NUMPY_DTYPES, TensorInfo

PIECE = 1 << 20
"""Bytes hashed and written at a time: they stay in the processor's cache between the two."""
_ROWS_BYTES = 32_000_000
"""Bytes that a copy reads at a time where the source has no extent."""


class Feed:
    """Reads inputs; safe from several threads, each with one buffer of its own.

    Both ways of reading raise BadInput where a file ends early or a weight is infinite or not a number.
    """

    def __init__(self) -> None:
        self._buffers = threading.local()

    def copied(self, source: Input) -> Iterator[memoryview]:
        """The input's bytes: straight from its file where it lies in one, else read some rows at a time.

        A piece is valid until the next one is asked for.
        """
        info = source.checkpoint.tensors[source.name]
        extent = source.checkpoint.extent(source.name)
        if extent is None:
            for rows in _row_groups(info, source.rows):
                yield _checked(source.checkpoint.read(source.name, rows), source, rows)
            return
        shape, skip = row_range(info, source.rows)
        nbytes = TensorInfo(info.name, info.dtype, shape).nbytes
        at = skip
        fd = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for piece in pieces(
                fd, extent.offset + skip, nbytes, f"{extent.path}: tensor {info.name!r}", self._buffer()
            ):
                check_finite(piece, info, str(extent.path), at // NUMPY_DTYPES[info.dtype].itemsize)
                at += len(piece)
                yield piece
        finally:
            os.close(fd)

    def arrays(self, op: TensorOp) -> list[np.ndarray]:
        """The op's inputs in order."""
        found = []
        for source in op.inputs:
            array = source.checkpoint.read(source.name, source.rows)
            _checked(array, source, source.rows)
            found.append(array)
        return found

    def _buffer(self) -> memoryview:
        """This thread's own copy buffer."""
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(PIECE))
        return self._buffers.view


def _checked(array: np.ndarray, source: Input, rows: slice | None) -> memoryview:
    """The bytes of rows `rows` of an input, all of them finite."""
    info, data = source.checkpoint.tensors[source.name], bytes_of(array)
    item = NUMPY_DTYPES[info.dtype].itemsize
    start = row_range(info, rows)[1]
    for at in range(0, len(data), PIECE):
        check_finite(data[at : at + PIECE], info, source.checkpoint.ref, (start + at) // item)
    return data


def _row_groups(info: TensorInfo, rows: slice | None) -> Iterator[slice | None]:
    """Slices of bounded size that together are rows `rows` of the tensor."""
    if not info.shape or info.nbytes <= _ROWS_BYTES:
        yield rows
        return
    start, stop, _ = (rows or slice(None)).indices(info.shape[0])
    step = max(1, _ROWS_BYTES * info.shape[0] // info.nbytes)
    for at in range(start, stop, step):
        yield slice(at, min(at + step, stop))


def bytes_of(array: np.ndarray) -> memoryview:
    """An array's bytes in row-major order; a view where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def op_memory(op: TensorOp) -> int:
    """Bytes that an op holds at once, a bound that lies near what is measured.

    A copy holds a piece, or some rows where they must be computed. A transform holds what it reads, what it makes (equal
    outputs are one array) and, of the largest of these matrices, three arrays of four bytes a weight to work on.
    """
    infos = [input_info(source) for source in op.inputs]
    sizes = [info.nbytes for info in infos]
    if op.compute is None:
        if op.inputs[0].checkpoint.extent(op.inputs[0].name) is not None:
            return PIECE
        sizes = [min(sizes[0], _ROWS_BYTES)]
    beside = [source.checkpoint.read_memory(source.name, n) - n for source, n in zip(op.inputs, sizes, strict=True)]
    read = sum(sizes) + max(beside, default=0)
    if op.compute is None:
        return read
    largest = max(info.nbytes for info in op.outputs)
    made = min(sum(info.nbytes for info in op.outputs), max(sum(sizes), largest))
    return max(read, sum(sizes) + made + 12 * max((info.size for info in infos), default=op.outputs[0].size))
