"""Hub ids, through the real client against a Hub on the loopback interface."""

import json
import os
import subprocess
import sys

import pytest

from moeforge.testing.hub_server import HubServer

OPEN = """
import json, sys
from moeforge.checkpoint import open_checkpoint
from moeforge.errors import MoeforgeError
ref, read, pickled = sys.argv[1], sys.argv[2:3], "--allow-pickle" in sys.argv
try:
    with open_checkpoint(ref, allow_pickle=pickled) as opened:
        told = {"tensors": {n: [i.dtype, list(i.shape)] for n, i in opened.tensors.items()}, "config": opened.config,
                "provenance": opened.provenance()}
        if read and not read[0].startswith("--"):
            told["bytes"] = opened.read(read[0]).tobytes().hex()
            told["extent"] = str(opened.extent(read[0]).path)
            told["companions"] = {c.name: c.read().decode() for c in opened.companions()}
    print(json.dumps(told))
except MoeforgeError as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
"""


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture
def ask(hub, tmp_path):
    """`ask(ref, tensor)`: what a fresh process with its own cache sees."""

    def ask(*words, token="hf_testtoken", **env):
        given = {
            **os.environ,
            **hub.environment(tmp_path / "home", token),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            **env,
        }
        given.pop("HF_TOKEN", None) if token is None else None
        done = subprocess.run(
            [sys.executable, "-c", OPEN, *words], capture_output=True, text=True, env=given, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return ask


def upload(hub, directory, name="org/model", **extra):
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return hub.put(
        name, {**files, "README.md": b"---\nlicense: mit\n---\n", "modeling_x.py": b"raise SystemExit", **extra}
    )


def downloads(hub, suffix=".safetensors"):
    return [path for method, path in hub.requests if method == "GET" and path.endswith(suffix)]


@pytest.mark.parametrize("shards", [1, 2])
def test_headers_come_without_the_weights_and_bytes_when_they_are_read(hub, ask, state, save, raw, tmp_path, shards):
    import torch

    state["big"] = torch.arange(1_000_000, dtype=torch.float32)
    commit = upload(hub, save(state, tmp_path / "src", shards))
    told = ask("org/model")
    assert set(told["tensors"]) == set(state)
    assert told["config"]["model_type"] == "test"
    assert told["provenance"]["revision"] == commit
    cached = sum(p.stat().st_size for p in (tmp_path / "home").rglob("*") if p.is_file())
    assert cached < 100_000, "weights were downloaded to show headers"

    name = "model.embed.weight"
    read = ask("org/model", name)
    assert bytes.fromhex(read["bytes"]) == raw(state[name])
    assert str(tmp_path / "home") in read["extent"]
    assert read["companions"] == {"tokenizer.json": "{}"}
    assert read["provenance"] == told["provenance"]

    file = read["extent"].rpartition("/")[2]
    before = len(downloads(hub, file))
    again = ask("org/model", name)
    assert again == read and len(downloads(hub, file)) == before, "what the cache holds was asked for again"


def test_a_header_longer_than_the_first_request(hub, ask, save, tmp_path):
    import torch

    state = {f"layers.{i}.{'x' * 200}": torch.zeros(2) for i in range(800)}
    upload(hub, save(state, tmp_path / "src"))
    assert len(ask("org/model")["tensors"]) == 800


def test_a_server_that_ignores_ranges_is_not_listened_to_for_long(hub, ask, save, tmp_path):
    """Some mirrors answer a range request with the whole file."""
    import torch

    state = {"big": torch.zeros(16_000_000)}
    hung_up = []

    class Plain(hub._http.RequestHandlerClass):
        def do_GET(self):
            del self.headers["Range"]
            try:
                super()._serve()
            except OSError as error:
                hung_up.append(error)
                self.close_connection = True

    hub._http.RequestHandlerClass = Plain
    upload(hub, save(state, tmp_path / "src"))
    assert ask("org/model")["tensors"] == {"big": ["F32", [16_000_000]]}
    assert hung_up, "the whole file was fetched to read its header"


def test_a_revision_is_pinned_and_the_cache_answers_offline_or_without_a_network(hub, ask, state, save, raw, tmp_path):
    first = upload(hub, save(state, tmp_path / "src"))
    second = upload(hub, save(state, tmp_path / "src"), **{"config.json": b'{"model_type": "second"}'})
    assert first != second
    assert ask(f"org/model@{first}")["config"]["model_type"] == "test"
    name = "model.embed.weight"
    online = ask("org/model@main", name)
    assert online["config"]["model_type"] == "second" and online["provenance"]["revision"] == second
    offline = ask(f"org/model@{second}", name, HF_HUB_OFFLINE="1")
    assert offline["bytes"] == online["bytes"] and offline["provenance"]["digest"] == online["provenance"]["digest"]
    unplugged = ask(f"org/model@{second}", name, HF_ENDPOINT="http://127.0.0.1:9")
    assert unplugged["bytes"] == online["bytes"]
    for lost in (ask("org/other", HF_HUB_OFFLINE="1"), ask("org/other", HF_ENDPOINT="http://127.0.0.1:9")):
        assert lost["error"] == "MachineLacks" and "org/other" in lost["message"]
        assert "if a local path is meant, check its spelling" in lost["message"] and "HF_HUB_OFFLINE" in lost["message"]


def test_what_cannot_be_had_is_one_line_without_the_token(hub, ask, state, save, tmp_path):
    upload(hub, save(state, tmp_path / "src"))
    hub.put("org/secret", {"config.json": b"{}"}, private=True)
    hub.put("org/empty", {"config.json": b"{}"})
    hub.put("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    hub.put("org/cut", {"config.json": b"{}", "model.safetensors": b""})
    hub.put("org/gguf", {"model-q4.gguf": b"GGUF"})
    hub.put(
        "org/half",
        {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
    )
    cases = [
        (("org/nothing",), "BadInput", "no such repository"),
        (("org/model@nowhere",), "BadInput", "no such revision"),
        (("org/empty",), "BadInput", "holds no weights"),
        (("org/pickled",), "BadInput", "--allow-pickle"),
        (("org/cut",), "BadInput", "model.safetensors: only 0 bytes"),
        (("org/gguf",), "BadInput", "model-q4.gguf"),
        (("org/half",), "BadInput", "model-1.safetensors is missing"),
    ]
    for words, error, said in cases:
        told = ask(*words)
        assert (told.get("error"), said in told.get("message", "")) == (error, True), (words, told)
        assert words[0] in told["message"]
    assert "private" in ask("org/secret", token=None)["message"]
    refused = ask("org/model", token="hf_expired0123456789")
    assert (
        refused["error"] == "BadInput"
        and "hf auth login" in refused["message"]
        and "hf_expired" not in refused["message"]
    )
    hub.fail("GET", "/api/models/org/model", status=503, times=99)
    assert ask("org/model")["error"] == "MachineLacks"


@pytest.mark.parametrize("name", ["data_cut", "offsets_overlap", "index_leads_out_by_parent", "tensor_in_two_shards"])
def test_damage_is_refused_from_the_headers(hub, ask, state, save, tmp_path, name):
    from moeforge.testing.damage import damages

    broken = save(state, tmp_path / "src", 2)
    damages()[name](broken)
    upload(hub, broken)
    told = ask("org/model")
    assert told["error"] == "BadInput" and told["message"].isprintable() and "org/model" in told["message"]


def test_pickled_weights_when_allowed(hub, ask, state, save, tmp_path):
    import torch

    source = save(state, tmp_path / "src")
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    upload(hub, source)
    told = ask("org/model", "--allow-pickle")
    assert set(told["tensors"]) == set(state) and told["provenance"]["format"] == "pickle"
