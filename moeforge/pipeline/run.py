"""One run of one stage: key, reuse or resume, plan, work, manifest, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.digest import artifact_digest, file_digest
from ..errors import BadInput, UsageProblem
from ..options import expand, named_inputs
from .artifact import MANIFEST, Artifact, Plan, locate, read_manifest
from .context import Context
from .disk import disk_errors
from .journal import JOURNAL
from .manifest import build_manifest, run_key, whole
from .place import file_kind, keep_apart, tidy
from .ranks import here
from .stage import Bound, is_stage
from .workspace import claim, touch_manifest


@dataclass(frozen=True)
class Request:
    """What the command line asked of a stage."""

    stage: Any
    options: Any
    method: Bound | None
    output: Path | None
    force: bool = False
    owners: tuple[str, ...] = ()
    """Distributions that provide the stage and the method; their versions are part of the key."""


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    artifact: Artifact
    manifest: dict[str, Any]
    reused: bool
    notes: tuple[str, ...] = ()


def home() -> Path:
    """`$MOEFORGE_HOME`, by default `~/.cache/moeforge`."""
    return Path(os.environ.get("MOEFORGE_HOME") or "~/.cache/moeforge").expanduser()


def pin(src: Artifact, options: Any) -> tuple[Artifact, str]:
    """The source with a moving Hub branch pinned to its commit, and a digest that identifies its content cheaply.

    Raises:
        BadInput: it cannot be opened.
    """
    if src.kind == "plan":
        return src, "plan:" + hashlib.sha256(json.dumps(src.plan, sort_keys=True).encode()).hexdigest()
    if src.digest is not None:
        return src, src.digest
    from ..checkpoint import open_checkpoint

    with open_checkpoint(src.ref, allow_pickle=getattr(options, "allow_pickle", False),
                         dequantize=getattr(options, "dequantize", False)) as checkpoint:  # fmt: skip
        identity = checkpoint.provenance()
    if src.path is None and identity.get("revision"):
        src = Artifact(src.kind, f"{src.ref.partition('@')[0]}@{identity['revision']}", verb=src.verb)
    return src, identity["digest"]


def pin_inputs(stage: Any, options: Any, method: Bound | None) -> tuple[Bound | None, list[Any]]:
    """The method with its parents pinned, and the identity of everything that is read beside the source.

    Raises:
        BadInput, UsageProblem: a parent or a file cannot be opened.
    """
    found: list[Any] = []
    if method is not None and method.parents:
        pinned = [pin(locate(ref), options) for ref in method.parents]
        found += [["parent", digest] for _, digest in pinned]
        method = replace(method, pinned=tuple(parent.ref for parent, _ in pinned))
    if hasattr(stage, "inputs"):
        found += stage.inputs(options, method)
    if method is not None and hasattr(method.method, "inputs"):
        found += method.method.inputs(options, method.options)
    return method, found


def check_kind(stage: Any, src: Artifact) -> None:
    """Refuse an artifact that the verb does not take.

    Raises:
        BadInput: names both kinds.
    """
    if src.kind == "plan" and not is_stage(type(stage)) and "plan" not in stage.consumes:
        raise BadInput(
            f"{stage.name} needs weights, and a plan has none yet; run the stages before it without --dry-run"
        )
    if src.kind not in stage.consumes and src.kind != "plan":
        raise BadInput(f"{stage.name} takes {' or '.join(sorted(stage.consumes))}, but {src.ref} is a {src.kind}")


def plan_stage(request: Request, src: Artifact) -> Plan:
    """The stage's plan, refused for what a run would be refused for before it begins; writes nothing.

    Raises:
        MoeforgeError: what is read cannot be opened, the output lies in it, or what was asked cannot be done.
    """
    ready = _prepare(request, src, home())
    return request.stage.plan(ready.src, request.options, ready.method)


@dataclass(frozen=True)
class Ready:
    """A request whose inputs are pinned and whose output is apart from them."""

    src: Artifact
    method: Bound | None
    key: str
    output: Path
    named: str
    """What chose the output: the option or the variable."""


def _prepare(request: Request, src: Artifact, place: Path) -> Ready:
    """Pin what is read, find where the output goes, and keep the two apart.

    Args:
        place: `Context.home`.
    """
    stage = request.stage
    check_kind(stage, src)
    src, source_digest = pin(src, request.options)
    method, inputs = pin_inputs(stage, request.options, request.method)
    key = run_key(stage.name, src, source_digest, request.options, method, request.owners, inputs)
    suffix = ".json" if stage.output == "file" else ""
    output = absolute(request.output or place / "artifacts" / f"{stage.name}-{key[:16]}{suffix}")
    named = "-o" if request.output is not None else "MOEFORGE_HOME"
    keep_apart(output, _read_from(src, request.options, method), named)
    return Ready(src, method, key, output, named)


def run_stage(request: Request, src: Artifact, ctx: Context) -> Outcome:
    """Do the work, or find it done.

    Raises:
        MoeforgeError: whatever goes wrong; an unfinished staging directory is left for the next try to resume.
    """
    stage = request.stage
    ready = _prepare(request, src, ctx.home)
    src, method, key, output = ready.src, ready.method, ready.key, ready.output

    if stage.output == "directory" and os.path.isdir(output) and not request.force:
        manifest = read_manifest(output)
        if manifest is not None and manifest.get("key") == key and whole(output, manifest):
            # another process may be replacing it this very moment: then there is nothing to reuse
            with contextlib.suppress(FileNotFoundError):
                tidy(output)
                touch_manifest(output)
                _dismiss(stage)
                return Outcome(locate(str(output)), manifest, reused=True)

    plan = stage.plan(src, request.options, method)
    for warning in plan.warnings:
        ctx.warn(warning)
    started = time.monotonic()
    # a receipt may replace a receipt
    force = request.force or (stage.output == "file" and file_kind(output) == stage.produces)
    with claim(output, key, force, stage.output, ready.named) as space, disk_errors(output, ready.named):
        if space.manifest is not None:
            ctx.say(f"{output} was complete but for its name; nothing is made again")
            space.publish(force)
            _dismiss(stage)
            return Outcome(locate(str(output)), space.manifest, reused=False)
        if space.resumed:
            ctx.say(f"resuming {output}: {len(space.journal.finished)} finished files are kept")
        written = stage.run(plan, space, ctx)
        ctx.check()
        if stage.output == "file":
            made = next(path for path in space.path.iterdir() if path.name != JOURNAL)
            manifest = {
                "kind": written.kind,
                "verb": stage.name,
                "counts": written.counts,
                **json.loads(made.read_text("utf-8")),
            }
            space.finish_file(made, force)
            return Outcome(Artifact(written.kind, str(output), output, verb=stage.name), manifest, False, written.notes)
        files = {}
        for path in sorted(p for p in space.path.rglob("*") if p.is_file()):
            name = path.relative_to(space.path).as_posix()
            if name not in (MANIFEST, JOURNAL):
                files[name] = {"bytes": path.stat().st_size, "digest": written.digests.get(name) or file_digest(path)}
        digest = artifact_digest({name: info["digest"] for name, info in files.items()})
        manifest = build_manifest(key=key, src=src, plan=plan, written=written, options=request.options,
                                  method=method, files=files, digest=digest,
                                  seconds=time.monotonic() - started, resumed=space.resumed)  # fmt: skip
        space.finish(manifest, force)
    return Outcome(locate(str(output)), manifest, False, written.notes)


def follow_stage(request: Request, src: Artifact, ctx: Context) -> None:
    """The part of a rank that is not the first: the same plan, and nothing of the output."""
    ready = _prepare(request, src, ctx.home)
    request.stage.follow(request.stage.plan(ready.src, request.options, ready.method), ctx)


def _dismiss(stage: Any) -> None:
    """Tell the ranks that follow that there is nothing to do."""
    if here().world > 1:
        stage.dismiss()


def absolute(output: Path) -> Path:
    """Where `-o` leads from here.

    Raises:
        UsageProblem: to the root directory.
    """
    found = Path(os.path.abspath(expand(output, "-o")))
    if not found.name:
        raise UsageProblem(f"-o {output} is the root directory; give it a name")
    return found


def _read_from(src: Artifact, options: Any, method: Bound | None) -> list[Path]:
    """Every local place that the run reads: source, parents, and what options that are declared so name."""
    found = [src.path] if src.path is not None else []
    named = list(method.parents) if method is not None else []
    for table in (options, method.options if method is not None else None):
        named += named_inputs(table) if table is not None else []
    found += [expand(name, "input") for name in named]
    return [path for path in found if os.path.lexists(path)]
