"""What a run reads beside SRC is part of its key: a change in it is another run, never a reuse, never a resume."""

import json

import pytest

from moeforge.errors import BadInput, UsageProblem
from moeforge.options import build
from moeforge.pipeline import run as pipeline
from moeforge.pipeline.artifact import Artifact
from moeforge.pipeline.journal import JOURNAL
from moeforge.pipeline.manifest import run_key
from moeforge_tune.stage import Tune


@pytest.fixture
def world(tmp_path, artifact):
    """A source and one of each kind of further input: (options, {name: change it})."""
    (tmp_path / "data.txt").write_text("some text")
    (tmp_path / "notes.txt").write_text("a note")
    options = {
        "data": (str(tmp_path / "data.txt"),),
        "parent": (str(artifact("second", "sha256:bb")),),
        "notes": tmp_path / "notes.txt",
    }
    change = {
        "data": lambda: (tmp_path / "data.txt").write_text("other text"),
        "notes": lambda: (tmp_path / "notes.txt").write_text("b note"),
        "parents": lambda: artifact("second", "sha256:cc"),
    }
    return artifact(), options, change


def test_the_same_inputs_are_reused(world, join, tmp_path):
    src, options, _ = world
    assert not join(src, tmp_path / "out", **options).reused
    assert join(src, tmp_path / "out", **options).reused
    assert join.stage.runs == 1


@pytest.mark.parametrize("what", ["data", "notes", "parents"])
def test_a_change_of_any_input_is_another_run(world, join, tmp_path, what):
    src, options, change = world
    join(src, tmp_path / "out", **options)
    change[what]()
    with pytest.raises(UsageProblem, match="other options or inputs"):
        join(src, tmp_path / "out", **options)
    assert not join(src, tmp_path / "new", **options).reused
    assert join.stage.runs == 2


@pytest.mark.parametrize("what", ["data", "notes", "parents"])
def test_a_resume_never_mixes_two_inputs(world, join, tmp_path, what):
    src, options, change = world
    join.stage.fail_after = "data"
    with pytest.raises(RuntimeError):
        join(src, tmp_path / "out", **options)
    change[what]()
    join.stage.fail_after = None
    outcome = join(src, tmp_path / "out", **options)
    assert outcome.manifest["timings"]["resumed"] is False
    assert json.loads((tmp_path / "out" / "data").read_text()) == [(tmp_path / "data.txt").read_text()]


def test_an_untouched_input_resumes(world, join, tmp_path):
    src, options, _ = world
    join.stage.fail_after = "data"
    with pytest.raises(RuntimeError):
        join(src, tmp_path / "out", **options)
    join.stage.fail_after = None
    assert join(src, tmp_path / "out", **options).manifest["timings"]["resumed"] is True


def test_parents_on_a_branch_are_opened_at_the_commit_that_the_key_names(world, join, tmp_path, monkeypatch):
    src, options, _ = world
    commits, real = iter(["1" * 40, "1" * 40, "2" * 40]), pipeline.pin

    def pin(found, opts):
        if found.path is not None:
            return real(found, opts)
        commit = next(commits)
        return Artifact("checkpoint", f"{found.ref}@{commit}"), f"sha256:{commit}"

    monkeypatch.setattr(pipeline, "pin", pin)
    options["parent"] = ("org/expert",)
    join(src, tmp_path / "out", **options)
    assert json.loads((tmp_path / "out" / "parents").read_text()) == [str(src), f"org/expert@{'1' * 40}"]
    assert join(src, tmp_path / "out", **options).reused
    with pytest.raises(UsageProblem, match="other options or inputs"):
        join(src, tmp_path / "out", **options)


def test_tune_names_its_text(tmp_path, artifact):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("some text")
    options = build(Tune.Options, {"data": [str(tmp_path / "corpus")]})
    src = Artifact("checkpoint", str(artifact()))

    def key():
        _, inputs = pipeline.pin_inputs(Tune(), options, None)
        return run_key("tune", src, "sha256:aa", options, None, ("moeforge",), inputs)

    keys = [key(), key()]
    (tmp_path / "corpus" / "a.txt").write_text("SOME TEXT")
    keys.append(key())
    (tmp_path / "corpus" / "b.txt").write_text("more")
    keys.append(key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_a_parent_that_is_not_there_is_named(world, join, tmp_path):
    src, options, _ = world
    with pytest.raises(BadInput, match="/nowhere: no such file"):
        join(src, tmp_path / "out", **options | {"parent": ("/nowhere",)})


def test_a_run_that_died_before_its_rename_is_not_made_again(world, join, tmp_path):
    src, options, _ = world
    join(src, tmp_path / "out", **options)
    (tmp_path / "out").rename(tmp_path / "out.partial")
    outcome = join(src, tmp_path / "out", **options)
    assert join.stage.runs == 1
    assert outcome.artifact.path == tmp_path / "out"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data", "moeforge.json", "notes", "parents"]


def test_a_reuse_cleans_up_after_a_run_that_was_killed_late(world, join, tmp_path):
    src, options, _ = world
    join(src, tmp_path / "out", **options)
    (tmp_path / "out" / JOURNAL).write_text('{"key": "k"}\n')
    (tmp_path / ".out.old-4711").mkdir()
    before = sorted(p.name for p in tmp_path.iterdir())
    assert join(src, tmp_path / "out", **options).reused
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [name for name in before if name != ".out.old-4711"]


def test_a_dry_run_pins_what_is_read_as_a_run_does(world, join, tmp_path):
    src, options, _ = world
    _, _, method = join.plan(src, tmp_path / "out", **options).payload
    assert method.pinned == options["parent"]
    with pytest.raises(BadInput, match="/nowhere: no such file"):
        join.plan(src, tmp_path / "out", **options | {"parent": ("/nowhere",)})
