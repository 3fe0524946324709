"""push over real HTTP: the unmodified huggingface_hub client against a loopback Hub, with faults."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save

from moeforge.checkpoint.digest import artifact_digest, file_digest
from moeforge.hub import redact
from moeforge.options import format_bytes
from moeforge.testing.command import run
from moeforge.testing.hub_requests import MIDWAY
from moeforge.testing.hub_server import HubServer
from moeforge.testing.models import save_tiny

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": save({"a": np.random.default_rng(0).normal(size=(50, 50)).astype(np.float32)}),
    "tokenizer/t.json": b"{}",
}
TOKEN = "hf_averysecrettoken"


def describe(where, names):
    """Write the manifest of a directory that holds `names`."""
    files = {
        name: {"bytes": (where / name).stat().st_size, "digest": file_digest(where / name)} for name in sorted(names)
    }
    manifest = {
        "schema": 1, "kind": "checkpoint", "verb": "upcycle", "method": "copy", "options": {}, "key": "k", "files": files,
        "digest": artifact_digest({name: info["digest"] for name, info in files.items()}),
        "parents": [{"ref": "/home/me/dense", "license": "mit"}], "verdicts": {"exact": True},
    }  # fmt: skip
    (where / "moeforge.json").write_text(json.dumps(manifest))
    return manifest


@pytest.fixture
def artifact(tmp_path):
    where = tmp_path / "artifact"
    for name, data in FILES.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_bytes(data)
    (where / "private-notes.txt").write_text("not in the manifest")
    describe(where, FILES)
    return where


@pytest.fixture
def hub():
    with HubServer({TOKEN: "tester"}, part_size=4096) as server:
        yield server


@pytest.fixture
def push(hub, artifact, tmp_path):
    def go(*words, stdin="", **env):
        result = run("push", *words, stdin=stdin, env={**hub.environment(tmp_path / "hf", TOKEN),
                     "MOEFORGE_HOME": str(tmp_path / "home"), **env})  # fmt: skip
        assert TOKEN not in result.out + result.err
        return result

    return go


def test_push_holds_exactly_the_listed_files_and_the_card(push, hub, artifact, tmp_path):
    result = push(artifact, "org/made", "--private", "-o", tmp_path / "receipt.json")
    assert result.code == 0, result.err
    repo = hub.repos["org/made"]
    held = repo.files("main")
    assert repo.private
    assert set(held) - {".gitattributes"} == {*FILES, "README.md", "moeforge.json"}
    assert {name: held[name] for name in FILES} == FILES
    assert b"license: mit" in held["README.md"]
    assert b"/home/me" not in held["moeforge.json"]
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert receipt["commit"] == repo.refs["main"]
    assert receipt["repo"] == "org/made"
    assert receipt["digest"] == json.loads(held["moeforge.json"])["digest"]
    assert receipt["files"]["model.safetensors"] == len(FILES["model.safetensors"])
    assert result.reference["kind"] == "receipt"
    assert TOKEN not in (tmp_path / "receipt.json").read_text()


def test_pushing_again_makes_no_commit_and_sends_nothing(push, hub, artifact):
    assert push(artifact, "org/made").code == 0
    commits = len(hub.repos["org/made"].commits)
    hub.requests.clear()
    assert push("org/made", stdin=f"{artifact}\n").code == 0
    assert len(hub.repos["org/made"].commits) == commits
    assert not [path for method, path in hub.requests if method == "PUT"]


def test_dry_run_contacts_nobody(push, hub, artifact):
    result = push(artifact, "org/made", "--dry-run")
    assert result.code == 0, result.err
    plan = result.reference["plan"]
    assert plan["facts"]["upload_bytes"] == sum(plan["facts"]["files"].values())
    assert set(plan["facts"]["files"]) == {*FILES, "README.md", "moeforge.json"}
    assert hub.requests == []
    sizes = plan["facts"]["files"]
    largest = max(sizes, key=sizes.get)
    told = result.err[result.err.index("files:") :].splitlines()[1:]
    assert len(told) == len(sizes)
    assert format_bytes(sizes[largest]) in told[0] and largest in told[0]
    assert str(sizes[largest]) not in result.err


def test_a_plan_of_many_files_lists_the_largest(push, artifact):
    names = [f"part-{number:02}.bin" for number in range(30)]
    for number, name in enumerate(names):
        (artifact / name).write_bytes(bytes(20_000 + number))
    describe(artifact, names)
    told = push(artifact, "org/made", "--dry-run").err
    assert all((name in told) == (number >= 10) for number, name in enumerate(names)), told
    assert "in 12 more" in told  # ten of these, the card and the manifest


def test_branch_new_and_existing_and_pull_request(push, hub, artifact, tmp_path):
    assert push(artifact, "org/made", "--branch", "v2", "-o", tmp_path / "1").code == 0
    repo = hub.repos["org/made"]
    assert set(repo.files("main")) == {".gitattributes"}
    assert "model.safetensors" in repo.files("v2")
    (artifact / "tokenizer/t.json").write_bytes(b"[]")
    describe(artifact, FILES)
    assert push(artifact, "org/made", "--branch", "v2", "-o", tmp_path / "2").code == 0
    assert repo.files("v2")["tokenizer/t.json"] == b"[]"
    result = push(artifact, "org/made", "--pr", "-o", tmp_path / "3")
    assert result.code == 0, result.err
    assert "model.safetensors" in repo.files("refs/pr/1")
    assert set(repo.files("main")) == {".gitattributes"}
    assert json.loads((tmp_path / "3").read_text())["pull_request"].endswith("/org/made/discussions/1")


@pytest.mark.parametrize("status", [500, 503, 0, MIDWAY])
def test_a_fault_in_the_middle_is_survived(push, hub, artifact, status):
    hub.fail("PUT", "/lfs/", status=status, times=1, after=1)
    result = push(artifact, "org/made")
    assert result.code == 0, result.err
    assert hub.repos["org/made"].files("main")["model.safetensors"] == FILES["model.safetensors"]


def test_after_a_failed_commit_weights_are_not_sent_again(push, hub, artifact):
    hub.fail("POST", "/commit/", status=500, times=100)
    failed = push(artifact, "org/made")
    assert failed.code == 5
    assert "resumes" in failed.err
    assert set(hub.repos["org/made"].files("main")) == {".gitattributes"}  # all or nothing
    hub._faults.clear()
    hub.requests.clear()
    assert push(artifact, "org/made").code == 0
    assert not [path for method, path in hub.requests if method == "PUT"]
    assert hub.repos["org/made"].files("main")["model.safetensors"] == FILES["model.safetensors"]


def test_refusals_are_one_line(push, hub, artifact, tmp_path):
    cases = [
        (("forbidden/made",), {}, 2, "may not write"),
        (("org/made",), {"HF_TOKEN": "hf_expiredexpired"}, 2, "expired"),
        (("org/made",), {"HF_ENDPOINT": "http://127.0.0.1:9"}, 5, "cannot be reached"),
        (("org/made",), {"HF_HUB_OFFLINE": "1"}, 5, "HF_HUB_OFFLINE"),
        (("made",), {}, 2, "ORG/NAME"),
        (("org/made", "--branch", "../x"), {}, 2, "branch"),
    ]
    for words, env, code, text in cases:
        result = push(artifact, *words, **env)
        assert (result.code, text in result.err) == (code, True), result.err
        assert "hf_expired" not in result.err
        errors = [line for line in result.err.splitlines() if "error:" in line]
        assert len(errors) == 1
        assert "Traceback" not in result.err


def test_only_whole_artifacts_are_pushed(push, hub, artifact, tmp_path):
    (artifact / "model.safetensors").write_bytes(b"short")
    result = push(artifact, "org/made")
    assert result.code == 3
    assert "another size" in result.err
    stranger = save_tiny(tmp_path / "stranger", "llama")
    assert "not written by moeforge" in push(stranger, "org/made").err
    assert not hub.repos


def test_tokens_are_blotted_out():
    assert redact("bad\n token hf_AbCdEf123456, sorry") == "bad token hf_***, sorry"


@pytest.mark.parametrize(
    "name", ["../secret.txt", "tokenizer/../../secret.txt", "/etc/hostname", "linked.txt", "linked/secret.txt"]
)
def test_files_outside_the_artifact_are_never_sent(push, hub, artifact, tmp_path, name):
    """A downloaded artifact may list what it likes, and hold links; its digests are right."""
    (tmp_path / "outside").mkdir()
    for secret in (tmp_path / "secret.txt", tmp_path / "outside" / "secret.txt"):
        secret.write_text("do not publish")
    (artifact / "linked.txt").symlink_to("../secret.txt")
    (artifact / "linked").symlink_to("../outside")
    describe(artifact, [*FILES, name])
    for words in (("--dry-run",), ()):
        result = push(artifact, "org/made", *words)
        assert result.code == 3 and name in result.err, result.err
    assert hub.requests == []


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(push, hub, artifact, tmp_path):
    cache = tmp_path / "models--org--made"
    snapshot = cache / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (cache / "blobs").mkdir()
    shutil.copytree(artifact, snapshot)
    (snapshot / "model.safetensors").rename(cache / "blobs" / "1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    result = push(snapshot, "org/again")
    assert result.code == 0, result.err
    assert hub.repos["org/again"].files("main")["model.safetensors"] == FILES["model.safetensors"]


def test_what_changed_since_it_was_written_is_not_published(push, hub, artifact):
    changed = bytearray(FILES["model.safetensors"])
    changed[-3] ^= 1
    (artifact / "model.safetensors").write_bytes(changed)
    result = push(artifact, "org/made")
    assert result.code == 3 and "model.safetensors: digest" in result.err and "nothing was sent" in result.err
    assert hub.requests == []
    (artifact / "model.safetensors").write_bytes(FILES["model.safetensors"])
    body = json.loads((artifact / "moeforge.json").read_text())
    (artifact / "moeforge.json").write_text(json.dumps(body | {"digest": "sha256:" + "0" * 64}))
    result = push(artifact, "org/made", "--dry-run")
    assert result.code == 3 and "it was edited" in result.err


def test_a_token_that_expires_in_the_middle_ends_in_one_line_and_the_rest_is_sent_later(push, hub, artifact):
    hub.fail("POST", "/commit/", status=401)
    failed = push(artifact, "org/made")
    assert failed.code == 2 and "hf auth login" in failed.err and "Traceback" not in failed.err
    hub.requests.clear()
    assert push(artifact, "org/made").code == 0
    assert not [path for method, path in hub.requests if method == "PUT"]


def test_private_is_not_granted_by_a_public_repository(push, hub, artifact):
    hub.put("org/public", {"a": b"1"})
    refused = push(artifact, "org/public", "--private")
    assert refused.code == 2 and "public" in refused.err
    assert set(hub.repos["org/public"].files("main")) == {".gitattributes", "a"}
    hub.put("org/closed", {"a": b"1"}, private=True)
    assert push(artifact, "org/closed", "--private").code == 0


def test_what_was_pushed_is_a_source_and_no_file_holds_the_token(push, hub, tmp_path):
    """upcycle, push over a connection that breaks, then show, upcycle and verify what the endpoint now holds."""
    dense = save_tiny(tmp_path / "dense", "llama")
    run("upcycle", dense, "--experts", 2, "--top-k", 1, "-o", tmp_path / "moe", check=True)
    run("export", dense, "--to", "hf", "-o", tmp_path / "plain", check=True)
    hub.fail("PUT", "/lfs/", status=MIDWAY)
    for name in ("moe", "plain"):
        assert push(tmp_path / name, f"org/{name}", "-o", tmp_path / f"{name}.json").code == 0
    env = {**hub.environment(tmp_path / "other-machine", TOKEN), "MOEFORGE_HOME": str(tmp_path / "other-home")}
    shown = run("show", "org/moe", "--json", env=env, check=True)
    assert (
        shown.reference["mixtures"][0]["experts"] == 2
        and shown.reference["revision"] == hub.repos["org/moe"].refs["main"]
    )
    made = run("upcycle", "org/plain", "--experts", 2, "--top-k", 1, "-o", tmp_path / "again", env=env, check=True)
    weights = [(tmp_path / where / "model.safetensors").read_bytes() for where in ("moe", "again")]
    assert weights[0] == weights[1]
    (tmp_path / "downloaded").mkdir()
    for name, data in hub.repos["org/moe"].files("main").items():
        (tmp_path / "downloaded" / name).write_bytes(data)
    verified = run("verify", tmp_path / "downloaded", "--no-proof", env=env)
    assert verified.code == 0, verified.out
    told = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert told == [] and TOKEN not in made.err + made.out + shown.err + shown.out
