"""Digests of files and artifacts.

A safetensors file is hashed as `sha256(header bytes, sha256(tensor) for each tensor in file order)`, so that a buffer
written to several places (eight equal experts) is hashed once. Every other file: plain sha256. An artifact: sha256 over
the sorted lines `name:digest` of its files without the manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import BadInput
from .safetensors import Header, pieces, read_header

PREFIX = "sha256:"
MANIFEST = "moeforge.json"
CARD = "README.md"


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def file_digest(path: Path) -> str:
    """The digest of one file, by its kind.

    Raises:
        BadInput: a safetensors file that is damaged.
    """
    if path.suffix == ".safetensors":
        return safetensors_digest(path)[0]
    with open(path, "rb") as file:
        return PREFIX + hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_digest(path: Path, on_bytes: Callable[[int], None] | None = None) -> tuple[str, dict[str, str]]:
    """The digest of a safetensors file, and the sha256 (hex) of each of its tensors.

    Raises:
        BadInput: the file is damaged.
    """
    header = read_header(path)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def digest(name: str) -> bytes:
        state = hashlib.sha256()
        for piece in pieces(fd, header.offsets[name], header.tensors[name].nbytes, f"{path}: tensor {name!r}"):
            state.update(piece)
        return state.digest()

    found: dict[str, str] = {}
    try:
        with ThreadPoolExecutor(cores()) as pool:
            try:
                for name, value in zip(header.tensors, pool.map(digest, header.tensors), strict=True):
                    found[name] = value.hex()
                    if on_bytes is not None:
                        on_bytes(header.tensors[name].nbytes)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    finally:
        os.close(fd)
    return join_digests(header, found), found


def join_digests(header: Header, tensors: Mapping[str, str]) -> str:
    """A safetensors file's digest from its header and its tensors' digests (hex)."""
    state = hashlib.sha256(header.raw)
    for name in header.tensors:
        state.update(bytes.fromhex(tensors[name]))
    return PREFIX + state.hexdigest()


def artifact_digest(files: Mapping[str, str]) -> str:
    """The digest of a directory whose files (without the manifest) have these digests."""
    lines = "".join(f"{name}:{digest}\n" for name, digest in sorted(files.items()))
    return PREFIX + hashlib.sha256(lines.encode()).hexdigest()


def changed_files(
    directory: Path,
    files: Mapping[str, Mapping[str, Any]],
    on_bytes: Callable[[int], None] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> list[str]:
    """Which of the `files` of a manifest (name -> {bytes, digest}) are missing or changed: a line a mismatch.

    Args:
        tensors: tensor name -> sha256 (hex, or its first digits); names what changed within a file.
    """
    count = on_bytes or (lambda _: None)
    problems = []
    for name, info in sorted(files.items()):
        path = directory / name
        if name.startswith("/") or ".." in Path(name).parts:
            problems.append(f"{name}: leads out of the directory")
            continue
        if not path.is_file():
            problems.append(f"{name}: missing")
            continue
        size = path.stat().st_size
        if size != info["bytes"]:
            problems.append(f"{name}: {size} bytes, the manifest says {info['bytes']}")
            continue
        each: dict[str, str] = {}
        try:
            if path.suffix == ".safetensors":
                found, each = safetensors_digest(path, count)
            else:
                found = file_digest(path)
                count(size)
        except BadInput as error:
            problems.append(f"{name}: {error}")
            continue
        if found != info["digest"]:
            changed = [
                tensor for tensor, value in each.items() if not value.startswith((tensors or {}).get(tensor, ""))
            ]
            told = f"; changed: {', '.join(changed[:3])}" + (
                f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            )
            problems.append(f"{name}: digest {found}, the manifest says {info['digest']}{told if changed else ''}")
    return problems


def verify_files(
    directory: Path,
    files: Mapping[str, Mapping[str, Any]],
    on_bytes: Callable[[int], None] | None = None,
    tensors: Mapping[str, str] | None = None,
) -> list[str]:
    """As :func:`changed_files`; files that the manifest does not list are mismatches as well.

    Names that start with a dot are nobody's business, and the model card is written about an artifact after it is whole.
    """
    problems = changed_files(directory, files, on_bytes, tensors)
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name not in files and name not in (MANIFEST, CARD) and not name.startswith("."):
            problems.append(f"{name}: not in the manifest")
    return problems
