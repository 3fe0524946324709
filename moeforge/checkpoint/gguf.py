"""A GGUF file as a Hugging Face checkpoint: names, row order, config and tokenizer of the original.

Quantised weights are decoded on read. The checkpoint shows one dtype: the file's own where weights are stored as plain
F32, F16 or BF16, else BF16 (what people train in); `dtype` overrides. Everything that compares a conversion with "the
dense model" reads this same view, so equality proofs are not disturbed by the choice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BadInput, UsageProblem
from . import gguf_quants
from .base import Checkpoint
from .gguf_config import build_config, build_generation_config, pick_family
from .gguf_header import GGUFHeader, GGUFTensor, read_header
from .gguf_names import Family, Place, rope_order
from .tensor import FLOATS, NUMPY_DTYPES, Companion, Extent, TensorInfo

ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows of a GGUF tensor that make one Hugging Face tensor of shape `shape`."""

    shape: tuple[int, ...]
    tensor: GGUFTensor
    offset: int
    """First byte of this tensor's rows (an expert's, in a stacked tensor)."""
    row_bytes: int
    order: np.ndarray | None
    """Row i of the result is stored row `order[i]`."""


class GGUFCheckpoint(Checkpoint):
    """Reads a GGUF file lazily.

    Args:
        path: the file.
        dtype: the dtype in which every tensor is shown (`F32`, `F16`, `BF16`); None chooses, see the module.
        ref: how the user named it; default the path.

    Raises:
        BadInput: damaged, or of an architecture, tensor or quantisation that is not known.
        UsageProblem: `dtype` is not one of the three.
    """

    def __init__(self, path: str | os.PathLike[str], *, dtype: str | None = None, ref: str | None = None):
        self.root = Path(path)
        self.ref = ref or str(path)
        header = read_header(self.root)
        self._fd = os.open(self.root, os.O_RDONLY | os.O_CLOEXEC)
        self._lay_out(header, dtype)

    def _lay_out(self, header: GGUFHeader, dtype: str | None = None) -> None:
        """Find config and tensors in the header; closes what is open when it cannot."""
        try:
            self._place(header, dtype)
        except BaseException:
            self.close()
            raise

    def _place(self, header: GGUFHeader, dtype: str | None) -> None:
        self._header = header
        if header.metadata.get("split.count", 1) != 1:
            raise BadInput(
                f"{self.ref}: one of {header.metadata['split.count']} parts of a GGUF file; join them with llama-gguf-split --merge"
            )
        named = {tensor.name: tensor for tensor in header.tensors}
        factors = named.pop(ROPE_FACTORS, None)
        kinds = {t.kind for t in named.values() if len(t.shape) > 1}
        for tensor in named.values():
            if not gguf_quants.supported(tensor.kind):
                raise BadInput(f"{self.ref}: tensor {tensor.name!r} is stored as {tensor.kind.name}, which cannot be decoded; "
                               "convert the file to Q8_0 or F16 first")  # fmt: skip
        stored = {gguf_quants.PLAIN.get(kind) for kind in kinds}
        self.dtype = dtype or (stored.pop() if len(stored) == 1 else None) or "BF16"
        if self.dtype not in FLOATS - {"F64"}:
            raise UsageProblem(f"{self.ref}: dtype {dtype!r}; a GGUF file is read as F32, F16 or BF16")
        family = pick_family(header.metadata, self.ref)
        self.config = build_config(family, header.metadata, named, self._plain(factors), self.dtype, self.ref)
        self._sources = self._locate(family, named)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, self.dtype, source.shape) for name, source in self._sources.items()
        }

    def _locate(self, family: Family, named: Mapping[str, GGUFTensor]) -> dict[str, _Source]:
        layers = self.config["num_hidden_layers"]
        experts = int(self._header.metadata.get(f"{family.arch}.expert_count", 0))
        if not 0 < layers <= len(named) or not 0 <= experts <= 1 << 16:  # before a damaged number makes a huge table
            raise BadInput(
                f"{self.ref}: {layers} layers and {experts} experts in {len(named)} tensors; the file is damaged"
            )
        places = family.places(layers, experts)
        for name, place in places.items():
            if name not in named and not place.optional:
                raise BadInput(
                    f"{self.ref}: tensor {name!r} is missing; arch {family.arch!r} with {layers} layers has it"
                )
        sources = {}
        for tensor in named.values():
            place = places.get(tensor.name)
            if place is None:
                raise BadInput(f"{self.ref}: tensor {tensor.name!r} has no known place in {family.model_type}; this file holds more "
                               "than the architecture")  # fmt: skip
            each = _unstack(tensor, place, self.ref)
            order = None
            if place.heads:
                heads = self.config[place.heads]
                if each[0] % (2 * heads):
                    raise BadInput(f"{self.ref}: tensor {tensor.name!r} has {each[0]} rows, not whole heads of "
                                   f"{place.heads} = {heads}")  # fmt: skip
                order = np.argsort(rope_order(each[0], heads))
            nbytes = tensor.nbytes // len(place.names)
            for e, name in enumerate(place.names):
                sources[name] = _Source(each, tensor, tensor.offset + e * nbytes, nbytes // each[0], order)
        return sources

    def _plain(self, tensor: GGUFTensor | None) -> np.ndarray | None:
        if tensor is None:
            return None
        raw = self._bytes(tensor.offset, tensor.nbytes, tensor.name)
        return gguf_quants.dequantize(raw.reshape(1, -1), tensor.kind, np.dtype(np.float32)).reshape(-1)

    def _bytes(self, offset: int, nbytes: int, name: str) -> np.ndarray:
        out = np.empty(nbytes, np.uint8)
        view, done = memoryview(out.data), 0
        while done < nbytes:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise BadInput(
                    f"{self.ref}: tensor {name!r} ends at byte {offset + nbytes}, the file has only {offset + done}; it was cut"
                )
            done += got
        return out

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        if name not in self._sources:
            raise BadInput(f"{self.ref}: no tensor {name!r}")
        source = self._sources[name]
        start, stop, step = (rows or slice(None)).indices(source.shape[0])
        if step != 1:
            raise BadInput(f"{self.ref}: rows {rows} of {name!r}: only contiguous rows are read")
        count = max(stop - start, 0)
        stop = start + count
        pick = None
        if source.order is not None and count:
            pick = source.order[start:stop]
            start, stop = int(pick.min()), int(pick.max()) + 1
            pick = pick - start
        raw = self._bytes(source.offset + start * source.row_bytes, (stop - start) * source.row_bytes, name)
        raw = raw.reshape(stop - start, source.row_bytes)
        if pick is not None:
            raw = raw[pick]
        values = gguf_quants.dequantize(raw, source.tensor.kind, NUMPY_DTYPES[self.dtype])
        return values.reshape(count, *source.shape[1:])

    def extent(self, name: str) -> Extent | None:
        source = self._sources.get(name)
        if source is None or source.order is not None or gguf_quants.PLAIN.get(source.tensor.kind) != self.dtype:
            return None
        return Extent(self._local(), source.offset, source.shape[0] * source.row_bytes)

    def _local(self) -> Path:
        """Where the file lies."""
        assert self.root is not None
        return self.root

    def _version(self) -> str:
        """What tells this file from another with the same header."""
        stat = self._local().stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def companions(self) -> Sequence[Companion]:
        from .gguf_tokenizer import build_tokenizer, encode

        files = build_tokenizer(self._header.metadata, self.config, self.ref)
        files["generation_config.json"] = encode(build_generation_config(self._header.metadata))
        return [Companion(name, data=data) for name, data in sorted(files.items())]

    def provenance(self) -> dict[str, Any]:
        meta = self._header.metadata
        seen = f"{self._header.digest} {self._version()} {self.dtype}"
        digest = "sha256:" + hashlib.sha256(seen.encode()).hexdigest()
        found: dict[str, Any] = {
            "ref": self.ref,
            "format": "gguf",
            "digest": digest,
            "stored": sorted({tensor.kind.name for tensor in self._header.tensors}),
            "read_as": self.dtype,
        }
        if isinstance(meta.get("general.license"), str):
            found["license"] = meta["general.license"]
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unstack(tensor: GGUFTensor, place: Place, ref: str) -> tuple[int, ...]:
    """The shape of each of the Hugging Face tensors that a GGUF tensor holds.

    Raises:
        BadInput: the tensor has another shape than its place.
    """
    shape = tensor.shape
    if place.vector:
        return (1, tensor.shape[-1])
    if place.stacked:
        if len(shape) != 3 or shape[0] != len(place.names):
            raise BadInput(
                f"{ref}: tensor {tensor.name!r} has shape {shape}, expected {len(place.names)} stacked experts"
            )
        return shape[1:]
    if len(shape) > 2 or (len(shape) == 1 and tensor.kind not in gguf_quants.PLAIN):
        raise BadInput(
            f"{ref}: tensor {tensor.name!r} is {tensor.kind.name} {shape}, expected a matrix or a plain vector"
        )
    return shape
