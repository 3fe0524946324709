"""The safetensors format, read strictly and written canonically.

A file is 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps. Nothing in the
header is trusted before it is checked against the file's size: the header decides where we read.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, one_line
from .tensor import NUMPY_DTYPES, Extent, TensorInfo

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation: no honest header is larger."""
MAX_DIMENSIONS = 32
"""What every numpy and torch can hold."""
_INT64 = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: every tensor lies within the file, and together they fill it exactly.

    Attributes:
        tensors: name -> info, in offset order.
        offsets: name -> first byte in the file.
        raw: the length and the JSON as they stand in the file.
    """

    tensors: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    raw: bytes
    metadata: Mapping[str, str] = field(default_factory=dict)


def header_length(start: bytes, file_size: int, where: str) -> int:
    """Bytes of the JSON header that the file's first 8 bytes announce.

    Args:
        where: names the file in messages.

    Raises:
        BadInput: the file is empty or too short, or the length is absurd.
    """
    if file_size < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        raise BadInput(f"{where}: only {file_size} bytes, too short for a safetensors file; download it again")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise BadInput(f"{where}: announces a header of {length} bytes (limit {MAX_HEADER_BYTES}); not a safetensors file, or damaged")  # fmt: skip
    if length > file_size - LENGTH_BYTES:
        raise BadInput(f"{where}: announces a header of {length} bytes but has {file_size}; it was cut, download it again")  # fmt: skip
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """The header in `raw`, the file's first `8 + length` bytes.

    Raises:
        BadInput: the header is not exactly what the format asks for; names the file and the tensor.
    """
    body = parse_json(raw[LENGTH_BYTES:], where)
    metadata = body.pop("__metadata__", {})
    if not _is_text_map(metadata):
        raise BadInput(f"{where}: __metadata__ is not a map of texts to texts")
    spans = sorted((*_span(entry, name, where), name) for name, entry in body.items())
    tensors, offsets, expected = {}, {}, 0
    for begin, end, name in spans:
        info = _info(name, body[name], where)
        if begin != expected:
            fault = "overlaps the tensor before it" if begin < expected else "leaves a gap before it"
            raise BadInput(
                f"{where}: tensor {name!r} starts at byte {begin} of the data, expected {expected}: it {fault}"
            )
        if info.nbytes != end - begin:
            raise BadInput(f"{where}: tensor {name!r} is {info.dtype} {list(info.shape)}, which is {info.nbytes} bytes, "
                           f"but its offsets hold {end - begin}")  # fmt: skip
        tensors[name], offsets[name], expected = info, len(raw) + begin, end
    if len(raw) + expected != file_size:
        fault = (
            "it was cut, download it again" if len(raw) + expected > file_size else "it has bytes that no tensor owns"
        )
        last = f" (the last is {spans[-1][2]!r})" if spans else ""
        raise BadInput(
            f"{where}: its tensors{last} end at byte {len(raw) + expected} but the file has {file_size}: {fault}"
        )
    return Header(tensors, offsets, raw, metadata)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8 without repeated keys.

    Raises:
        BadInput: it is anything else.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise BadInput(f"{where}: {_short(twice)} is listed twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not valid JSON: {one_line(error)}; damaged, get it again") from error
    if not isinstance(body, dict):
        raise BadInput(f"{where}: a JSON object is expected, found {type(body).__name__}")
    return body


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _short(name: str) -> str:
    """A name for a message; a hostile one may be megabytes long."""
    return repr(name) if len(name) <= 200 else repr(name[:200]) + "..."


def _natural(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _INT64  # bool is an int, too


def _span(entry: Any, name: str, where: str) -> tuple[int, int]:
    span = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(span, list) and len(span) == 2 and all(map(_natural, span)) and span[0] <= span[1]):
        raise BadInput(f"{where}: tensor {_short(name)} has no valid data_offsets (two whole numbers, begin <= end)")
    return span[0], span[1]


def _info(name: str, entry: Mapping[str, Any], where: str) -> TensorInfo:
    dtype, shape = entry.get("dtype"), entry.get("shape")
    if not name or not name.isprintable() or len(name) > 1000:
        raise BadInput(f"{where}: tensor name {_short(name)} is empty, overlong or holds unprintable characters")
    if not isinstance(dtype, str) or dtype not in NUMPY_DTYPES:
        raise BadInput(f"{where}: tensor {name!r} has dtype {_short(str(dtype))}; known are {', '.join(NUMPY_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_natural, shape)):
        raise BadInput(f"{where}: tensor {name!r} has no valid shape (at most {MAX_DIMENSIONS} whole numbers)")
    elements = 1
    for n in shape:
        elements *= max(n, 1)  # a zero must not hide an overflow elsewhere: arrays refuse that as well
    if elements * NUMPY_DTYPES[dtype].itemsize > _INT64:
        raise BadInput(f"{where}: tensor {name!r} has shape {shape}, larger than any file")
    return TensorInfo(name, dtype, tuple(shape))


def encode_header(infos: Sequence[TensorInfo], metadata: Mapping[str, str] | None) -> bytes:
    """The length and JSON header of a file that holds `infos` in that order, padded to 8 bytes."""
    body: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for info in infos:
        body[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [at, at + info.nbytes]}
        at += info.nbytes
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def read_header(path: Path, where: str | None = None) -> Header:
    """The header of a local file.

    Raises:
        BadInput: missing, unreadable or damaged.
    """
    where = where or str(path)
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(LENGTH_BYTES)
            length = header_length(start, size, where)
            raw = start + b"".join(pieces(file.fileno(), LENGTH_BYTES, length, where))
    except OSError as error:
        raise BadInput(f"{where}: cannot be read: {error.strerror}") from error
    return parse_header(raw, size, where)


def fill(fd: int, offset: int, view: memoryview, what: str) -> None:
    """Fill `view` from `offset` of an open file.

    Raises:
        BadInput: the file ends earlier.
    """
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise BadInput(
                f"{what}: ends at byte {offset + len(view)} of its file, which has only {offset + done}; it was cut"
            )
        done += got


def pieces(fd: int, offset: int, nbytes: int, what: str, buffer: memoryview | None = None) -> Iterator[memoryview]:
    """`nbytes` bytes of a file, a piece at a time; each piece is valid until the next, which reuses the buffer.

    Raises:
        BadInput: the file ends earlier.
    """
    if buffer is None:
        buffer = memoryview(bytearray(min(nbytes, 1 << 20)))
    while nbytes > 0:
        piece = buffer[: min(nbytes, len(buffer))]
        fill(fd, offset, piece, what)
        yield piece
        offset += len(piece)
        nbytes -= len(piece)


class SafetensorsFile:
    """Positional reads of one local file; safe from several threads. The file is opened at the first read."""

    def __init__(self, path: Path, header: Header, where: str):
        self.path, self.header, self.where = path, header, where
        self._fd, self._closed = -1, False
        self._lock = threading.Lock()

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """As :meth:`moeforge.checkpoint.base.Checkpoint.read`."""
        info, offset = self.header.tensors[name], self.header.offsets[name]
        shape, skip = row_range(info, rows)
        out = np.empty(shape, NUMPY_DTYPES[info.dtype])
        if out.nbytes:
            view = out.reshape(-1).view(np.uint8).data
            fill(self._descriptor(), offset + skip, view, f"{self.where}: tensor {name!r}")
        return out

    def extent(self, name: str) -> Extent:
        return Extent(self.path, self.header.offsets[name], self.header.tensors[name].nbytes)

    def _descriptor(self) -> int:
        with self._lock:
            if self._closed:
                raise ValueError(f"{self.where} is closed")
            if self._fd < 0:
                try:
                    self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise BadInput(f"{self.where}: cannot be read: {error.strerror}") from error
            return self._fd

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def row_range(info: TensorInfo, rows: slice | None) -> tuple[tuple[int, ...], int]:
    """Shape of rows `rows` of a tensor, and how many bytes lie before them.

    Raises:
        BadInput: the tensor has no rows, or the slice has a step.
    """
    if rows is None:
        return info.shape, 0
    if not info.shape or rows.step not in (None, 1):
        raise BadInput(
            f"tensor {info.name!r} {list(info.shape)}: cannot take rows {rows}; only contiguous rows are read"
        )
    start, stop, _ = rows.indices(info.shape[0])
    shape = (max(stop - start, 0), *info.shape[1:])
    row_bytes = info.nbytes // info.shape[0] if info.shape[0] else 0
    return shape, start * row_bytes
