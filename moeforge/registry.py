"""Names to objects, without importing anything until it is used.

Two sources, one resolver: `builtins.toml` beside this file (our own plugins, so that a bare checkout works) and the
entry points of installed distributions. Groups are `moeforge.verbs`, `moeforge.<verb>` (its methods), `moeforge.mixtures` (types of
experts: subclasses of moeforge.mixture.experts.base.Experts), `moeforge.architectures` (ours are the files beside that module), `moeforge.upcycle_pairs` and `moeforge.upcycle_targets`. The
environment variable MOEFORGE_PLUGINS limits third parties: unset, all load; empty, none; else a comma-separated list of
distribution names.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import tomllib
from dataclasses import dataclass
from importlib import metadata, resources
from typing import Any

from .errors import UsageProblem
from .options import did_you_mean, specs

API_VERSION = 1
OURS = "moeforge"
VERBS = "moeforge.verbs"
ARCHITECTURES = "moeforge.architectures"
MIXTURES = "moeforge.mixtures"
SUMMARIES = "summaries"
"""Table of `builtins.toml`: `moeforge --help` must not import every verb for its one line."""
DESCRIPTIONS = frozenset({ARCHITECTURES, "moeforge.upcycle_pairs", "moeforge.upcycle_targets"})
"""Groups of data: a dict or the path of a JSON file."""


@dataclass(frozen=True)
class Entry:
    """A name that some distribution provides in a group, not yet imported."""

    group: str
    name: str
    target: str
    """`module:object`"""
    distribution: str
    summary: str | None = None
    """What it is for in one line, where that is known without importing it."""

    def load(self) -> Any:
        """Import and return the object.

        Raises:
            UsageProblem: it cannot be imported, lacks what its kind must have, or was made for another version of the plugin
                interface.
        """
        try:
            loaded = load_object(self.target)
        except Exception as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error
        wanted = getattr(loaded, "api_version", API_VERSION)
        if wanted != API_VERSION:
            raise UsageProblem(
                f"{self.name!r} from {self.distribution} speaks plugin interface {wanted}, this moeforge speaks "
                f"{API_VERSION}; install a matching release of {self.distribution}"
            )
        try:
            flaw = _flaw(self.group, loaded)
        except Exception as error:
            raise self._broken(f"{loaded.__name__}.Options: {type(error).__name__}: {error}") from error
        if flaw:
            raise self._broken(flaw)
        return loaded

    def make(self) -> Any:
        """An instance of the class: a verb or a method at work.

        Raises:
            UsageProblem: see `load`; or its constructor fails.
        """
        loaded = self.load()
        try:
            return loaded()
        except Exception as error:
            raise self._broken(f"{type(error).__name__}: {error}") from error

    def _broken(self, why: str) -> UsageProblem:
        return UsageProblem(f"{self.name!r} comes from {self.distribution}, which is broken: {why}; "
                            f"repair or uninstall {self.distribution}")  # fmt: skip


def _flaw(group: str, loaded: Any) -> str:
    """What an object lacks to be what its group says, empty when nothing: the contracts of `moeforge.pipeline.stage`.

    Raises:
        Exception: whatever its Options raise when they are looked at.
    """
    if group in DESCRIPTIONS:
        if isinstance(loaded, dict) or (isinstance(loaded, str | os.PathLike) and os.path.isfile(loaded)):
            return ""
        return f"a description is a dict or the path of a JSON file, not {loaded!r}"
    if not isinstance(loaded, type):
        return f"{loaded!r} is no class"
    if group == MIXTURES:
        lacks = [name for name in ("at", "stored", "reset_parameters", "forward") if not hasattr(loaded, name)]
        return f"{loaded.__name__} is no kind of experts, it has no {lacks[0]}" if lacks else ""
    wanted: dict[str, Any] = {"name": str, "summary": str, "Options": type}
    if group == VERBS and hasattr(loaded, "run"):
        wanted |= {"consumes": frozenset, "produces": str, "output": str, "default_method": str | None, "plan": object}
    elif group == VERBS:
        wanted |= {"consumes": frozenset, "sources": int, "answer": object}
    else:
        wanted |= {"reference": str}
    for name, kind in wanted.items():
        if not hasattr(loaded, name):
            return f"{loaded.__name__} has no {name}"
        if not isinstance(getattr(loaded, name), kind):
            return f"{loaded.__name__}.{name} is {getattr(loaded, name)!r}"
    specs(loaded.Options)
    return ""


def load_object(target: str) -> Any:
    """The object named by `module:attribute`."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


@functools.cache
def _table() -> dict[str, dict[str, str]]:
    return tomllib.loads(resources.files("moeforge").joinpath("builtins.toml").read_text("utf-8"))


def _builtins() -> dict[str, dict[str, str]]:
    return {group: names for group, names in _table().items() if group != SUMMARIES}


@functools.cache
def _families() -> dict[str, str]:
    """Our own architectures, which are files."""
    folder = resources.files("moeforge").joinpath("checkpoint", "architectures")
    names = sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))
    return {name: f"moeforge.checkpoint.architectures:described.{name}" for name in names}


@functools.cache
def _third_party() -> tuple[Entry, ...]:
    wanted = os.environ.get("MOEFORGE_PLUGINS")
    if wanted is not None and not wanted.strip():
        return ()
    allowed = None if wanted is None else {_normal(name) for name in wanted.split(",")}
    found = []
    points = metadata.entry_points()
    ours = sorted(group for group in points.groups if group.startswith("moeforge."))
    for point in (point for group in ours for point in points.select(group=group)):
        owner = point.dist.name if point.dist is not None else "unknown"
        if _normal(owner) == OURS or (allowed is not None and _normal(owner) not in allowed):
            continue
        found.append(Entry(point.group, point.name, point.value, owner))
    return tuple(found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def entries(group: str) -> dict[str, list[Entry]]:
    """Every provider of every name of a group, ours first, then by distribution."""
    found: dict[str, list[Entry]] = {}
    for name, target in (_families() if group == ARCHITECTURES else _builtins().get(group, {})).items():
        summary = _table()[SUMMARIES].get(name) if group == VERBS else None
        found.setdefault(name, []).append(Entry(group, name, target, OURS, summary))
    for entry in sorted(_third_party(), key=lambda e: (e.distribution, e.name)):
        if entry.group == group:
            found.setdefault(entry.name, []).append(entry)
    return found


def groups() -> list[str]:
    """All groups that anyone provides something in."""
    return sorted({ARCHITECTURES, *_builtins(), *(entry.group for entry in _third_party())})


def find(group: str, name: str, what: str) -> Entry:
    """The one provider of `name`, or of `distribution:name` when several provide it.

    Raises:
        UsageProblem: nobody or more than one provides it.
    """
    table = entries(group)
    owner, _, bare = name.rpartition(":")
    candidates = [e for e in table.get(bare, []) if not owner or _normal(e.distribution) == _normal(owner)]
    if not candidates:
        raise UsageProblem(f"no {what} {name!r}: {did_you_mean(name, sorted(table))}")
    if len(candidates) > 1:
        choices = " or ".join(f"{e.distribution}:{bare}" for e in candidates)
        raise UsageProblem(f"{what} {name!r} is provided by several packages: write {choices}")
    return candidates[0]
