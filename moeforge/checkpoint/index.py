"""`model.safetensors.index.json`: which tensor stands in which file; and which files of a directory are its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from .safetensors import Header, parse_json
from .tensor import TensorInfo

STEM = "model"
SINGLE = f"{STEM}.safetensors"
INDEX = SINGLE + ".index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = PICKLE_SINGLE + ".index.json"


@dataclass(frozen=True)
class Weights:
    """Where a checkpoint keeps its tensors: one `file`, or the `index` that names several."""

    file: str | None = None
    index: str | None = None
    pickled: bool = False


def choose_weights(
    names: Collection[str], where: str, allow_pickle: bool = False, spell: Callable[[str], str] | None = None
) -> Weights:
    """The weights among the file names of a directory or repository, in transformers' order of preference.

    Args:
        spell: how a user names one of the files; default: `where`/file.

    Raises:
        BadInput: there are none, it is not clear which are meant, or they are pickled and that was not allowed.
    """
    for found in (Weights(file=SINGLE), Weights(index=INDEX)):
        if (found.file or found.index) in names:
            return found
    loose = sorted(n for n in names if n.endswith(".safetensors") and "/" not in n and not n.startswith("adapter"))
    if len(loose) == 1:
        return Weights(file=loose[0])
    if loose:
        raise BadInput(
            f"{where}: {len(loose)} safetensors files ({loose[0]}, ...) but no {INDEX}; get the index as well"
        )
    for found in (Weights(PICKLE_SINGLE, pickled=True), Weights(index=PICKLE_INDEX, pickled=True)):
        if (file := found.file or found.index) in names:
            if allow_pickle:
                return found
            raise BadInput(f"{where}: its weights are pickled ({file}); unpickling can run code that came with the file: get a "
                           "safetensors version, or pass --allow-pickle to read tensors only")  # fmt: skip
    if gguf := sorted(n for n in names if n.endswith(".gguf")):
        named = spell(gguf[0]) if spell else f"{where}/{gguf[0]}"
        raise BadInput(f"{where}: holds no safetensors, but {len(gguf)} GGUF files; name one itself, e.g. {named}")
    raise BadInput(f"{where}: holds no weights ({SINGLE}, {INDEX} or {PICKLE_SINGLE})")


def lone_gguf(names: Collection[str]) -> str | None:
    """The GGUF file of a directory or repository that holds one and no other weights."""
    found = [name for name in names if name.endswith(".gguf")]
    others = any(name.endswith((".safetensors", ".bin")) for name in names)
    return found[0] if len(found) == 1 and not others else None


def read_index(data: bytes, where: str, suffix: str = ".safetensors") -> dict[str, str]:
    """The tensor -> file map of an index.

    Raises:
        BadInput: it is damaged, or names a file that is not a plain name ending in `suffix`.
    """
    found = parse_json(data, where).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise BadInput(f"{where}: has no weight_map, or an empty one")
    for tensor, file in found.items():
        if (
            not isinstance(file, str)
            or not file.endswith(suffix)
            or "/" in file
            or "\\" in file
            or not file.isprintable()
        ):
            raise BadInput(
                f"{where}: places tensor {tensor[:200]!r} in {str(file)[:200]!r}, which is not a plain *{suffix} file name"
            )
    return found


def join_shards(
    weight_map: Mapping[str, str], shards: Mapping[str, Header], where: str
) -> dict[str, tuple[str, TensorInfo]]:
    """name -> (file, info) of every tensor, files in name order and tensors in offset order.

    Raises:
        BadInput: index and shards disagree on where a tensor stands.
    """
    found: dict[str, tuple[str, TensorInfo]] = {}
    for file, header in sorted(shards.items()):
        for name, info in header.tensors.items():
            if name in found:
                raise BadInput(f"{where}: tensor {name!r} stands in both {found[name][0]} and {file}")
            if name not in weight_map:
                raise BadInput(f"{where}: {file} holds tensor {name!r}, which the index does not list")
            found[name] = (file, info)
    for name, file in weight_map.items():
        if name not in found or found[name][0] != file:
            raise BadInput(f"{where}: the index places tensor {name!r} in {file}, which does not hold it")
    return found


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """An index file: tensors sorted by name, `total_size` the tensors' bytes without headers."""
    body: dict[str, Any] = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(body, indent=2) + "\n").encode()
