"""Digests: every byte of every file counts, and a plan is no checkpoint."""

import hashlib

import pytest
from safetensors.torch import save_file

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.digest import artifact_digest, file_digest, safetensors_digest, verify_files
from moeforge.errors import BadInput


@pytest.fixture
def artifact(state, save, tmp_path):
    directory = save(state, tmp_path / "made", 2)
    (directory / "moeforge.json").write_text("{}")
    files = {
        p.name: {"bytes": p.stat().st_size, "digest": file_digest(p)}
        for p in directory.iterdir()
        if p.name != "moeforge.json"
    }
    return directory, files


def test_the_definition(state, raw, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    digest, tensors = safetensors_digest(path)
    assert tensors == {name: hashlib.sha256(raw(tensor)).hexdigest() for name, tensor in state.items()}
    order = sorted(tensors, key=lambda n: header.index(b'"%b"' % n.encode()))
    joined = header + b"".join(bytes.fromhex(tensors[name]) for name in order)
    assert digest == file_digest(path) == "sha256:" + hashlib.sha256(joined).hexdigest()
    (tmp_path / "b.json").write_text("{}")
    assert file_digest(tmp_path / "b.json") == "sha256:" + hashlib.sha256(b"{}").hexdigest()
    assert (
        artifact_digest({"b": "sha256:2", "a": "sha256:1"})
        == "sha256:" + hashlib.sha256(b"a:sha256:1\nb:sha256:2\n").hexdigest()
    )


def test_progress_adds_up(state, artifact):
    directory, files = artifact
    counted = []
    assert verify_files(directory, files, counted.append) == []
    small = sum((directory / n).stat().st_size for n in files if not n.endswith(".safetensors"))
    assert sum(counted) == small + sum(t.numel() * t.element_size() for t in state.values())


@pytest.mark.parametrize("at", [0, 8, 40, -1])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_any_changed_byte_is_found(artifact, name, at):
    directory, files = artifact
    data = bytearray((directory / name).read_bytes())
    if at >= len(data):
        at = 1
    data[at] ^= 1
    (directory / name).write_bytes(data)
    (problem,) = verify_files(directory, files)
    assert problem.startswith(name) and problem.isprintable()


def test_missing_extra_short_and_escaping_files_are_found(artifact):
    directory, files = artifact
    (directory / "config.json").unlink()
    (directory / "evil.py").write_text("x")
    (directory / ".gitattributes").write_text("x")
    short = directory / "tokenizer.json"
    short.write_text("{} ")
    problems = verify_files(
        directory, {**files, "../x": {"bytes": 1, "digest": ""}, "/etc/passwd": {"bytes": 1, "digest": ""}}
    )
    assert [p.partition(":")[0] for p in problems] == [
        "../x",
        "/etc/passwd",
        "config.json",
        "tokenizer.json",
        "evil.py",
    ]


def test_a_planned_checkpoint_has_headers_and_no_bytes():
    plan = {"verb": "upcycle", "config": {"model_type": "x"}, "tensors": {"a": ["BF16", [2, 3]]}}
    with open_checkpoint("out", plan=plan) as planned:
        assert planned.tensors["a"].nbytes == 12 and planned.config == plan["config"] and planned.extent("a") is None
        assert planned.provenance()["format"] == "plan" and list(planned.companions()) == []
        with pytest.raises(BadInput, match=r"'a' is only planned.*--dry-run"):
            planned.read("a")
    for broken in (
        {"verb": "search"},
        {**plan, "tensors": {"a": ["X9", [2]]}},
        {**plan, "tensors": {"a": ["BF16", [-2]]}},
        {**plan, "tensors": {"a": 3}},
    ):
        with pytest.raises(BadInput):
            open_checkpoint("out", plan=broken)
