"""What travels through a pipe: a reference to an artifact, never its tensors.

An artifact is a directory (or one file) with a manifest `moeforge.json`, written last: a directory that has one is
whole. References are one line of JSON on stdout. Plans travel the same way, so that a whole pipeline can be costed
before anything is written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import BadInput, MoeforgeError, UsageProblem
from ..options import expand
from .schema import check_manifest

SCHEMA = 1
MANIFEST = "moeforge.json"


@dataclass(frozen=True)
class Artifact:
    """A resolved reference to a stage's input or output.

    Attributes:
        kind: `checkpoint`, `adapter`, `gguf`, `receipt`, `plan`, ...
        ref: what to hand to `moeforge.checkpoint.open_checkpoint`: an absolute path or `org/name@revision`.
        path: the local path, None for a Hub id or a plan.
        digest: the output digest recorded in the manifest (`sha256:...`), if there is one.
        manifest: the parsed `moeforge.json`, None for sources that moeforge did not write.
        plan: for kind `plan`: the planned checkpoint as `{"config": {...}, "tensors": {name: [dtype, shape]}, ...}`.
    """

    kind: str
    ref: str
    path: Path | None = None
    digest: str | None = None
    verb: str | None = None
    manifest: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None

    def line(self) -> str:
        """The reference as it goes through a pipe: one line of JSON without its newline."""
        body: dict[str, Any] = {"moeforge": SCHEMA, "kind": self.kind}
        if self.path is not None:
            body["path"] = str(self.path)
        else:
            body["ref"] = self.ref
        body |= {k: v for k, v in (("digest", self.digest), ("verb", self.verb), ("plan", self.plan)) if v is not None}
        return as_line(body, (",", ":"))


def as_line(value: Any, separators: tuple[str, str] | None = None) -> str:
    """What goes to stdout for programs: one line of JSON as the standard has it, which knows no NaN and no infinity.

    Raises:
        MoeforgeError: naming the number that is none. Whoever answers says null and why instead.
    """
    for where, number in _numbers(value, ""):
        if not math.isfinite(number):
            raise MoeforgeError(f"the answer holds {where} = {number}, which JSON cannot say; without --json it is shown, "
                                "and please report this")  # fmt: skip
    return json.dumps(value, separators=separators, allow_nan=False)


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{where}.{key}" if where else str(key))


def parse_line(text: str) -> Artifact:
    """The artifact named by the last non-empty line of a pipe: a JSON reference, or a bare path or Hub id.

    Raises:
        BadInput: empty text (the stage before failed), JSON that is broken or no reference, or a newer major version.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise BadInput(
            "stdin was empty: the stage before this one failed or printed no reference; see its message above"
        )
    last = lines[-1]
    if not last.startswith("{"):
        if (whole := _json(text)) is not None:  # a file of JSON, whose last line is `}`
            raise _no_reference(whole)
        return locate(last)
    body = _json(last)
    if body is None:
        raise BadInput("stdin is not an artifact reference: its last line is not valid JSON; expected the last line of another "
                       "moeforge verb")  # fmt: skip
    if not isinstance(body, dict) or "moeforge" not in body:
        raise _no_reference(body)
    if body["moeforge"] != SCHEMA:
        raise BadInput(f"stdin holds a reference of version {body.get('moeforge')!r}, this moeforge reads version {SCHEMA}; "
                       "use the same release at both ends of the pipe")  # fmt: skip
    if body.get("kind") == "plan":
        if not isinstance(body.get("plan"), dict):
            raise BadInput("stdin holds a plan reference without a plan")
        return Artifact("plan", str(body.get("ref", "-")), verb=body.get("verb"), plan=body["plan"])
    where = body.get("path") or body.get("ref")
    if not isinstance(where, str):
        raise BadInput("stdin holds a reference that names neither a path nor a Hub id")
    found = locate(where)
    if body.get("digest") and found.digest and body["digest"] != found.digest:
        raise BadInput(
            f"{where} changed since the stage before wrote it: digest {found.digest}, reference says {body['digest']}"
        )
    return found


def _json(text: str) -> Any:
    """The object or list that `text` holds, None when it holds none."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _no_reference(body: Any) -> BadInput:
    """What to say of JSON that is no reference."""
    if isinstance(body, dict) and "schema" in body and "files" in body:
        return BadInput("stdin holds a manifest, not a reference; pass the directory that it lies in")
    held = f"an object of {', '.join(map(repr, sorted(body)[:5]))}" if isinstance(body, dict) else "a list"
    return BadInput(f"stdin holds JSON that is not a reference of moeforge's ({held}); pass a directory, a file or a Hub id, or "
                    "the line that another moeforge verb prints")  # fmt: skip


def locate(ref: str) -> Artifact:
    """The artifact at a directory, its `moeforge.json`, a file, or a Hub id (which is not contacted here).

    Raises:
        BadInput: a path that does not exist, or a manifest that cannot be read.
    """
    try:
        path = expand(ref, "SRC")
    except UsageProblem as error:
        raise BadInput(str(error)) from error
    if path.name == MANIFEST:
        path = path.parent
    if os.path.exists(path):
        path = path.resolve()
        manifest = read_manifest(path) if path.is_dir() else None
        if manifest is None:
            kind = "gguf" if path.suffix == ".gguf" else "checkpoint"
            if path.is_dir() and (path / "adapter_config.json").exists() and not (path / "config.json").exists():
                kind = "adapter"
            return Artifact(kind, str(path), path)
        return Artifact(manifest["kind"], str(path), path, manifest.get("digest"), manifest.get("verb"), manifest)
    name = ref.partition("@")[0]
    if not ref.startswith((".", "/", "~")):
        if name.count("/") == 1 and not name.endswith(".gguf"):
            return Artifact("checkpoint", ref)
        if name.count("/") >= 2 and name.endswith(".gguf"):
            return Artifact("gguf", ref)
    if os.path.exists(f"{path}.partial"):
        raise BadInput(
            f"{ref} is unfinished ({path.name}.partial is there): run the command that writes it again, it resumes"
        )
    raise BadInput(f"{ref}: no such file or directory, and not a Hub id (org/name, org/name/file.gguf)")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of an artifact directory, or None where there is none.

    Raises:
        BadInput: it is there but is not one that this release can read; see :func:`moeforge.pipeline.schema.check_manifest`.
    """
    from ..checkpoint.folder import Folder

    file = directory / MANIFEST
    if not os.path.lexists(file):
        return None
    try:
        body = json.loads(
            Folder(directory).read(MANIFEST).decode("utf-8")
        )  # never a link out, a device, or without end
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: unreadable manifest: {error}") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA:
        raise BadInput(f"{file}: not a moeforge manifest of schema {SCHEMA}")
    check_manifest(body, str(file))
    return body


@dataclass(frozen=True)
class Problem:
    """A reason why a request cannot be met exactly (or at all), named by the config key or option in the way."""

    key: str
    """The config key, tensor name or option, e.g. `sliding_window`."""
    value: Any
    reason: str
    """One human sentence."""
    fatal: bool = True
    """False when `--allow-inexact` may turn it into a recorded warning."""

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.reason}"


@dataclass(frozen=True)
class Plan:
    """What a stage will do, known before a byte of weights is read.

    `payload` is private to the stage (ops, recipes); everything else is JSON-able and is printed by `--dry-run`.
    """

    verb: str
    method: str | None
    summary: str
    """One line for people."""
    config: dict[str, Any] | None = None
    """The output's config.json, when the output is a checkpoint."""
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Planned output tensors: name -> (dtype, shape)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Sizes and counts: parameters_total, parameters_active, read_bytes, write_bytes, peak_memory_bytes, ...; `files` is their
    number, or a table of names and bytes."""
    verdicts: dict[str, Any] = field(default_factory=dict)
    """Promises: `exact` (bool), `portability` ({runtime: exact|inexact|unsupported}), `allowed_inexact`, ..."""
    warnings: tuple[str, ...] = ()
    payload: Any = None

    def as_json(self) -> dict[str, Any]:
        return {
            "verb": self.verb, "method": self.method, "summary": self.summary, "config": self.config,
            "tensors": {name: [dtype, list(shape)] for name, (dtype, shape) in self.tensors.items()},
            "facts": self.facts, "verdicts": self.verdicts, "warnings": list(self.warnings),
        }  # fmt: skip
