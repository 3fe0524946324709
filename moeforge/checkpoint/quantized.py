"""Quantised sources shown as plain weights, in numpy, one tensor at a time.

A scheme finds the stored parts of every quantised matrix and says how to decode them; this file does the rest. What has no
exact decoding here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import BadInput
from .base import Checkpoint
from .open import COMPRESSION
from .tensor import FLOATS, NUMPY_DTYPES, Companion, Extent, TensorInfo

KEYS = ("quantization_config", COMPRESSION)
"""Config keys that say that weights are stored as codes; the second is our own."""
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Coded:
    """One quantised matrix.

    Attributes:
        info: the matrix as plain weights.
        parts: role -> stored tensor; all of them disappear behind `info.name`.
        decode: the parts as read -> float32 array of `info.shape`.
    """

    info: TensorInfo
    parts: Mapping[str, str]
    decode: Callable[[Mapping[str, np.ndarray]], np.ndarray]


Scheme = Callable[[Checkpoint, Mapping[str, Any], str], list[Coded]]
"""(checkpoint, quantization_config, dtype of the weights) -> every quantised matrix."""


def wrap(checkpoint: Checkpoint, dequantize: bool | None) -> Checkpoint:
    """`checkpoint` as plain weights; unchanged when it is not quantised.

    Args:
        dequantize: False refuses a quantised checkpoint.

    Raises:
        BadInput: quantised, and not asked to decode, or in a way that cannot be decoded here; names the method.
    """
    from .quantized_schemes import SCHEMES

    key = next((key for key in KEYS if key in checkpoint.config), None)
    if key is None:
        return checkpoint
    settings = checkpoint.config[key]
    if not isinstance(settings, dict):
        raise BadInput(f"{checkpoint.ref}: config.json has {key} = {settings!r}, an object is expected")
    method = str(settings.get("quant_method") or settings.get("method"))
    if not dequantize:
        raise BadInput(f"{checkpoint.ref}: its weights are quantised ({key}: {method}); pass --dequantize to decode them, or take "
                       "the checkpoint that it was made from")  # fmt: skip
    scheme = SCHEMES.get(method)
    if scheme is None:
        raise BadInput(f"{checkpoint.ref}: quantised with {method}, which is not decoded here (decoded are {', '.join(SCHEMES)}); "
                       "take the checkpoint that it was made from")  # fmt: skip
    return Dequantized(checkpoint, method, scheme(checkpoint, settings, _dtype(checkpoint.config)))


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
        values = matrix.decode({role: self.inner.read(part) for role, part in matrix.parts.items()})
        values = values.reshape(matrix.info.shape)[rows or slice(None)]
        return np.ascontiguousarray(values.astype(NUMPY_DTYPES[matrix.info.dtype], copy=False))

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
