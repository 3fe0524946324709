"""Quantised sources shown as plain weights, in numpy, one tensor at a time.

A scheme finds the stored parts of every quantised matrix and says how to decode them; this file does the rest. What has no
exact decoding here is refused by name.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import BadInput, one_line
from .base import COMPRESSION, Checkpoint
from .coded import DTYPES, Coded
from .quantized_schemes import SCHEMES
from .safetensors import row_range
from .tensor import FLOATS, NUMPY_DTYPES, Companion, Extent, TensorInfo

KEYS = ("quantization_config", COMPRESSION)
"""Config keys that say that weights are stored as codes; the second is our own."""


def coded_by(config: Mapping[str, Any]) -> str | None:
    """The key that says that weights are stored as codes; None where they are plain."""
    return next((key for key in KEYS if key in config), None)


def wrap(checkpoint: Checkpoint, dequantize: bool | None) -> Checkpoint:
    """`checkpoint` as plain weights; unchanged when it is not quantised.

    Args:
        dequantize: False refuses a quantised checkpoint.

    Raises:
        BadInput: quantised, and not asked to decode, or in a way that cannot be decoded here; names the method.
    """
    key = coded_by(checkpoint.config)
    if key is None:
        return checkpoint
    settings = checkpoint.config[key]
    if not isinstance(settings, dict):
        raise BadInput(f"{checkpoint.ref}: config.json has {key} = {settings!r}, an object is expected")
    method = str(settings.get("quant_method") or settings.get("method"))[:100]
    if not dequantize:
        raise BadInput(f"{checkpoint.ref}: its weights are quantised ({key}: {method}); pass --dequantize to decode them, or take "
                       "the checkpoint that it was made from")  # fmt: skip
    scheme = SCHEMES.get(method)
    if scheme is None:
        raise BadInput(f"{checkpoint.ref}: quantised with {method}, which is not decoded here (decoded are {', '.join(SCHEMES)}); "
                       "take the checkpoint that it was made from")  # fmt: skip
    return Dequantized(checkpoint, method, scheme(checkpoint, settings, _dtype(checkpoint.config)))


_WORK_BYTES = 20
"""Most bytes a weight takes while it is decoded: codes, scales and products in float32."""


class Dequantized(Checkpoint):
    """A quantised checkpoint with its weights decoded on read; what was not quantised stays as it is.

    Attributes:
        inner: the checkpoint as it is stored.
        coded: name of every quantised matrix -> what is stored of it.
    """

    def __init__(self, inner: Checkpoint, method: str, coded: Sequence[Coded]):
        if not coded:
            raise BadInput(f"{inner.ref}: config.json says {method}, but no tensor is stored that way")
        self.inner, self._method = inner, method
        self.ref, self.root = inner.ref, inner.root
        config = inner.config.get("base_config", inner.config)
        self.config = {key: value for key, value in config.items() if key not in KEYS}
        self.coded = {matrix.info.name: matrix for matrix in coded}
        self._whole = threading.local()
        hidden = {part for matrix in coded for part in matrix.parts.values()}
        self.tensors: Mapping[str, TensorInfo] = _in_order(inner.tensors, self.coded, hidden)
        odd = next((info for info in self.tensors.values() if info.dtype not in FLOATS), None)
        if odd is not None:
            raise BadInput(
                f"{inner.ref}: tensor {odd.name!r} is {odd.dtype}, but belongs to no weight that {method} quantised"
            )

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        matrix = self.coded.get(name)
        if matrix is None:
            if name not in self.tensors:
                raise BadInput(f"{self.ref}: no tensor {name!r}")
            return self.inner.read(name, rows)
        shape, _ = row_range(matrix.info, rows)
        if 0 in shape:
            return np.empty(shape, NUMPY_DTYPES[matrix.info.dtype])
        if rows is None:
            return self._decoded(matrix)
        start, stop, _ = rows.indices(matrix.info.shape[0])
        if not matrix.step:
            return self._kept(matrix, start, stop)
        first, last = start // matrix.step, -(-stop // matrix.step)
        at = start - first * matrix.step
        return self._decoded(matrix, (first, last))[at : at + stop - start].copy()

    def _decoded(self, matrix: Coded, steps: tuple[int, int] | None = None) -> np.ndarray:
        """A matrix in its dtype, or its rows from step to step."""
        parts = {}
        for role, part in matrix.parts.items():
            each = matrix.stored.get(role)
            rows = None if steps is None or each is None else slice(steps[0] * each, steps[1] * each)
            parts[role] = self.inner.read(part, rows)
        shape = matrix.info.shape if steps is None else (-1, *matrix.info.shape[1:])
        try:
            values = matrix.decode(parts).reshape(shape)
        except (IndexError, ValueError) as error:  # a table or a group number that leads out of its range
            raise BadInput(
                f"{self.ref}: the stored parts of {matrix.info.name!r} do not fit each other: {one_line(error)}"
            ) from error
        return np.ascontiguousarray(values.astype(NUMPY_DTYPES[matrix.info.dtype], copy=False))

    def _kept(self, matrix: Coded, start: int, stop: int) -> np.ndarray:
        """Rows of a matrix that can only be decoded whole: a thread that walks through it decodes it once, and lets go of it with
        the last row."""
        name, values = getattr(self._whole, "entry", (None, None))
        if name != matrix.info.name or values is None:
            values = self._decoded(matrix)
        self._whole.entry = (matrix.info.name, values) if stop < len(values) else (None, None)
        return values[start:stop].copy()

    def read_memory(self, name: str, nbytes: int) -> int:
        matrix = self.coded.get(name)
        if matrix is None:
            return self.inner.read_memory(name, nbytes)
        info, parts = matrix.info, [self.inner.tensors[part].nbytes for part in matrix.parts.values()]
        item = NUMPY_DTYPES[info.dtype].itemsize
        count = nbytes // item + 2 * matrix.step * math.prod(info.shape[1:])
        count = min(count, info.size) if matrix.step else info.size
        return nbytes + sum(parts) * count // max(1, info.size) + (_WORK_BYTES + item) * count

    def extent(self, name: str) -> Extent | None:
        return None if name in self.coded else self.inner.extent(name)

    def companions(self) -> Sequence[Companion]:
        return self.inner.companions()

    def provenance(self) -> dict[str, Any]:
        return self.inner.provenance() | {"dequantized": self._method}

    def close(self) -> None:
        self.inner.close()


def _in_order(stored: Mapping[str, TensorInfo], coded: Mapping[str, Coded], hidden: set[str]) -> dict[str, TensorInfo]:
    """Plain tensors where they stood, decoded ones where their first part stood."""
    place = {name: i for i, name in enumerate(stored)}
    at = {min(matrix.parts.values(), key=place.__getitem__): matrix.info for matrix in coded.values()}
    found = {}
    for name, info in stored.items():
        if name in at:
            found[at[name].name] = at[name]
        elif name not in hidden:
            found[name] = info
    return found


def _dtype(config: Mapping[str, Any]) -> str:
    config = config.get("base_config", config)
    return DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."), "BF16")
