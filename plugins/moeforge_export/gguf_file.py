"""Writes the GGUF file: header through the `gguf` package, then tensor after tensor, an expert at a time."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, quants
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from gguf.constants import GGMLQuantizationType as Kind

from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.gguf_names import rope_order
from moeforge.checkpoint.gguf_quants import PLAIN
from moeforge.checkpoint.writer import check_room

from .gguf_model import TINY, Entry
from .narrow import narrow

_CHUNK = 1 << 20


class _Writer(GGUFWriter):
    """The package's writer, which leaves empty arrays out; whoever reads a byte-level vocabulary without merges (one byte a
    token) asks for them all the same."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        if vtype == GGUFValueType.ARRAY and sub_type is not None and not len(val):
            return struct.pack("<IIQ", vtype, sub_type, 0)
        return super()._pack_val(val, vtype, add_vtype, sub_type)


def write_gguf(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    entries: list[Entry],
    extra: Mapping[str, np.ndarray],
    checkpoint: Checkpoint,
    on_bytes: Callable[[int], None],
) -> None:
    """Write `path`. Peak memory: two source tensors (one expert each where experts are stacked) and their encodings.

    Args:
        extra: small float32 tensors that are computed, not read (rotary factors).

    Raises:
        MachineLacks: the disk has no room for it.
    """
    path.unlink(missing_ok=True)
    check_room(path.parent, sum(entry.nbytes for entry in entries))
    writer = _Writer(path, arch)
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, values in extra.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
    for entry in entries:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.nbytes, entry.kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        _pad(file)
        for values in extra.values():
            file.write(values.tobytes())
            _pad(file)
        for last, data in _bodies(checkpoint, entries):
            file.write(data.data)
            on_bytes(data.nbytes)
            if last:
                _pad(file)
        file.flush()
        os.fsync(file.fileno())


def _bodies(checkpoint: Checkpoint, entries: list[Entry]) -> Iterator[tuple[bool, np.ndarray]]:
    """(last of its tensor, bytes), in order, the next one being read and encoded while the caller writes."""
    jobs = ((entry, source, source is entry.sources[-1]) for entry in entries for source in entry.sources)
    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for entry, source, last in jobs:
            coming = (last, ahead.submit(_body, checkpoint, entry, source))
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = coming
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def _body(checkpoint: Checkpoint, entry: Entry, source: str) -> np.ndarray:
    values = checkpoint.read(source)
    if entry.heads is not None:
        values = values[rope_order(len(values), entry.heads)]
    if entry.never_zero and not values.any():
        values = np.full(values.shape, TINY, np.float32)
    return encode(values, entry.kind, source)


def encode(values: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """The bytes (uint8 [n]) of `values` in a GGUF encoding.

    Raises:
        BadInput: a value is beyond the largest number of `kind`.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    if kind in PLAIN:
        return narrow(flat, PLAIN[kind], name).view(np.uint8)
    # as single rows of whole blocks: the package loops in Python over groups of 16 rows
    chunks = [quants.quantize(flat[at : at + _CHUNK].astype(np.float32).reshape(1, -1), kind).reshape(-1)
              for at in range(0, len(flat), _CHUNK)]  # fmt: skip
    return np.concatenate(chunks)


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif len(value):
        writer.add_array(key, value.tolist() if isinstance(value, np.ndarray) else value)
    else:
        writer.add_key_value(key, value, GGUFValueType.ARRAY, GGUFValueType.STRING)


def _pad(file) -> None:
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
