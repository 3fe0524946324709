"""A checkpoint of our own layout with `push --remote-code`: trust_remote_code works where moeforge is, and says one thing where it is not."""

import json
import subprocess
import sys

import pytest
import torch

from moeforge.testing import inprocess
from moeforge.testing.command import environment, run
from moeforge.testing.hub_server import HubServer
from moeforge.testing.models import save_tiny

TOKEN = "hf_averysecrettoken"
HIDE = "import sys; sys.modules['moeforge'] = None\n"
"""The package is not there: how Python marks a module that must not be found."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(dense, mixture) of a family that only our own layout holds."""
    where = tmp_path_factory.mktemp("made")
    dense = save_tiny(where / "dense", "gpt2")
    return dense, inprocess.run("upcycle", dense, where / "moe", experts=4, router_std=0.5, verify=False).path


@pytest.fixture(scope="module")
def pulled(made, tmp_path_factory):
    """What the Hub holds after a push with --remote-code, as files."""
    where = tmp_path_factory.mktemp("pulled")
    with HubServer({TOKEN: "tester"}, part_size=4096) as server:
        env = {**server.environment(where / "hf", TOKEN), "MOEFORGE_HOME": str(where / "home")}
        run("push", made[1], "org/made", "--remote-code", env=env, check=True)
        held = server.repos["org/made"].files("main")
    for name, data in held.items():
        (where / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (where / "model" / name).write_bytes(data)
    return where / "model"


def python(code, tmp_path):
    env = {**environment(), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


LOAD = "from transformers import AutoModelForCausalLM\nmodel = AutoModelForCausalLM.from_pretrained({!r}{})\n"


def test_trust_remote_code_loads_it_where_moeforge_is_installed(made, pulled, tmp_path):
    ids = torch.randint(0, 199, (1, 20), generator=torch.Generator().manual_seed(3)).tolist()
    code = LOAD.format(str(pulled), ", trust_remote_code=True") + (
        "import sys, torch\n"
        f"ids = torch.tensor({ids})\n"
        f"dense = AutoModelForCausalLM.from_pretrained({str(made[0])!r})\n"
        "with torch.no_grad(): a, b = dense.eval()(ids).logits, model.eval()(ids).logits\n"
        f"model.save_pretrained({str(tmp_path / 'again')!r})\n"
        "print(type(model).__name__, float((a - b).abs().max() / a.abs().max()))\n"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    name, error = done.stdout.split()
    assert name == "MoeforgeForCausalLM"
    assert float(error) <= 1e-5
    assert not list((tmp_path / "again").glob("*.py"))  # no code of ours is copied beside what it saves


def test_without_moeforge_it_fails_with_one_clear_line(pulled, tmp_path):
    done = python(HIDE + LOAD.format(str(pulled), ", trust_remote_code=True"), tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: this checkpoint is a mixture that the package moeforge runs: pip install moeforge"
    )
    assert "During handling" not in done.stderr


def test_plain_transformers_does_not_load_it_as_the_dense_model(made, pulled, tmp_path):
    for directory, said in ((made[1], "has model type `moeforge`"), (pulled, "trust_remote_code=True")):
        done = python(HIDE + LOAD.format(str(directory), ""), tmp_path)
        assert done.returncode != 0
        assert said in done.stderr


def test_what_was_published_is_whole(made, pulled):
    manifest = json.loads((pulled / "moeforge.json").read_text())
    assert manifest["digest"] != json.loads((made[1] / "moeforge.json").read_text())["digest"]
    done = run("verify", pulled, "--no-proof")
    assert done.code == 0, done.err
    assert "trust_remote_code=True" in (pulled / "README.md").read_text()
    assert len((pulled / "modeling_moeforge.py").read_text().splitlines()) < 20


def test_a_native_checkpoint_needs_no_code(tmp_path):
    dense = save_tiny(tmp_path / "dense", "llama")
    native = inprocess.run("upcycle", dense, tmp_path / "moe", experts=4, verify=False).path
    done = run("push", native, "org/made", "--remote-code", "--dry-run")
    assert done.code == 2
    assert "config.json has model_type 'mixtral'" in done.err
    assert len(done.err.splitlines()) == 1
