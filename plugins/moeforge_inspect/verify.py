"""`moeforge verify DIR`: is an artifact still what its manifest says, complete, and (where promised) the same function?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.base import Checkpoint
from moeforge.checkpoint.digest import artifact_digest, verify_files
from moeforge.errors import BadInput, ExitCode, MachineLacks
from moeforge.options import format_bytes, opt
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.context import Context
from moeforge.pipeline.reading import Reading
from moeforge.pipeline.stage import Answer

from .lineage import open_parent


@dataclass(frozen=True)
class Options(Reading):
    rehash: bool = opt("read every file again and compare digests", default=True)
    proof: bool = opt(
        "repeat the equality proof where exactness was promised and the parent is still there", default=True
    )


@dataclass
class Findings:
    """What was looked at: `checked` what is right, `problems` what is wrong, `skipped` what could not be looked at."""

    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    proof: dict[str, Any] | None = None


class Verify:
    name = "verify"
    summary = "rehash an artifact, check that it is complete, repeat its equality proof (exit code 0: whole, 4: not)"
    examples = {
        "moeforge verify moe": "hashes, completeness, and the proof once more",
        "moeforge verify moe --no-proof": "files only, in seconds",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "gguf"})
    sources = 1
    Options = Options

    def answer(self, sources: list[Artifact], options: Options, ctx: Context) -> Answer:
        (src,) = sources
        if src.path is None:
            raise BadInput(
                f"verify takes a local directory or file, but {src.ref} is not on this machine; download it first"
            )
        found = Findings()
        if src.manifest is None:
            found.skipped.append("digests: there is no moeforge.json to compare with")
        elif options.rehash:
            _check_files(src.path, src.manifest, found, ctx)
        if not found.problems:
            _check_model(src, options, found, ctx)
        lines = [f"ok       {text}" for text in found.checked] + [f"skipped  {text}" for text in found.skipped]
        lines += [f"WRONG    {text}" for text in found.problems]
        verdict = f"{src.ref} is not what it should be" if found.problems else f"{src.ref} is whole"
        data = {"ref": src.ref, "ok": not found.problems, "checked": found.checked, "problems": found.problems,
                "skipped": found.skipped, "proof": found.proof}  # fmt: skip
        return Answer(data, "\n".join([*lines, verdict]), ExitCode.GATE if found.problems else ExitCode.OK)


def _check_files(path: Path, manifest: dict[str, Any], found: Findings, ctx: Context) -> None:
    """Every file of the manifest: there, of its size, of its digest; none that it does not list."""
    files = manifest["files"]
    size = sum(info["bytes"] for info in files.values())
    with ctx.bar("hashing", size, "B") as bar:
        found.problems += verify_files(path, files, bar.advance, manifest.get("tensors"))
    if artifact_digest({name: info["digest"] for name, info in files.items()}) != manifest["digest"]:
        found.problems.append(
            f"moeforge.json: its digest {manifest['digest']} is not that of the files it lists; it was edited"
        )
    if not found.problems:
        found.checked.append(f"{len(files)} files, {size} bytes, {manifest['digest']}")


def _check_model(src: Artifact, options: Options, found: Findings, ctx: Context) -> None:
    """Headers and index, then every tensor of the architecture, then the proof."""
    try:
        checkpoint = open_checkpoint(src.ref, allow_pickle=options.allow_pickle, dequantize=None)
    except BadInput as error:
        found.problems.append(str(error))
        return
    with checkpoint:
        found.checked.append(f"{len(checkpoint.tensors)} tensors, headers and index agree")
        _check_complete(checkpoint, found)
        if options.proof and not found.problems:
            _prove_again(src, checkpoint, options, found, ctx)


def _check_complete(checkpoint: Checkpoint, found: Findings) -> None:
    """Every weight of the model that config.json describes is there, in its shape, and nothing else is."""
    from moeforge.model.build import build, parse_config
    from moeforge.model.load import COMPRESSION
    from moeforge.model.weights import WeightMap

    if COMPRESSION in checkpoint.config or "quantization_config" in checkpoint.config:
        found.skipped.append("architecture: compressed weights are checked when they are loaded")
        return
    try:
        parse_config(checkpoint.config)
    except BadInput as error:
        found.skipped.append(f"architecture: {error}")
        return
    try:
        model = build(checkpoint.config)
        WeightMap(checkpoint, model)
    except BadInput as error:
        found.problems.append(str(error))
        return
    found.checked.append(f"every weight of {type(model).__name__} is there, and nothing else")


def _prove_again(src: Artifact, checkpoint: Checkpoint, options: Options, found: Findings, ctx: Context) -> None:
    """Against the parent, from the files as they are now.

    A parent's digest holds the times of its files, so that another digest does not mean another function: the proof decides,
    and speaks against this artifact only where the parent is the recorded one for certain.
    """
    from moeforge.model.memory import fits, proof_bytes
    from moeforge.model.proof import prove

    manifest = src.manifest or {}
    parents = manifest.get("parents") or ()
    if not (manifest.get("verdicts") or {}).get("exact"):
        return
    if len(parents) != 1 or not isinstance(parents[0].get("ref"), str):
        found.skipped.append(f"equality: {len(parents)} parents")
        return
    ref = parents[0]["ref"]
    try:
        parent = open_parent(parents[0], manifest.get("options") or {}, options.allow_pickle)
    except (BadInput, MachineLacks) as error:
        found.skipped.append(f"equality: the parent cannot be opened: {error}")
        return
    with parent:
        needed = proof_bytes(parent, checkpoint)
        if not fits(needed):
            found.skipped.append(f"equality: the proof takes {format_bytes(needed)} of memory, more than is free")
            return
        same = parent.provenance()["digest"] == parents[0].get("digest")
        ctx.say(f"proving equality with {ref}, layer by layer in float32")
        try:
            proof = prove(parent, checkpoint, ctx=ctx)
        except MachineLacks as error:
            found.skipped.append(f"equality: the parent cannot be read: {error}")
            return
        except BadInput as error:
            if same:
                raise
            found.skipped.append(f"equality: {ref} is not the parent any more, it changed since: {error}")
            return
        found.proof = proof.as_json()
        if proof.exact:
            found.checked.append(f"{proof.summary()} (parent {ref})")
        elif same:
            found.problems.append(f"{proof.summary()} (parent {ref})")
        else:
            found.skipped.append(f"equality: {ref} is not the parent any more, it changed since: {proof.summary()}")
