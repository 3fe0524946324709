"""GGUF files on the Hub, through the commands and the real client against a Hub on the loopback interface."""

import pytest
from transformers import AutoModelForCausalLM

from moeforge.testing.command import run
from moeforge.testing.hub_server import HubServer
from moeforge.testing.models import save_tiny


@pytest.fixture
def hub():
    with HubServer() as server:
        yield server


def test_a_file_is_shown_from_its_header_and_downloaded_for_its_weights(hub, make_gguf, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "dense", "llama", vocab_size=6001))
    # a header longer than the first request, as a large vocabulary makes it
    padding = {"general.padding": ["x" * 50_000 for _ in range(100)]}
    make_gguf(tmp_path / "a.gguf", model, **padding)
    data = (tmp_path / "a.gguf").read_bytes()
    commit = hub.put("org/many", {"q/a.gguf": data, "b.gguf": data, "README.md": b"x"})
    hub.put("org/one", {"a.gguf": data})
    env = hub.environment(tmp_path / "home")
    local = run("show", tmp_path / "a.gguf", "--json", check=True).reference

    told = run("show", f"org/many/q/a.gguf@{commit}", "--json", env=env, check=True).reference
    assert told["revision"] == commit and told["format"] == "gguf"
    assert told["parameters_total"] == local["parameters_total"]
    assert (
        run("show", "org/one", "--json", env=env, check=True).reference["parameters_total"] == local["parameters_total"]
    )
    assert not [file for file in (tmp_path / "home").rglob("*.gguf")], "weights were downloaded to show a header"

    several = run("show", "org/many", env=env)
    assert several.code == 3 and "name one itself, e.g. org/many/b.gguf" in several.err
    lost = run("show", "org/many/c.gguf", env=env)
    assert lost.code == 3 and "no such file" in lost.err

    words = ("--experts", 2, "--top-k", 1, "--no-verify", "-o")
    run("upcycle", tmp_path / "a.gguf", *words, tmp_path / "from-disk", check=True)
    for name, more in (("from-hub", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        run("upcycle", f"org/many/q/a.gguf@{commit}", *words, tmp_path / name, env=env | more, check=True)
        weights = [(tmp_path / made / "model.safetensors").read_bytes() for made in (name, "from-disk")]
        assert weights[0] == weights[1]
