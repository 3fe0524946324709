"""References through pipes."""

import json
import math

import pytest

from moeforge.errors import BadInput, MoeforgeError
from moeforge.pipeline.artifact import Artifact, as_line, locate, parse_line

MANIFEST = {"schema": 1, "kind": "checkpoint", "verb": "upcycle", "digest": "sha256:aa", "parents": [],
            "files": {"a": {"bytes": 1, "digest": "sha256:cc"}}}  # fmt: skip


@pytest.fixture
def made(tmp_path):
    (tmp_path / "moeforge.json").write_text(json.dumps(MANIFEST))
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
        ('{"path": "/"}', "JSON that is not a reference .*an object of 'path'"),
        ('{\n  "a": 1\n}\n', "JSON that is not a reference .*an object of 'a'"),
        ("[\n1\n]", "JSON that is not a reference .*a list"),
        ('{"schema": 1, "kind": "checkpoint", "files": {}}', "a manifest, not a reference; pass the directory"),
        (json.dumps({"schema": 1, "kind": "checkpoint", "files": {}}, indent=2), "a manifest, not a reference"),
        ("[" * 200_000, "no such file"),
        ('{"a": ' * 100_000, "not valid JSON"),
        ('{"moeforge": 1, "kind": "checkpoint"}', "neither a path nor a Hub id"),
        ('{"moeforge": 1, "kind": "plan"}', "without a plan"),
        ("/no/such/place", "no such file"),
        ("a/b/c", "no such file"),
        ("~no-such-user-here/x", "no such user"),
        ("/" + "n" * 300, "no such file"),
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


HOSTILE = {
    "kind": [None, 5],
    "verb": [None, ["upcycle"]],
    "digest": [None, 7],
    "key": [{}],
    "files": [None, [], {"a": 5}, {"a": {}}, {"a": {"bytes": "1", "digest": "x"}}, {"a": {"bytes": True, "digest": "x"}},
              {"a": {"bytes": -1, "digest": "x"}}, {"a": {"bytes": 1, "digest": None}}]
             + [{name: {"bytes": 1, "digest": "x"}} for name in ("/etc/passwd", "../a", "a/../../b", "", ".", "a//b", "./a",
                                                                "a/..", "a\0b")],
    "parents": [None, {}, ["x"], [{}], [{"ref": 5}], [{"ref": "x", "digest": 1}], [{"ref": "x", "manifest": []}],
                [{"ref": "x", "manifest": {"verb": 5}}], [{"ref": "x", "manifest": {"parents": [5]}}]],
    "verdicts": [[], "exact"],
    "counts": [3],
    "options": [[]],
    "method_options": ["x"],
    "tensors": [{"a": 5}, []],
    "versions": [{"torch": None}],
    "timings": [{"seconds": "long"}, []],
    "warnings": ["x"],
    "facts": [[]],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in HOSTILE.items() for value in values])
def test_a_hostile_manifest_is_one_line(made, key, value):
    (made / "moeforge.json").write_text(json.dumps(MANIFEST | {key: value}))
    with pytest.raises(BadInput, match=key) as refused:
        locate(str(made))
    assert "moeforge.json" in str(refused.value)


@pytest.mark.parametrize("key", ["kind", "verb", "digest", "files", "parents"])
def test_a_manifest_without_what_everyone_reads_is_refused(made, key):
    (made / "moeforge.json").write_text(json.dumps({k: v for k, v in MANIFEST.items() if k != key}))
    with pytest.raises(BadInput, match=f"no '{key}'"):
        locate(str(made))


def test_a_manifest_of_endless_depth_is_refused(made):
    (made / "moeforge.json").write_text('{"schema": ' + "[" * 200_000)
    with pytest.raises(BadInput, match="unreadable manifest"):
        locate(str(made))
    deep = '{"ref": "x", "manifest": {"parents": [' * 3000 + "]}}" * 3000
    (made / "moeforge.json").write_text(json.dumps(MANIFEST).replace('"parents": []', f'"parents": [{deep}]'))
    with pytest.raises(BadInput, match=r"moeforge\.json"):
        locate(str(made))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_is_refused_by_name(number):
    answer = {"a": [1.5, {"b": (0.1, number)}], "c": "NaN"}
    with pytest.raises(MoeforgeError, match=rf"holds a\.1\.b\.1 = {number}"):
        as_line(answer)
    with pytest.raises(MoeforgeError, match=r"plan.facts.loss"):
        Artifact("plan", "-", plan={"facts": {"loss": number}}).line()
    assert json.loads(as_line({"a": [1.5, None], "c": "NaN"})) == {"a": [1.5, None], "c": "NaN"}
