"""Staging: nothing that looks whole is unfinished, and what was finished is kept."""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from moeforge.errors import BadInput, MachineLacks, UsageProblem
from moeforge.pipeline import place, workspace
from moeforge.pipeline.artifact import read_manifest
from moeforge.pipeline.disk import disk_errors
from moeforge.pipeline.journal import JOURNAL
from moeforge.pipeline.place import tidy
from moeforge.pipeline.workspace import claim


def manifest_of(key="k", files=()):
    return {"schema": 1, "kind": "checkpoint", "verb": "test", "key": key, "digest": "sha256:aa", "parents": [],
            "files": {name: {"bytes": len(name), "digest": "sha256:bb"} for name in files}}  # fmt: skip


def fail_midway(output, key, names):
    with contextlib.suppress(RuntimeError), claim(output, key, force=False) as space:
        for name in names:
            (space.path / name).write_text(name)
            space.journal.record(name, {"bytes": len(name)})
        raise RuntimeError


def make(output, key="k", names=("a",), force=False):
    """A whole run that writes each name as its own content."""
    with claim(output, key, force) as space:
        for name in names:
            (space.path / name).write_text(name)
            space.journal.record(name, {"bytes": len(name)})
        space.finish(manifest_of(key, names), force)


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it or cleans up after it."""


def killed_at(monkeypatch, module, name, after=False):
    """Let the next call of `module.name` be the last thing the process does (or the last but one)."""
    real = getattr(module, name)

    def die(*args, **kwargs):
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(module, name, die)


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    fail_midway(out, "k", ["a"])
    assert not out.exists()
    make(out)
    assert read_manifest(out) == manifest_of(files=["a"])
    assert listing(tmp_path) == ["out"]
    assert listing(out) == ["a", "moeforge.json"]


def test_the_same_key_resumes_and_another_starts_anew(tmp_path):
    fail_midway(tmp_path / "out", "k", ["a", "b"])
    with claim(tmp_path / "out", "k", force=False) as space:
        assert space.resumed
        assert list(space.journal.finished) == ["a", "b"]
    with claim(tmp_path / "out", "other", force=False) as space:
        assert not space.resumed
        assert listing(space.path) == [JOURNAL]


def test_a_torn_journal_line_is_dropped(tmp_path):
    fail_midway(tmp_path / "out", "k", ["a", "b"])
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    with claim(tmp_path / "out", "k", force=False) as space:
        assert list(space.journal.finished) == ["a"]
        space.journal.record("c", {})
    assert [json.loads(line).get("file") for line in journal.read_text().splitlines()] == [None, "a", "c"]


@pytest.mark.parametrize("text", ["", '{"ke', '{"key": "k"}'])
def test_a_journal_that_died_at_birth_is_ours(tmp_path, text):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / JOURNAL).write_text(text)
    make(tmp_path / "out")
    assert listing(tmp_path) == ["out"]


def test_a_kill_while_the_manifest_is_written_resumes(tmp_path, monkeypatch):
    out = tmp_path / "out"

    def torn(path, text):
        path.write_text(text[: len(text) // 2])
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(workspace, "write_durably", torn)
        make(out)
    assert listing(tmp_path / "out.partial") == [JOURNAL, "a", "moeforge.json"]
    with claim(out, "k", force=False) as space:
        assert (space.resumed, space.manifest, list(space.journal.finished)) == (True, None, ["a"])
        assert listing(space.path) == [JOURNAL, "a"]


@pytest.mark.parametrize("journal", [True, False])
def test_a_kill_before_the_rename_leaves_only_the_rename_to_do(tmp_path, monkeypatch, journal):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, workspace, "replace_directory")
        make(out)
    assert listing(tmp_path) == ["out.partial"]
    if not journal:
        (tmp_path / "out.partial" / JOURNAL).unlink()
    with claim(out, "k", force=False) as space:
        assert space.manifest == manifest_of(files=["a"])
        space.publish(force=False)
    assert listing(tmp_path) == ["out"]
    assert listing(out) == ["a", "moeforge.json"]


def test_a_finished_partial_of_another_key_or_with_a_lost_file_is_made_again(tmp_path, monkeypatch):
    for key, lose in (("other", False), ("k", True)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, workspace, "replace_directory")
            make(tmp_path / "out")
        if lose:
            (tmp_path / "out.partial" / "a").unlink()
        with claim(tmp_path / "out", key, force=False) as space:
            assert space.manifest is None
            assert listing(space.path) == [JOURNAL]
        shutil.rmtree(tmp_path / "out.partial")


def test_a_journal_left_in_a_finished_output_does_no_harm(tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, workspace, "replace_directory", after=True)
        make(out)
    assert listing(tmp_path) == ["out"]
    assert listing(out) == [JOURNAL, "a", "moeforge.json"]
    assert read_manifest(out) == manifest_of(files=["a"])
    tidy(out)
    assert listing(out) == ["a", "moeforge.json"]


def test_a_kill_between_the_renames_of_force_loses_neither_output(tmp_path, monkeypatch):
    out = tmp_path / "out"
    make(out, "old", ["a"])
    real = os.rename

    def once(source, target):
        real(source, target)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place.os, "rename", once)
        make(out, "new", ["b"], force=True)
    aside = f".out.old-{os.getpid()}"
    assert listing(tmp_path) == [aside, "out.partial"]
    with pytest.raises(UsageProblem, match="exists"):
        make(out, "third", ["c"])
    assert listing(out) == ["a", "moeforge.json"], "without --force the old output is back"
    with claim(out, "new", force=True) as space:
        assert space.manifest == manifest_of("new", ["b"])
        space.publish(force=True)
    assert listing(tmp_path) == ["out"]
    assert listing(out) == ["b", "moeforge.json"]


@pytest.mark.parametrize("removed", [(), ("a",), ("a", "moeforge.json")])
def test_a_kill_while_the_replaced_output_is_removed_leaves_no_litter(tmp_path, monkeypatch, removed):
    out = tmp_path / "out"
    make(out, "old", ["a"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, place, "empty")
        make(out, "new", ["b"], force=True)
    for name in removed:
        (tmp_path / f".out.old-{os.getpid()}" / name).unlink()
    tidy(out)
    assert listing(tmp_path) == ["out"]
    assert listing(out) == ["b", "moeforge.json"]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_user_named_like_an_output_moved_aside_is_left_alone(tmp_path, there):
    out, theirs, link = tmp_path / "k9", tmp_path / ".k9.old-2024", tmp_path / ".k9.old-7"
    theirs.mkdir()
    (theirs / "my_notes.txt").write_text("years of work")
    (tmp_path / ".k9.old-8").write_text("a file")
    link.symlink_to(theirs)
    before = listing(tmp_path)
    if there:
        make(out)
        tidy(out)
    else:
        place.recover(out)
    assert listing(tmp_path) == before + ["k9"] * there
    assert (theirs / "my_notes.txt").read_text() == "years of work"


def test_what_tells_whose_a_directory_is_goes_last(tmp_path, monkeypatch):
    gone, real = [], Path.unlink
    for name in ("z", "a", "moeforge.json", JOURNAL):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(Path, "unlink", lambda self, **kw: (gone.append(self.name), real(self, **kw))[1])
    place.empty(tmp_path)
    assert gone == ["a", "z", JOURNAL, "moeforge.json"]


def test_a_file_that_was_killed_before_or_after_its_rename_is_made_again(tmp_path, monkeypatch):
    out = tmp_path / "receipt.json"

    def write():
        with claim(out, "k", force=out.exists(), kind="file") as space:
            made = space.path / "receipt.json"
            made.write_text('{"moeforge": 1, "kind": "receipt"}')
            space.finish_file(made, force=out.exists())

    for after, left in ((False, [".partial"]), (True, ["", ".partial"])):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            killed_at(patch, workspace.os, "replace", after)
            write()
        assert listing(tmp_path) == [out.name + suffix for suffix in left]
        write()
        assert listing(tmp_path) == [out.name]
        out.unlink()


def test_an_existing_output_is_kept_unless_forced(tmp_path):
    out = tmp_path / "out"
    make(out, "old", ["mine"])
    with pytest.raises(UsageProblem, match="exists"):
        make(out, "new", ["a"])
    assert (out / "mine").read_text() == "mine"
    with claim(out, "new", force=True) as space:
        assert (out / "mine").exists(), "the old output stays until the new one is whole"
        space.finish(manifest_of("new"), force=True)
    assert listing(out) == ["moeforge.json"]
    assert listing(tmp_path) == ["out"]


def test_a_foreign_partial_directory_is_not_touched(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("x")
    with pytest.raises(UsageProblem, match="not left by moeforge"), claim(tmp_path / "out", "k", force=False):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_two_writers_of_one_output_are_kept_apart(tmp_path):
    with (
        claim(tmp_path / "out", "k", force=False),
        pytest.raises(UsageProblem, match="another moeforge"),
        claim(tmp_path / "out", "k", force=False),
    ):
        pass


def test_a_lock_on_a_directory_that_was_renamed_away_counts_for_nothing(tmp_path, monkeypatch):
    real, opened = os.open, []

    def slow(path, flags, *args):
        lock = real(path, flags, *args)
        if not opened and str(path).endswith(".partial"):
            opened.append(path)
            (tmp_path / "out.partial").rename(tmp_path / "out")  # the run before us finishes now
            (tmp_path / "out" / "moeforge.json").write_text(json.dumps(manifest_of()))
        return lock

    monkeypatch.setattr(workspace.os, "open", slow)
    with pytest.raises(UsageProblem, match="exists"):
        make(tmp_path / "out", "k")
    assert listing(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_about_the_machine(tmp_path):
    with pytest.raises(MachineLacks, match="is full"), disk_errors(tmp_path / "deep" / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(MachineLacks, match=r"cannot write .*/x: Permission denied"), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    with pytest.raises(OSError, match="Invalid"), disk_errors(tmp_path):
        raise OSError(errno.EINVAL, "Invalid")


def test_a_source_that_may_not_be_read_is_not_taken_for_an_output_that_may_not_be_written(tmp_path):
    output = tmp_path / "made" / "out"
    with pytest.raises(BadInput, match=r"/elsewhere/model\.safetensors"), disk_errors(output):
        raise OSError(errno.EACCES, "Permission denied", "/elsewhere/model.safetensors")
    for mine in (output.with_name("out.partial") / "x", output.parent, tmp_path):
        with pytest.raises(MachineLacks, match="choose another -o"), disk_errors(output):
            raise OSError(errno.EROFS, "Read-only file system", str(mine))
