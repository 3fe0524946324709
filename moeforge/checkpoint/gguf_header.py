"""A GGUF file's header: metadata and tensor table, checked against the file's length.

The `gguf` package's own reader makes several numpy views a token, which costs seconds on a real vocabulary; this walks
the same bytes with `struct` in tens of milliseconds and keeps nothing mapped. Format: ggml `docs/gguf.md`, versions 2, 3.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ..errors import BadInput, one_line

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in row-major order (GGUF stores it reversed)."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata (arrays of numbers as numpy arrays, arrays of strings as lists), tensors in file order, and a digest
    of the header's bytes."""

    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]
    digest: str


class Truncated(ValueError):
    """The bytes end within the header."""


class _Cursor:
    """Bounds-checked walk through the header's bytes."""

    def __init__(self, data: bytes | mmap.mmap):
        self.data, self.at, self.end = data, 0, len(data)

    def scalar(self, code: str) -> Any:
        try:
            value = struct.unpack_from("<" + code, self.data, self.at)[0]
        except struct.error as error:
            raise Truncated("the file ends within its header") from error
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        at = self.at
        start = at + 8
        stop = start + self.scalar("Q")
        if stop > self.end:
            raise Truncated(f"a text at byte {at} runs beyond the end of the file")
        self.at = stop
        return self.data[start:stop].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"unknown metadata type {kind} at byte {self.at}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if count > self.end - self.at:  # every element takes at least a byte
            raise Truncated(f"an array of {count} at byte {self.at} runs beyond the end of the file")
        if inner not in _SCALARS:
            if inner == _ARRAY:
                raise ValueError(f"nested array at byte {self.at}")
            return [self.value(inner) for _ in range(count)]
        dtype = np.dtype("<" + _SCALARS[inner])
        stop = self.at + count * dtype.itemsize
        if stop > self.end:
            raise Truncated(f"an array of {count} at byte {self.at} runs beyond the end of the file")
        values = np.frombuffer(self.data[self.at : stop], dtype)
        self.at = stop
        return values


def read_header(path: Path) -> GGUFHeader:
    """Parse and check the header of the GGUF file at `path`.

    Raises:
        BadInput: not a GGUF file of version 2 or 3, damaged, or with tensors outside the file.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise BadInput(f"{path}: an empty file; fetch it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return parse_header(data, size, str(path))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_header(data: bytes | mmap.mmap, size: int, where: str) -> GGUFHeader:
    """The header at the start of `data`, which are the first bytes of a file of `size` bytes.

    Args:
        where: names the file in messages.

    Raises:
        Truncated: the header is longer than `data`, and the file than both.
        BadInput: see :func:`read_header`.
    """
    if data[:4] != b"GGUF":
        raise BadInput(f"{where}: not a GGUF file (it does not begin with 'GGUF')")
    try:
        return _parse(_Cursor(data), size)
    except ValueError as error:  # UnicodeDecodeError is a ValueError
        if isinstance(error, Truncated) and len(data) < size:
            raise
        raise BadInput(f"{where}: damaged GGUF file: {one_line(error)[:500]}; fetch it again") from error


def _parse(cursor: _Cursor, size: int) -> GGUFHeader:
    cursor.at = 4
    version = cursor.scalar("I")
    if version not in (2, 3):
        hint = " (big-endian)" if version and version & 0xFFFF == 0 else ""
        raise ValueError(f"version {version:#x}{hint}, only little-endian versions 2 and 3 are read")
    n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        if key in metadata:
            raise ValueError(f"metadata key {key!r} stands twice")
        metadata[key] = cursor.value(cursor.scalar("I"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, not a power of two")
    table = [_tensor(cursor) for _ in range(n_tensors)]
    end = cursor.at
    start = -(-end // alignment) * alignment
    tensors, seen, taken = [], set(), start
    for name, kind, shape, offset, nbytes in sorted(table, key=lambda t: t[3]):
        at = start + offset
        if name in seen:
            raise ValueError(f"tensor {name!r} stands twice")
        if at < taken:
            raise ValueError(f"tensor {name!r} overlaps the one before it")
        if at + nbytes > size:
            raise ValueError(f"tensor {name!r} ends at byte {at + nbytes}, the file has {size}")
        seen.add(name)
        taken = at + nbytes
        tensors.append(GGUFTensor(name, kind, shape, at, nbytes))
    return GGUFHeader(metadata, tuple(tensors), "sha256:" + hashlib.sha256(cursor.data[:end]).hexdigest())


def _tensor(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    name = cursor.text()
    rank = cursor.scalar("I")
    if not 1 <= rank <= 4:
        raise ValueError(f"tensor {name!r} has {rank} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(rank))[::-1]
    number, offset = cursor.scalar("I"), cursor.scalar("Q")
    if number not in GGMLQuantizationType._value2member_map_:
        raise ValueError(f"tensor {name!r} is of unknown type {number}")
    kind = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    elements = 1
    for length in shape:
        elements *= length
    if elements == 0 or shape[-1] % block:
        raise ValueError(f"tensor {name!r} of shape {shape} does not hold whole {kind.name} blocks of {block}")
    return name, kind, shape, offset, elements // block * block_bytes
