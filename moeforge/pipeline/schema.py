"""Whether a manifest is what its readers take it for. It comes from the network as often as not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from ..errors import BadInput

LINEAGE: dict[str, type | tuple[type, ...]] = {
    "verb": str, "method": str, "reference": str, "digest": str, "options": dict, "method_options": dict, "counts": dict,
    "verdicts": dict, "parents": list,
}  # fmt: skip
"""Key -> type, of what a manifest has and its children keep. All may be absent."""
OWN: dict[str, type | tuple[type, ...]] = {
    **LINEAGE, "kind": str, "key": str, "files": dict, "tensors": dict, "facts": dict, "warnings": list, "versions": dict,
    "timings": dict, "created": str,
}  # fmt: skip
PARENT: dict[str, type | tuple[type, ...]] = {
    "digest": str, "license": str, "revision": str, "format": str, "manifest": dict, "role": str,
}  # fmt: skip
"""Of an entry of `parents`, beside its `ref`; `role` says what it was for where nothing of it is in the result: `teacher`."""
REQUIRED = ("kind", "verb", "digest", "files", "parents")


def check_manifest(body: Mapping[str, Any], where: str) -> None:
    """Refuse a manifest with missing keys, values of other types, or files that lead out of its directory.

    Args:
        where: the file, for the message.

    Raises:
        BadInput: names the key and what was found.
    """
    for key in REQUIRED:
        if key not in body:
            raise BadInput(f"{where}: the manifest has no {key!r}")
    _check_types(body, OWN, where)
    for name, info in body["files"].items():
        _check_name(name, where)
        size, digest = (info.get("bytes"), info.get("digest")) if isinstance(info, dict) else (None, None)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0 or not isinstance(digest, str):
            raise BadInput(f"{where}: files: {name!r} is {info!r}, not a size in bytes and a digest")
    for table in ("tensors", "versions"):
        _check_values(body.get(table, {}), str, f"{where}: {table}")
    _check_values(body.get("timings", {}), (int, float), f"{where}: timings")
    _check_parents(body["parents"], where)


def _check_parents(parents: list[Any], where: str) -> None:
    for parent in parents:
        if not isinstance(parent, dict) or not isinstance(parent.get("ref"), str):
            raise BadInput(f"{where}: parents holds {parent!r}, not an object with a ref")
        named = f"{where}: parents: {_short(parent['ref'])}"
        _check_types(parent, PARENT, named)
        if "manifest" in parent:
            _check_types(parent["manifest"], LINEAGE, named)
            _check_parents(parent["manifest"].get("parents", []), named)


def _check_types(body: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    for key, wanted in types.items():
        if key in body and not isinstance(body[key], wanted):
            raise BadInput(f"{where}: {key!r} is {_short(body[key])}, not {_name(wanted)}")


def _check_values(table: Mapping[str, Any], wanted: type | tuple[type, ...], where: str) -> None:
    for key, value in table.items():
        if not isinstance(value, wanted):
            raise BadInput(f"{where}: {key!r} is {_short(value)}, not {_name(wanted)}")


def _check_name(name: str, where: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or "\0" in name:
        raise BadInput(f"{where}: files: {name!r} is no name of a file within the directory")


def _name(wanted: type | tuple[type, ...]) -> str:
    return {str: "a text", dict: "an object", list: "a list"}.get(wanted, "a number")  # pyright: ignore[reportArgumentType, reportCallIssue]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
