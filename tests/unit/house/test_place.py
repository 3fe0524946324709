"""Where an output may go: never over, around or inside what the run reads, never over what moeforge did not write."""

import json
import os

import pytest

from moeforge.errors import UsageProblem
from moeforge.pipeline import place
from moeforge.pipeline.place import check_free


@pytest.fixture
def world(tmp_path, artifact):
    """src/, second/ and corpus/ side by side in a directory; the options that read them."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    (tmp_path / "notes.txt").write_text("note")
    return artifact(), {
        "parent": (str(artifact("second", "sha256:bb")),),
        "data": (f"{tmp_path / 'corpus' / 'a.txt'}",),
        "notes": tmp_path / "notes.txt",
    }


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("out", "how"),
    [
        ("src", "is"),
        ("src/in/side", "lies inside"),
        ("second", "is"),
        ("second/x", "lies inside"),
        ("corpus", "contains"),
        ("notes.txt", "is"),
        (".", "contains"),
        ("elsewhere/../src", "is"),
        ("link", "is"),
        ("link/x", "lies inside"),
    ],
)
def test_an_output_over_around_or_inside_what_is_read_is_refused(world, join, tmp_path, out, how, force):
    src, options = world
    (tmp_path / "link").symlink_to(src)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(UsageProblem, match=f" {how} .*, which this run reads"):
        join(src, tmp_path / out, force=force, **options)
    with pytest.raises(UsageProblem, match=f" {how} .*, which this run reads"):
        join.plan(src, tmp_path / out, force=force, **options)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_neighbour_whose_name_begins_the_same_is_no_neighbour_of_mine(world, join, tmp_path):
    src, options = world
    assert join(src, tmp_path / "src2", **options).artifact.path == tmp_path / "src2"


def test_force_replaces_what_moeforge_wrote_and_empty_directories(world, join, artifact, tmp_path):
    src, options = world
    artifact("old", "sha256:cc")
    (tmp_path / "empty").mkdir()
    for name in ("old", "empty"):
        join(src, tmp_path / name, force=True, **options)
        assert json.loads((tmp_path / name / "moeforge.json").read_text())["verb"] == "join"


@pytest.mark.parametrize("manifest", [None, "{}", "not json"])
def test_force_leaves_other_peoples_directories_alone(world, join, tmp_path, manifest):
    src, options = world
    (tmp_path / "par").mkdir()
    (tmp_path / "par" / "thesis.txt").write_text("x")
    if manifest is not None:
        (tmp_path / "par" / "moeforge.json").write_text(manifest)
    with pytest.raises(UsageProblem, match="does not replace the directory") as refused:
        join(src, tmp_path / "par", force=True, **options)
    assert str(tmp_path / "par") in str(refused.value)
    assert (tmp_path / "par" / "thesis.txt").read_text() == "x"
    assert not (tmp_path / "par.partial").exists()


@pytest.mark.parametrize("name", ["par", "afile"])
def test_force_is_not_advised_where_it_would_refuse(world, join, tmp_path, name):
    src, options = world
    (tmp_path / "par").mkdir()
    (tmp_path / "par" / "thesis.txt").write_text("x")
    (tmp_path / "afile").write_text("x")
    with pytest.raises(UsageProblem, match=f"{name} exists and is kept even with --force: .*; move it away or"):
        join(src, tmp_path / name, **options)
    join(src, tmp_path / "out", **options)
    with pytest.raises(UsageProblem, match="or pass --force"):
        join(src, tmp_path / "out", **{**options, "notes": None})


@pytest.mark.parametrize("target", ["par", "nowhere"])
def test_of_a_symlink_only_the_link_is_replaced(world, join, tmp_path, target):
    src, options = world
    (tmp_path / "par").mkdir()
    (tmp_path / "par" / "thesis.txt").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(UsageProblem, match="exists"):
        join(src, tmp_path / "out", **options)
    join(src, tmp_path / "out", force=True, **options)
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out" / "moeforge.json").exists()
    assert (tmp_path / "par" / "thesis.txt").read_text() == "x"


def test_force_replaces_files_of_ours_only(tmp_path):
    files = {
        "receipt.json": '{"moeforge": 1, "kind": "receipt"}',
        "empty.json": "",
        "letter.json": '{"dear": "reader"}',
        "list.json": "[]",
        "pod.json": '{"apiVersion": "v1", "kind": "Pod"}',
        "later.json": '{"moeforge": 2, "kind": "receipt"}',
        "nameless.json": '{"moeforge": 1}',
        "deep.json": "[" * 100_000,
        "large.json": '{"moeforge": 1, "kind": "receipt"}' + " " * place.MAX_RECEIPT,
        "model.safetensors": "\0weights",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("receipt.json", "empty.json"):
        check_free(tmp_path / name, "file", force=True)
    for name in sorted(files.keys() - {"receipt.json", "empty.json"}):
        with pytest.raises(UsageProblem, match="moeforge did not write it"):
            check_free(tmp_path / name, "file", force=True)
    with pytest.raises(UsageProblem, match="this verb writes a directory"):
        check_free(tmp_path / "receipt.json", "directory", force=True)
    with pytest.raises(UsageProblem, match="this verb writes one file"):
        check_free(tmp_path, "file", force=True)


@pytest.mark.parametrize("out", ["notes.txt/out", "n" * 300, "/proc/foo/out", "/", "notes.txt/deep/er/out"])
def test_a_place_where_nothing_can_be_made_is_one_line(world, join, tmp_path, out):
    src, _ = world
    with pytest.raises(UsageProblem, match="-o ") as refused:
        join(src, tmp_path / out)
    assert str(refused.value).count("\n") == 0


def test_a_partial_that_is_a_file_or_a_link_is_not_followed(world, join, tmp_path):
    src, options = world
    (tmp_path / "out.partial").write_text("mine")
    with pytest.raises(UsageProblem, match="cannot be made"):
        join(src, tmp_path / "out", **options)
    os.unlink(tmp_path / "out.partial")
    (tmp_path / "out.partial").symlink_to(tmp_path / "corpus")
    with pytest.raises(UsageProblem, match="cannot be made"):
        join(src, tmp_path / "out", **options)
    assert (tmp_path / "corpus" / "a.txt").exists()
