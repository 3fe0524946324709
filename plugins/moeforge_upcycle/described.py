"""Descriptions in JSON: our own files and those of third parties.

A third party registers a description under an entry-point group; the entry's name is the model type, its object a dict or the
path of a JSON file. Architectures (`moeforge.architectures`) work the same way, see moeforge.checkpoint.architectures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from moeforge import registry

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


def _read(entry: registry.Entry) -> dict[str, Any]:
    given = entry.load()
    return dict(given) if isinstance(given, Mapping) else json.loads(Path(given).read_text("utf-8"))
