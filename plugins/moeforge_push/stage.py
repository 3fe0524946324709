"""The verb `push`: the files that the manifest lists, a card made from it, one commit, and a receipt."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeforge.checkpoint.digest import CARD, artifact_digest, changed_files
from moeforge.checkpoint.folder import Folder
from moeforge.errors import BadInput, UsageProblem
from moeforge.hub import check_repo, push_files
from moeforge.options import arg, format_bytes, opt
from moeforge.pipeline.artifact import MANIFEST, Artifact, Plan
from moeforge.pipeline.context import Context
from moeforge.pipeline.manifest import whole
from moeforge.pipeline.stage import Bound, Written
from moeforge.pipeline.workspace import Workspace
from moeforge.report.card import model_card, public_manifest

from . import remote_code

RECEIPT = "receipt.json"


@dataclass(frozen=True)
class Options:
    repo: str = arg("the repository on the Hub, org/name")
    private: bool = opt("make a new repository private", default=False)
    branch: str = opt("the branch to commit to; made when it is missing", default="main")
    pr: bool = opt("open a pull request instead of committing", default=False)
    message: str | None = opt("the commit message", default=None)
    remote_code: bool = opt(
        "add the file that makes trust_remote_code=True load a checkpoint of moeforge's own layout where moeforge is installed",
        default=False,
    )

    def __post_init__(self) -> None:
        check_repo(self.repo)
        if not self.branch or self.branch.startswith(("-", "/", "refs/")) or ".." in self.branch or " " in self.branch:
            raise UsageProblem(f"--branch {self.branch!r} is not a branch name")


@dataclass(frozen=True)
class Work:
    """What `plan` hands to `run`."""

    source: Artifact
    files: dict[str, Path | bytes]
    sizes: dict[str, int]
    options: Options
    digest: str
    """Of what is published."""


class Push:
    name = "push"
    summary = "publish an artifact on the Hugging Face Hub, with a model card made from its lineage"
    examples = {
        "moeforge push tuned your-name/smol-moe --dry-run": "the files and their bytes; nobody is contacted",
        "moeforge push tuned your-name/smol-moe --private -o pushed.json": "publish, and keep a receipt",
    }
    api_version = 1
    consumes = frozenset({"checkpoint", "adapter", "gguf"})
    produces = "receipt"
    output = "file"
    default_method = None
    Options = Options

    def plan(self, src: Artifact, options: Options, method: Bound | None) -> Plan:
        if src.kind == "plan":
            return self._plan_upon_plan(src, options)
        if src.path is None or src.manifest is None:
            raise BadInput(f"{src.ref} was not written by moeforge (no {MANIFEST}), so there is no lineage to publish; "
                           f"run it through a verb first, e.g. `moeforge export {src.ref} --to hf`")  # fmt: skip
        if not whole(src.path, src.manifest):
            raise BadInput(
                f"{src.path}: files are missing or have another size than {MANIFEST} says; run `moeforge verify {src.path}`"
            )
        listed = {name: info["digest"] for name, info in src.manifest["files"].items()}
        if artifact_digest(listed) != src.digest:
            raise BadInput(
                f"{src.path}: the digest in {MANIFEST} is not that of the files it lists; it was edited, write the artifact again"
            )
        folder, manifest = Folder(src.path), src.manifest
        config = folder.config() if "config.json" in listed else None
        files: dict[str, Path | bytes] = {name: folder.file(name) for name in listed if name != CARD}
        if options.remote_code:
            added = remote_code.files(src.ref, config)
            manifest = remote_code.described(manifest, added)
            files |= added
            config = json.loads(added["config.json"])
        card = model_card(manifest, config, options.repo)
        files[MANIFEST] = (json.dumps(public_manifest(manifest), indent=2) + "\n").encode()
        files[CARD] = card.encode()
        sizes = {
            name: len(held) if isinstance(held, bytes) else held.stat().st_size for name, held in sorted(files.items())
        }
        total = sum(sizes.values())
        return Plan(
            verb=self.name, method=None, summary=f"{len(sizes)} files, {format_bytes(total)} to {_target(options)}",
            facts={"repo": options.repo, "branch": options.branch, "upload_bytes": total, "files": sizes},
            warnings=_licence_warnings(src.manifest), payload=Work(src, files, sizes, options, manifest["digest"]),
        )  # fmt: skip

    def _plan_upon_plan(self, src: Artifact, options: Options) -> Plan:
        assert src.plan is not None
        size = (src.plan.get("facts") or {}).get("write_bytes", 0)
        return Plan(self.name, None, f"about {format_bytes(size)} to {_target(options)}",
                    facts={"repo": options.repo, "branch": options.branch, "upload_bytes": size})  # fmt: skip

    def run(self, plan: Plan, out: Workspace, ctx: Context) -> Written:
        work: Work = plan.payload
        options = work.options
        assert work.source.manifest is not None
        _check_digests(work, ctx)
        what = " ".join(filter(None, (work.source.manifest.get("verb"), work.source.manifest.get("method"))))
        with ctx.bar(f"uploading to {options.repo}", plan.facts["upload_bytes"], "B") as bar:
            done = push_files(
                options.repo, work.files, private=options.private, branch=options.branch, pull_request=options.pr,
                message=options.message or f"Upload the result of moeforge {what}".rstrip(), on_bytes=bar.advance,
            )  # fmt: skip
        receipt: dict[str, Any] = {
            "moeforge": 1, "kind": "receipt", "repo": options.repo, "branch": options.branch, "commit": done.commit,
            "url": done.url, "pull_request": done.pull_request, "digest": work.digest, "files": work.sizes,
        }  # fmt: skip
        (out.path / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n", "utf-8")
        return Written("receipt", counts={"upload_bytes": plan.facts["upload_bytes"]},
                       notes=(f"{len(work.files)} files are at {done.url}",))  # fmt: skip


def _target(options: Options) -> str:
    return f"{options.repo} ({'pull request to ' if options.pr else ''}branch {options.branch})"


def _check_digests(work: Work, ctx: Context) -> None:
    """Hash every file before anything is sent; the client hashes them once more, so this doubles a small cost.

    Raises:
        BadInput: a file is not the one that the manifest describes.
    """
    assert work.source.path is not None and work.source.manifest is not None
    listed = {name: info for name, info in work.source.manifest["files"].items() if name != CARD}
    with ctx.bar("hashing", sum(info["bytes"] for info in listed.values()), "B") as bar:
        problems = changed_files(work.source.path, listed, bar.advance, work.source.manifest.get("tensors"))
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BadInput(f"{work.source.path}: {problems[0]}{more}; nothing was sent, write the artifact again")


def _licence_warnings(manifest: dict[str, Any]) -> tuple[str, ...]:
    """Parents of which no licence is known: publishing them is the user's to decide, in full sight."""
    from moeforge.report.card import lineage, sources

    unknown = [str(p.get("ref")) for p in sources(list(lineage(manifest))) if not p.get("license")]
    return tuple(f"the licence of {ref} is not known; the card says so" for ref in unknown)
