"""References through pipes."""

import json

import pytest

from moeforge.errors import BadInput
from moeforge.pipeline.artifact import Artifact, locate, parse_line


@pytest.fixture
def made(tmp_path):
    (tmp_path / "moeforge.json").write_text(
        json.dumps({"schema": 1, "kind": "checkpoint", "verb": "upcycle", "digest": "sha256:aa"})
    )
    return tmp_path


def test_a_reference_survives_the_pipe(made):
    found = locate(str(made))
    assert parse_line("noise\n" + found.line() + "\n\n") == found
    assert found.digest == "sha256:aa"
    assert locate(str(made / "moeforge.json")) == found


def test_bare_paths_and_hub_ids_are_accepted(made):
    assert parse_line(f"{made}\n").path == made
    assert parse_line("org/name@main") == Artifact("checkpoint", "org/name@main")


def test_unknown_keys_are_ignored(made):
    line = json.loads(locate(str(made)).line()) | {"later": 1}
    assert parse_line(json.dumps(line)).path == made


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "stdin was empty"),
        (" \n\n", "stdin was empty"),
        ("{broken", "not an artifact reference"),
        ('{"moeforge": 2, "path": "/"}', "version 2"),
        ('{"path": "/"}', "version None"),
        ('{"moeforge": 1, "kind": "checkpoint"}', "neither a path nor a Hub id"),
        ('{"moeforge": 1, "kind": "plan"}', "without a plan"),
        ("/no/such/place", "no such file"),
        ("a/b/c", "no such file"),
    ],
)
def test_what_is_not_a_reference_is_refused(text, word):
    with pytest.raises(BadInput, match=word):
        parse_line(text)


def test_a_changed_artifact_is_noticed(made):
    line = locate(str(made)).line().replace("sha256:aa", "sha256:bb")
    with pytest.raises(BadInput, match="changed since"):
        parse_line(line)


def test_an_unfinished_output_is_recognised(tmp_path):
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(BadInput, match="unfinished"):
        locate(str(tmp_path / "out"))


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": 2, "kind": "x"}', '{"schema": 1}'])
def test_a_manifest_of_another_kind_is_refused(tmp_path, text):
    (tmp_path / "moeforge.json").write_text(text)
    with pytest.raises(BadInput, match="manifest"):
        locate(str(tmp_path))
