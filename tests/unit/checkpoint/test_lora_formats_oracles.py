"""Adapters read from other programs compute what those programs compute: PEFT, and the mixlora package (0.2.3) where it is installed."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

import moeforge
from moeforge.errors import MoeforgeError
from moeforge.model.adapters import forced
from moeforge.testing import foreign
from moeforge.testing.conformance import check_stage
from moeforge.testing.hub_server import HubServer
from moeforge.testing.inprocess import run
from moeforge.testing.models import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("oracles") / "base"
    save_tiny(path, "llama")
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(23)


def hidden(model, ids):
    """The last hidden states."""
    with torch.no_grad():
        return model.eval()(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1].float()


def close(found, wanted):
    assert wanted.isfinite().all()
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5


def imported(base, adapter, out, **more):
    return moeforge.load(
        str(run("attach", base, out, method="import", adapter=str(adapter), **more).path), dtype="float32"
    )


def dense(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("first", [False, True], ids=["today", "first-names"])
def test_mixlora_is_what_its_package_computes(base, tmp_path, first):
    package = pytest.importorskip("mixlora.model", reason="the mixlora package is not installed")
    from mixlora.config import MixLoraConfig

    torch.manual_seed(7)
    tensors = foreign.mixlora(base)
    settings = foreign.mixlora_settings(base, act_fn="silu")
    config = MixLoraConfig.from_config(settings)
    config.adapter_name_, config.dtype_ = "default", torch.float32
    theirs = dense(base)
    package.inject_adapter_in_model(theirs, config.check(), tensors)
    for layer in theirs.model.layers:  # the package keeps its experts where eval() does not reach their dropout
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    if first:
        torch.manual_seed(7)
        tensors = foreign.mixlora(base, first=True)
        targets = [*foreign.ATTENTION, "w1_proj", "w2_proj", "w3_proj"]
        settings |= {"routing_strategy": "mixtral", "target_modules": targets}
    adapter = foreign.save(tmp_path / "a", settings, tensors, pickled=True)
    ours = imported(base, adapter, tmp_path / "out", allow_pickle=True)
    ids = torch.randint(90, (3, 17))
    wanted = hidden(theirs, ids)
    close(hidden(ours, ids), wanted)
    assert (hidden(dense(base), ids) - wanted).norm() / wanted.norm() > 1e-2


def lora(base, out, **config):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(dense(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    wrapped.save_pretrained(out)
    return wrapped.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_by_itself_is_pefts(base, tmp_path, dora):
    theirs = lora(base, tmp_path / "a", r=5, lora_alpha=9, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=dora,
                  rank_pattern={"layers.1.self_attn.q_proj": 3})  # fmt: skip
    ids = torch.randint(90, (2, 13))
    close(hidden(imported(base, tmp_path / "a", tmp_path / "out"), ids), hidden(theirs, ids))


def test_a_forced_frozen_expert_is_its_peft_lora(base, tmp_path):
    made = {
        "a": lora(base, tmp_path / "a", r=3, lora_alpha=9, target_modules=["q_proj", "v_proj"]),
        "b": lora(base, tmp_path / "b", r=6, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj", "o_proj"]),
    }  # fmt: skip
    refs = tuple(f"{name}={tmp_path / name}" for name in made)
    out = run("attach", base, tmp_path / "out", method="lora-mixer", experts_from=refs)
    ours = moeforge.load(str(out.path), dtype="float32")
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "lora_" in name)
    ids = torch.randint(90, (2, 13))
    for number, theirs in enumerate(made.values()):
        with forced(ours, number):
            close(hidden(ours, ids), hidden(theirs, ids))


@pytest.mark.parametrize("method", ["import", "lora-mixer"])
def test_conforms(base, tmp_path, method):
    lora(base, tmp_path / "a", r=3, target_modules=["q_proj", "v_proj"])
    lora(base, tmp_path / "b", r=2, target_modules=["q_proj"])
    words = ["--adapter", tmp_path / "a"]
    if method == "lora-mixer":
        words = ["--experts-from", f"a={tmp_path / 'a'}", "--experts-from", f"b={tmp_path / 'b'}*0.5"]
    check_stage("attach", base, words, tmp_path / "scratch", method=method)


def test_a_loras_provenance_and_table_are_written_down(base, tmp_path):
    lora(base, tmp_path / "a", r=3, lora_alpha=6, target_modules=["q_proj"])
    out = run(
        "attach", base, tmp_path / "out", method="custom", experts_from=(f"a={tmp_path / 'a'}*0.5",), verify=False
    )
    (row,) = json.loads((out.path / "adapter_config.json").read_text())["experts"]
    data = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    assert (
        row["sha256"] == hashlib.sha256(data).hexdigest()
        and row["source"] == str(tmp_path / "a")
        and row["weight"] == 0.5
    )
    (found,) = out.manifest["facts"]["imported"]
    assert (found["rank"], found["scale"], found["sites"]) == ([3], [1.0], ["q"])


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"experts_from": ("a",)}, "expected NAME=REF"),
        ({"experts_from": ("a=x*y",)}, "expected NAME=REF"),
        ({"experts_from": ("a={a}",), "top_k": 2}, "--top-k 2"),
        ({"experts_from": ("a={a}",), "experts": "3"}, "--experts 3"),
        ({"experts_from": ("a={a}",), "drop": ("lora",)}, "--drop lora"),
        ({"experts_from": ("a=no/such/place",)}, "no such directory"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_line(base, tmp_path, more, word):
    lora(base, tmp_path / "a", r=3, target_modules=["q_proj"])
    given = {
        key: tuple(v.format(a=tmp_path / "a") for v in value) if isinstance(value, tuple) else value
        for key, value in more.items()
    }
    with pytest.raises(MoeforgeError) as caught:
        run("attach", base, tmp_path / "out", method="lora-mixer", **given)
    assert word in str(caught.value) and "\n" not in str(caught.value)


FETCH = """
import sys
from moeforge.checkpoint.lora_formats.locate import locate
found = locate(sys.argv[1])
print(found.revision, found.origin()["license"], sorted(found.tensors)[0])
"""


def test_a_lora_on_the_hub(base, tmp_path):
    lora(base, tmp_path / "a", r=3, target_modules=["q_proj"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir() if path.name.startswith("adapter_")}
    card = b"---\nlicense: mit\n---\n"
    with HubServer() as hub:
        commit = hub.put("someone/lora", {**files, "README.md": card, "optimizer.pt": b"x" * 99})
        given = {
            **os.environ,
            **hub.environment(tmp_path / "home"),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        told = subprocess.run(
            [sys.executable, "-c", FETCH, "someone/lora"], capture_output=True, text=True, env=given, timeout=120
        )
    assert told.stdout.split() == [commit, "mit", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], (
        told.stderr
    )
    assert not list((tmp_path / "home").rglob("optimizer.pt"))
