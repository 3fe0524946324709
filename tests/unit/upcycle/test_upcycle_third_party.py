"""A third party adds a family, a layout and the pair of the two without a line of code of ours: data behind entry points."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from moeforge.testing.command import run

FAMILY = {"model_type": "newlm", "like": "llama", "classes": ["LlamaForCausalLM"], "settings": {"rms_norm_eps": 1e-3}}
LAYOUT = {
    "model_type": "new_moe",
    "like": "mixtral",
    "class": "MixtralForCausalLM",
    "config": {"origin": "new"},
    "portability": {"transformers": [{"verdict": "exact"}]},
}
PAIRS = {
    "source": "newlm",
    "require": [{"key": "mlp_bias", "op": "==", "value": False, "because": "experts have no biases"}],
    "pairs": [{"target": "new_moe"}],
}
MORE = {"pairs": [{"target": "new_moe"}]}
ENTRIES = """\
[moeforge.architectures]
newlm = new_families:FAMILY
[moeforge.upcycle_targets]
new_moe = new_families:LAYOUT
[moeforge.upcycle_pairs]
newlm = new_families:PAIRS
llama = new_families:MORE
"""


@pytest.fixture
def installed(tmp_path):
    """A distribution `New.Families` on the path; the name in MOEFORGE_PLUGINS is spelt in another way, as pip allows."""
    site = tmp_path / "site"
    info = site / "New.Families-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: New.Families\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    (site / "pairs.json").write_text(json.dumps(PAIRS))
    (site / "new_families.py").write_text(
        "from pathlib import Path\n"
        f"FAMILY = {FAMILY!r}\nLAYOUT = {LAYOUT!r}\nMORE = {MORE!r}\n"
        "PAIRS = Path(__file__).with_name('pairs.json')\n"
    )
    return {"PYTHONPATH": str(site), "MOEFORGE_PLUGINS": "new_families"}


@pytest.fixture
def newlm(dense, tmp_path):
    """A tiny model of the new family: a Llama under another name, without the config keys that have defaults."""
    source = tmp_path / "newlm"
    source.mkdir()
    shutil.copy(dense("llama") / "model.safetensors", source)
    config = json.loads((dense("llama") / "config.json").read_text())
    config.pop("rms_norm_eps")
    (source / "config.json").write_text(json.dumps({**config, "model_type": "newlm"}))
    return source


def test_a_family_a_layout_and_their_pair(installed, newlm, dense, tmp_path):
    done = run("upcycle", newlm, "--experts", 4, "--no-verify", "-o", tmp_path / "out", env=installed, check=True)
    config = json.loads((done.path / "config.json").read_text())
    assert (config["model_type"], config["origin"], config["rms_norm_eps"]) == ("new_moe", "new", 1e-3)
    made, source = load_file(done.path / "model.safetensors"), load_file(newlm / "model.safetensors")
    for expert in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{expert}.w1.weight"
        assert (made[name] == source["model.layers.1.mlp.gate_proj.weight"]).all()


def test_a_layout_for_a_family_of_ours_comes_last(installed, dense):
    def target(*args):
        planned = run("upcycle", dense("llama"), "--dry-run", *args, env=installed, check=True)
        return planned.reference["plan"]["config"]["model_type"]

    assert target() == "mixtral"
    assert target("--target", "new_moe") == "new_moe"


def test_they_are_listed_and_can_be_switched_off(installed, newlm):
    listed = json.loads(run("plugins", "--json", env=installed, check=True).out)
    found = {(row["group"], row["name"], row["from"]) for row in listed}
    assert ("moeforge.architectures", "newlm", "New.Families") in found
    assert ("moeforge.upcycle_targets", "new_moe", "New.Families") in found
    assert ("moeforge.upcycle_pairs", "llama", "New.Families") in found
    assert ("moeforge.architectures", "llama", "moeforge") in found
    assert not [row for row in listed if "broken" in row["summary"]]
    off = run("upcycle", newlm, "--dry-run", env={**installed, "MOEFORGE_PLUGINS": ""})
    assert off.code == 3
    assert "model_type = 'newlm' is not a dense family" in off.err


def test_another_description_is_another_run(installed, newlm, tmp_path):
    words = ["upcycle", newlm, "--experts", 4, "--no-verify", "-o", tmp_path / "out"]
    run(*words, env=installed, check=True)
    assert "already done" in run(*words, env=installed, check=True).err
    site = tmp_path / "site" / "new_families.py"
    site.write_text(site.read_text().replace("'origin': 'new'", "'origin': 'newer'"))
    again = run(*words, env=installed)
    assert again.code == 2
    assert "exists" in again.err


@pytest.mark.parametrize(
    ("text", "said"),
    [("{not json", "not a description in JSON"), ("[1]", "a JSON object"), ('{"pairs": [{"goal": "x"}]}', "KeyError: 'target'"),
     ('{"pairs": [], "never": [{"aim": 1}]}', "TypeError")],
)  # fmt: skip
def test_a_broken_description_names_its_package_and_stops_nobody_else(text, said, installed, newlm, dense, tmp_path):
    (tmp_path / "site" / "pairs.json").write_text(text)
    refused = run("upcycle", newlm, "--dry-run", env=installed)
    assert refused.code == 2
    assert said in refused.err
    assert "New.Families" in refused.err
    assert len(refused.err.splitlines()) == 1
    run("upcycle", dense("llama"), "--dry-run", env=installed, check=True)
