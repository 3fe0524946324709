"""Staging: nothing that looks whole is unfinished, and what was finished is kept."""

import contextlib
import errno
import json
import os

import pytest

from moeforge.errors import MachineLacks, UsageProblem
from moeforge.pipeline.artifact import read_manifest
from moeforge.pipeline.workspace import JOURNAL, claim, disk_errors

MANIFEST = {"schema": 1, "kind": "checkpoint", "verb": "test"}


def fail_midway(output, key, names):
    with contextlib.suppress(RuntimeError), claim(output, key, force=False) as space:
        for name in names:
            (space.path / name).write_text(name)
            space.journal.record(name, {"bytes": len(name)})
        raise RuntimeError


def test_an_output_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    fail_midway(out, "k", ["a"])
    assert not out.exists()
    with claim(out, "k", force=False) as space:
        space.finish(MANIFEST, force=False)
    assert read_manifest(out) == MANIFEST
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert not (out / JOURNAL).exists()


def test_the_same_key_resumes_and_another_starts_anew(tmp_path):
    fail_midway(tmp_path / "out", "k", ["a", "b"])
    with claim(tmp_path / "out", "k", force=False) as space:
        assert space.resumed
        assert list(space.journal.finished) == ["a", "b"]
    with claim(tmp_path / "out", "other", force=False) as space:
        assert not space.resumed
        assert [p.name for p in space.path.iterdir()] == [JOURNAL]


def test_a_torn_journal_line_is_dropped(tmp_path):
    fail_midway(tmp_path / "out", "k", ["a", "b"])
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    with claim(tmp_path / "out", "k", force=False) as space:
        assert list(space.journal.finished) == ["a"]
        space.journal.record("c", {})
    assert [json.loads(line).get("file") for line in journal.read_text().splitlines()] == [None, "a", "c"]


def test_an_existing_output_is_kept_unless_forced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(UsageProblem, match="exists"), claim(out, "k", force=False):
        pass
    assert (out / "mine").read_text() == "precious"
    with claim(out, "k", force=True) as space:
        assert (out / "mine").exists(), "the old output stays until the new one is whole"
        space.finish(MANIFEST, force=True)
    assert sorted(p.name for p in out.iterdir()) == ["moeforge.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


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


def test_a_full_disk_is_one_line_about_the_machine(tmp_path):
    with pytest.raises(MachineLacks, match="is full"), disk_errors(tmp_path / "deep" / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(MachineLacks, match="cannot write /x: Permission denied"), disk_errors(tmp_path):
        raise OSError(errno.EACCES, "Permission denied", "/x")
    with pytest.raises(OSError, match="Invalid"), disk_errors(tmp_path):
        raise OSError(errno.EINVAL, "Invalid")
