"""Datasets of the Hub, through the real client against a Hub on the loopback interface."""

import json
import os
import subprocess
import sys

import pytest

from moeforge.errors import BadInput, MachineLacks
from moeforge.testing.hub_server import HubServer
from moeforge.train.hub_data import Dataset, _check_parts, choose, parse

READ = """
import json, sys
from moeforge.errors import MoeforgeError
from moeforge.train.data import find_documents
from moeforge.train.hub_data import pinned
try:
    found = find_documents(sys.argv[1:])
    print(json.dumps({"texts": [d.read() for d in found], "identity": [d.identity for d in found], "pinned": pinned(sys.argv[1])}))
except MoeforgeError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    """`ask(spec)`: what a fresh process with its own cache reads."""

    def ask(*specs, **env):
        given = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", READ, *specs], capture_output=True, text=True, env=given, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_dataset_is_read_at_its_commit(hub, ask):
    files = {"data/train-00001-of-00002.jsonl": lines("c"), "data/train-00000-of-00002.jsonl": lines("a", "b"),
             "data/test-00000-of-00001.jsonl": lines("z"), "README.md": b"# no text to train on"}  # fmt: skip
    first = hub.put("datasets/org/notes", files)
    found = ask("org/notes")
    assert found["texts"] == ["a", "b", "c"]
    assert found["pinned"] == f"hub:org/notes@{first}"
    assert found["identity"][0] == [f"hub:org/notes@{first}/data/train-00000-of-00002.jsonl:1", 14, 0]
    assert ask("hub:org/notes:test")["texts"] == ["z"]
    second = hub.put("datasets/org/notes", {"data/train-00000-of-00002.jsonl": lines("new")})
    assert ask("org/notes")["texts"] == ["new", "c"] and second != first
    old = ask(f"hub:org/notes@{first}:train")
    assert old["texts"] == ["a", "b", "c"] and old["pinned"] == f"hub:org/notes@{first}:train"


def test_the_cache_serves_when_the_hub_is_gone(hub, ask):
    hub.put("datasets/org/notes", {"train.jsonl": lines("kept")})
    assert ask("org/notes")["texts"] == ["kept"]
    offline = ask("org/notes", HF_HUB_OFFLINE="1")
    assert offline["texts"] == ["kept"] and "pinned" in offline
    assert ask("org/other", HF_HUB_OFFLINE="1")["error"] == "MachineLacks"


def test_what_cannot_be_read_is_told_in_one_line(hub, ask):
    hub.put("datasets/org/pictures", {"train/0.png": b"\x89PNG"})
    hub.put("datasets/org/notes", {"train.jsonl": lines("a")})
    for spec, kind, told in [
        ("org/absent", "BadInput", "no such repository"),
        ("org/notes@nowhere", "BadInput", "no such revision"),
        ("org/notes:test", "BadInput", "no file of split 'test'; there are train.jsonl"),
        ("org/pictures", "BadInput", "no .jsonl or .parquet files"),
    ]:
        found = ask(spec)
        assert found["error"] == kind and told in found["message"], found
    hub.fail("GET", "/api/datasets/org/notes", status=503, times=20)
    assert ask("org/notes")["error"] == "MachineLacks"


@pytest.mark.parametrize(
    ("names", "split", "wanted"),
    [
        (("train.jsonl", "test.jsonl"), None, ["train.jsonl"]),
        (("a.jsonl", "b.jsonl"), None, ["a.jsonl", "b.jsonl"]),
        (("x/validation/0.parquet", "x/train/0.parquet"), "validation", ["x/validation/0.parquet"]),
        (("train.parquet", "train.jsonl"), None, ["train.jsonl"]),
        (
            ("data/train_sft-0-of-1.parquet", "data/test_sft-0-of-1.parquet"),
            "test_sft",
            ["data/test_sft-0-of-1.parquet"],
        ),
    ],
)
def test_files_of_a_split(names, split, wanted):
    assert choose(names, Dataset("o/n", None, split)) == wanted


def test_specs():
    assert parse("hub:o/n@main:train") == Dataset("o/n", "main", "train")
    assert parse("o/n") == Dataset("o/n")
    for spec in ("notes/a.txt", "a", "a/b/c", "/abs/x", "./a/b", "o/n:", "../x"):
        assert parse(spec) is None, spec
    with pytest.raises(BadInput, match=r"no \.jsonl"):
        choose(("a.csv",), Dataset("o/n"))


def test_a_mixture_names_commits_and_weights(monkeypatch):
    from moeforge.train import hub_data

    monkeypatch.setattr(hub_data, "_listed", lambda name, revision: ("c0ffee", ()))
    assert hub_data.pinned("o/n:test=0.70") == "hub:o/n@c0ffee:test=0.7"
    assert hub_data.pinned("builtin:prose=2") == "builtin:prose=2"


def test_some_parts_of_a_split_do_not_pass_for_all_of_it():
    parts = ("data/train-00000-of-00003.parquet", "data/train-00002-of-00003.parquet")
    _check_parts((*parts, "data/train-00001-of-00003.parquet", "data/test-00000-of-00001.parquet", "notes.jsonl"), "x")
    with pytest.raises(MachineLacks, match=r"2 of the 3 parts of data/train\.parquet"):
        _check_parts(parts, "x")
