"""How an artifact came to be: the chain of manifests that each one carries of its parents."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from moeforge import registry
from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import Checkpoint
from moeforge.errors import UsageProblem
from moeforge.options import specs
from moeforge.pipeline.describe import describe_value

STEP = ("verb", "method", "options", "method_options", "reference", "digest", "counts", "verdicts")


def lineage(manifest: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The newest step with its `parents`, each a step of ours with parents of its own, or a source that we did not make."""
    if manifest is None:
        return None
    step = {name: manifest[name] for name in STEP if manifest.get(name) is not None}
    step["parents"] = [
        {
            **{key: value for key, value in parent.items() if key != "manifest"},
            **(lineage(parent.get("manifest")) or {}),
        }
        for parent in manifest.get("parents", ())
    ]
    return step


def licence(step: Mapping[str, Any] | None) -> str | None:
    """The licence that the nearest ancestor names."""
    for parent in (step or {}).get("parents", ()):
        if found := parent.get("license") or licence(parent):
            return str(found)
    return None


def describe(step: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """One line a step, newest first, parents indented."""
    pad = "  " * (depth + 1)
    if "verb" in step:
        name = " ".join(filter(None, (step["verb"], step.get("method"))))
        parts = [f"{key.replace('_', '-')} {describe_value(key, value)}" for key, value in chosen(step).items()]
        told = [f"{key.replace('_', ' ')} {describe_value(key, value)}" for key, value in step.get("verdicts", {}).items()
                if isinstance(value, bool | int | float | str)]  # fmt: skip
        yield pad + name + (f": {', '.join(parts)}" if parts else "") + (f" ({', '.join(told)})" if told else "")
    else:
        about = [describe_value("", step[key]) for key in ("format", "stored", "revision", "license") if step.get(key)]
        how = "taught by" if step.get("role") == "teacher" else "from"
        yield f"{pad}{how} {step.get('ref', 'an unknown source')}" + (f" ({', '.join(about)})" if about else "")
    for parent in step.get("parents", ()):
        yield from describe(parent, depth + 1)


def chosen(step: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a step that differ from today's defaults; all of them when its plugin is not installed."""
    found = {**step.get("options", {}), **step.get("method_options", {})}
    try:
        classes = [registry.find("moeforge.verbs", step["verb"], "verb").load().Options]
        if step.get("method"):
            classes.append(registry.find(f"moeforge.{step['verb']}", step["method"], "method").load().Options)
    except UsageProblem:
        return found
    defaults = {spec.name: list(spec.default) if isinstance(spec.default, tuple) else spec.default
                for cls in classes for spec in specs(cls) if not spec.required}  # fmt: skip
    return {name: value for name, value in found.items() if name not in defaults or value != defaults[name]}


def open_parent(parent: Mapping[str, Any], made_with: Mapping[str, Any], allow_pickle: bool) -> Checkpoint:
    """The parent at its recorded commit, decoded if it was then. Pickled weights need a word from whoever asks now: the manifest
    may be a stranger's.

    Args:
        made_with: the options of the run that read it.
    """
    ref, revision = parent["ref"], parent.get("revision")
    if isinstance(revision, str) and not os.path.exists(ref):  # False, too, of a name too long for a file
        ref = ref.partition("@")[0]
    return open_checkpoint(
        ref,
        revision=revision if isinstance(revision, str) else None,
        allow_pickle=allow_pickle,
        dequantize=made_with.get("dequantize") is True,
    )
