"""Descriptions in JSON: our own files and those of third parties.

A third party registers a description under an entry-point group; the entry's name is the model type, its object a dict or the
path of a JSON file. Architectures (`moeforge.architectures`) work the same way, see moeforge.checkpoint.architectures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moeforge import registry
from moeforge.errors import UsageProblem

GROUPS = {"pairs": "moeforge.upcycle_pairs", "targets": "moeforge.upcycle_targets"}
"""Folder beside this file -> the entry-point group that adds to it."""


def find(folder: str, name: str) -> list[dict[str, Any]]:
    """Every description of that name, ours first, then by distribution.

    Raises:
        UsageProblem: a third party's cannot be imported.
    """
    file = _files(folder).get(name)
    ours = [] if file is None else [json.loads(file.read_text("utf-8"))]
    return [*ours, *(_read(entry) for entry in registry.entries(GROUPS[folder]).get(name, ()))]


def names(folder: str) -> list[str]:
    """All names that someone has described; those that only others build on start with an underscore and are left out."""
    return sorted(name for name in {*_files(folder), *registry.entries(GROUPS[folder])} if not name.startswith("_"))


def _files(folder: str) -> dict[str, Any]:
    def walk() -> Iterator[tuple[str, Any]]:
        for file in resources.files(__name__.rpartition(".")[0]).joinpath(folder).iterdir():
            if file.name.endswith(".json"):
                yield file.name.removesuffix(".json"), file

    return dict(walk())


def identities() -> list[list[str]]:
    """Everything that third parties describe, for a run's key: group, name, distribution and a hash of the content."""
    found = []
    for group in sorted(registry.DESCRIPTIONS):
        for name, entries in sorted(registry.entries(group).items()):
            for entry in entries:
                if entry.distribution == registry.OURS:
                    continue
                try:
                    content = json.dumps(_read(entry), sort_keys=True, default=str)
                except UsageProblem as error:  # it only matters where its family or layout is asked for
                    content = str(error)
                found.append([group, name, entry.distribution, hashlib.sha256(content.encode()).hexdigest()])
    return found


@contextlib.contextmanager
def parsing(folder: str, name: str) -> Iterator[None]:
    """Turn what a wrong description raises while it is taken apart into one line.

    Raises:
        UsageProblem: a key is missing, unknown, or holds another type; names whose description it is.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        owners = (
            ", ".join(entry.distribution for entry in registry.entries(GROUPS[folder]).get(name, ())) or registry.OURS
        )
        raise UsageProblem(f"{GROUPS[folder]}: the description of {name!r} from {owners} is broken: "
                           f"{type(error).__name__}: {error}; repair or uninstall that package") from error  # fmt: skip


def _read(entry: registry.Entry) -> dict[str, Any]:
    given = entry.load()
    try:
        found = dict(given) if isinstance(given, Mapping) else json.loads(Path(given).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageProblem(f"{given} from {entry.distribution}: not a description in JSON: {error}; "
                           f"repair or uninstall {entry.distribution}") from error  # fmt: skip
    if not isinstance(found, dict):
        raise UsageProblem(f"{given} from {entry.distribution}: a description is a JSON object; "
                           f"repair or uninstall {entry.distribution}")  # fmt: skip
    return found
