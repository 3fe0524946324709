"""A stage and a method that do next to nothing, for tests of what the core does around them."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from moeforge.options import build, opt
from moeforge.pipeline.artifact import Plan, locate
from moeforge.pipeline.context import Context
from moeforge.pipeline.progress import Progress
from moeforge.pipeline.run import Request, plan_stage, run_stage
from moeforge.pipeline.stage import Bound, Written


@dataclass(frozen=True)
class StageOptions:
    data: tuple[str, ...] = opt("text files", default=(), reads=True)


@dataclass(frozen=True)
class MethodOptions:
    parent: tuple[str, ...] = opt("further checkpoints", default=(), reads=True)
    notes: Path | None = opt("a file that only the method reads", default=None)


class Weave:
    name = "weave"
    summary = "join"
    reference = "none"
    api_version = 1
    Options = MethodOptions

    def parents(self, options):
        return options.parent

    def inputs(self, stage_options, options):
        return [options.notes.read_text()] if options.notes else []


class Join:
    """Joins the digests of all checkpoints and the texts of all files into one file."""

    name = "join"
    summary = "join what it is given"
    api_version = 1
    consumes = frozenset({"checkpoint"})
    produces = "checkpoint"
    output = "directory"
    default_method = "weave"
    Options = StageOptions
    runs = 0
    fail_after = None
    """A file name: the run dies once it is written and logged."""

    def inputs(self, options, method):
        return [Path(name).read_text() for name in options.data]

    def plan(self, src, options, method):
        return Plan(self.name, method.name, "joins", payload=(src, options, method))

    def run(self, plan, out, ctx):
        type(self).runs += 1
        src, options, method = plan.payload
        parts = {
            "parents": [src.ref, *method.parents],
            "data": [*map(Path.read_text, map(Path, options.data))],
            "notes": method.options.notes.read_text() if method.options.notes else None,
        }
        for name, value in parts.items():
            if name not in out.journal.finished:
                (out.path / name).write_text(json.dumps(value))
                out.journal.record(name, {})
            if self.fail_after == name:
                raise RuntimeError("killed")
        return Written("checkpoint", parents=({"ref": src.ref, "digest": src.digest},))


@pytest.fixture
def artifact(tmp_path):
    """(name, digest) -> a directory that passes for a checkpoint of moeforge's."""

    def make(name="src", digest="sha256:aa", **more):
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        body = {"schema": 1, "kind": "checkpoint", "verb": "test", "digest": digest, "files": {}, "parents": []}
        (directory / "moeforge.json").write_text(json.dumps(body | more))
        return directory

    return make


@pytest.fixture
def join(tmp_path, monkeypatch):
    """(src, output, force=False, **options) -> the outcome of `join --method weave`; counts its runs in `join.stage.runs`.
    `join.plan` takes the same and is its dry run."""
    stage = type("Fresh", (Join,), {"runs": 0})

    def request(output, force=False, **options):
        mine = {k: v for k, v in options.items() if k in StageOptions.__dataclass_fields__}
        theirs = {k: v for k, v in options.items() if k not in mine}
        bound = Bound("weave", Weave(), build(MethodOptions, theirs))
        return Request(stage(), build(StageOptions, mine), bound, output, force)

    def run(src, output, force=False, **options):
        context = Context("join", Progress("join", "none", quiet=True), home=tmp_path / "home")
        return run_stage(request(output, force, **options), locate(str(src)), context)

    run.plan = lambda src, output, **options: plan_stage(request(output, **options), locate(str(src)))
    run.stage = stage
    return run
