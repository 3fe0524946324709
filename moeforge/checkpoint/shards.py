"""How tensors are laid out over files: decided from headers alone, so that a plan can state every file and size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from ..errors import BadInput
from .index import STEM
from .safetensors import LENGTH_BYTES, MAX_HEADER_BYTES, Header, encode_header, parse_header
from .tensor import NUMPY_DTYPES, TensorInfo

PT_METADATA: Mapping[str, str] = {"format": "pt"}
"""What transformers asks of a file's metadata."""
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Shard:
    """One file: its name, its exact header bytes, and the tensors in file order."""

    name: str
    tensors: tuple[TensorInfo, ...]
    header: bytes

    @cached_property
    def total_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(info.nbytes for info in self.tensors)

    @cached_property
    def layout(self) -> Header:
        """Where each tensor lies in the file."""
        return parse_header(self.header, self.total_bytes, self.name)


def plan_shards(infos: Iterable[TensorInfo], max_shard_bytes: int = MAX_SHARD_BYTES,
                metadata: Mapping[str, str] | None = PT_METADATA, stem: str = STEM) -> list[Shard]:  # fmt: skip
    """The files that hold `infos`: filled in order, a new one when the next tensor would pass `max_shard_bytes`.

    Within a file, tensors of wider dtypes come first (each tensor then starts at a multiple of its item size, as readers
    that map files like it) and otherwise keep their order. A tensor larger than the limit gets a file of its own. One file
    is called `{stem}.safetensors`, several `{stem}-00001-of-0000N.safetensors`.

    Args:
        max_shard_bytes: tensor bytes in a file, header not counted (as the Hub's libraries count).

    Raises:
        BadInput: a name occurs twice, or there is nothing to write.
    """
    groups: list[list[TensorInfo]] = []
    seen: set[str] = set()
    room = 0
    for info in infos:
        if info.name in seen:
            raise BadInput(f"two tensors called {info.name!r} would be written; every output needs its own name")
        seen.add(info.name)
        if not groups or info.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(info)
        room -= info.nbytes
    if not groups:
        raise BadInput("no tensors to write")
    shards = []
    for number, group in enumerate(groups, 1):
        name = stem if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}"
        name += ".safetensors"
        group.sort(key=lambda info: -NUMPY_DTYPES[info.dtype].itemsize)
        header = encode_header(group, metadata)
        if len(header) - LENGTH_BYTES > MAX_HEADER_BYTES:
            raise BadInput(
                f"{name} would need a header of {len(header)} bytes for {len(group)} tensors; use smaller shards"
            )
        shards.append(Shard(name, tuple(group), header))
    return shards
