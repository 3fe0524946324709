"""`show` and `verify` on what the real verbs wrote."""

import json
import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from moeforge.errors import BadInput, ExitCode, MoeforgeError
from moeforge.options import format_bytes
from moeforge.testing import inprocess
from moeforge.testing.command import run
from moeforge.testing.models import save_tiny
from moeforge.testing.mutations import manifest_changed
from moeforge_inspect import lineage
from moeforge_inspect.lineage import open_parent
from moeforge_inspect.show import Show
from moeforge_inspect.verify import Verify


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("dense"), "llama")


@pytest.fixture(scope="module")
def mixture(dense, tmp_path_factory):
    """Written by the command itself, in several shards, not proven."""
    out = tmp_path_factory.mktemp("made") / "mixture"
    run(
        "upcycle",
        dense,
        "--experts",
        4,
        "--top-k",
        2,
        "--no-verify",
        "--max-shard-size",
        "200KB",
        "-o",
        out,
        check=True,
    )
    return out


@pytest.fixture
def copy(mixture, tmp_path):
    """One to damage."""
    return shutil.copytree(mixture, tmp_path / "copy")


def test_show_tells_what_is_in_it(ask, mixture, dense):
    answer = ask(Show, mixture, tensors=True)
    data = answer.data
    assert data["architectures"] == ("MixtralForCausalLM",) and data["layers"] == 3
    (found,) = data["mixtures"]
    assert (found["experts"], found["top_k"], found["width"], found["layers"]) == (4, 2, 96, (0, 1, 2))
    assert data["parameters_total"] - data["parameters_active"] == 3 * 2 * 3 * 64 * 96
    assert data["tensors"] == len(data["tensor_list"]) and data["files"]["config.json"] > 0
    assert data["lineage"]["verb"] == "upcycle" and data["lineage"]["parents"][0]["ref"] == str(dense)
    assert "3 layers (0-2): 4 experts, 2 active, width 96" in answer.text
    assert "model.layers.2.block_sparse_moe.experts.3.w2.weight" in answer.text
    assert f"from {dense}" in answer.text and "experts 4" in answer.text


def test_show_of_a_foreign_directory_and_of_a_plan(ask, dense):
    answer = ask(Show, dense)
    assert "lineage" not in answer.data and answer.data["parameters_active"] == answer.data["parameters_total"]
    planned = run("upcycle", dense, "--experts", 4, "--top-k", 2, "--dry-run", check=True)
    told = run("show", "--json", stdin=planned.out)
    assert told.code == 0 and told.reference["mixtures"][0]["experts"] == 4


def test_lineage_survives_the_parents(ask, copy):
    """A grandchild's manifest carries both steps; unknown verbs show all their options."""
    body = json.loads((copy / "moeforge.json").read_text())
    child = {**body, "verb": "prune-x", "method": None, "options": {"keep": 3}, "method_options": {}, "verdicts": {},
             "parents": [{"ref": "gone", "license": "mit", "manifest": body}]}  # fmt: skip
    step = lineage.lineage(child)
    assert lineage.licence(step) == "mit"
    lines = list(lineage.describe(step))
    assert lines[0] == "  prune-x: keep 3" and lines[1].startswith("    upcycle copy: experts 4")
    assert lines[2].startswith("      from ")


def test_verify_a_whole_artifact(ask, mixture):
    answer = ask(Verify, mixture)
    assert answer.exit_code == ExitCode.OK and answer.data["problems"] == []
    assert answer.data["proof"]["exact"] and answer.data["proof"]["relative_error"] <= 1e-5
    assert len(answer.data["checked"]) == 4 and answer.text.endswith("is whole")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_verify_names_the_file_and_the_tensor(ask, copy):
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.self_attn.o_proj.weight"
    file = copy / index[name]
    head = int.from_bytes(file.read_bytes()[:8], "little")
    begin, _ = json.loads(file.read_bytes()[8 : 8 + head])[name]["data_offsets"]
    flip(file, 8 + head + begin + 5)
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.GATE
    (problem,) = answer.data["problems"]
    assert problem.startswith(index[name]) and problem.endswith(f"changed: {name}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_verify_sees_any_byte(ask, copy, name):
    flip(copy / name, 9)
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.GATE and answer.data["problems"][0].startswith(name)


def test_verify_sees_missing_extra_and_edited(ask, copy):
    first = sorted(copy.glob("*.safetensors"))[0]
    held = first.read_bytes()
    first.unlink()
    assert ask(Verify, copy).data["problems"] == [f"{first.name}: missing"]
    first.write_bytes(held)
    (copy / "more.safetensors").write_bytes(held)
    assert ask(Verify, copy).data["problems"] == ["more.safetensors: not in the manifest"]
    (copy / "more.safetensors").unlink()
    assert ask(Verify, copy).exit_code == ExitCode.OK
    body = json.loads((copy / "moeforge.json").read_text())
    body["digest"] = "sha256:" + "0" * 64
    (copy / "moeforge.json").write_text(json.dumps(body))
    assert "it was edited" in ask(Verify, copy).data["problems"][0]


def test_verify_without_a_manifest_checks_completeness(ask, copy):
    (copy / "moeforge.json").unlink()
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.OK and "no moeforge.json" in answer.data["skipped"][0]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    assert "missing" in ask(Verify, copy).data["problems"][0]
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "nobody-knows"}))
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.OK and any("nobody-knows" in text for text in answer.data["skipped"])


def test_verify_says_what_it_could_not_prove(ask, copy):
    reparent(copy, ref=str(copy / "gone"))
    assert "cannot be opened" in ask(Verify, copy).data["skipped"][0]
    assert ask(Verify, copy, proof=False).data["skipped"] == []


def test_verify_foresees_the_memory_of_the_proof_as_upcycle_does(ask, copy, dense, monkeypatch):
    from moeforge.model import memory

    phases = inprocess.plan("upcycle", dense, experts=4, top_k=2, verify=True).facts["peak_memory_by_phase_bytes"]
    enough = math.ceil(phases["proof"] * 4 / 3)
    monkeypatch.setattr(memory, "available_memory", lambda: enough)
    assert ask(Verify, copy).data["skipped"] == []
    monkeypatch.setattr(memory, "available_memory", lambda: enough - 2)
    wanted = f"equality: the proof takes {format_bytes(phases['proof'])} of memory, more than is free"
    assert ask(Verify, copy).data["skipped"] == [wanted]


def reparent(directory, **changes):
    """Edit what the manifest says of the parent."""
    body = json.loads((directory / "moeforge.json").read_text())
    body["parents"][0] |= changes
    (directory / "moeforge.json").write_text(json.dumps(body))


def test_a_parent_with_other_times_is_proven_and_another_one_is_told(ask, copy, dense, tmp_path):
    other = shutil.copytree(dense, tmp_path / "other")
    reparent(copy, ref=str(other))
    os.utime(other / "model.safetensors", (1, 1))
    answer = ask(Verify, copy)
    assert answer.data["proof"]["exact"] and answer.data["skipped"] == []
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = -weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors")
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.OK and "it changed since" in answer.data["skipped"][0]
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.OK and "it changed since" in answer.data["skipped"][0]


def test_a_parent_on_the_hub_is_no_fault_of_a_machine_that_is_offline(copy, tmp_path):
    reparent(copy, ref="org/gone", revision="0" * 40)
    offline = run("verify", copy, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")})
    assert offline.code == 0 and "cannot be opened: org/gone" in offline.out, offline.out + offline.err


def test_parents_are_opened_as_they_were_then(dense, tmp_path):
    """Quantised as recorded; pickled only for who says so now, as the manifest may be a stranger's."""
    weights = load_file(dense / "model.safetensors")
    pickled = shutil.copytree(dense, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({name: torch.from_numpy(value) for name, value in weights.items()}, pickled / "pytorch_model.bin")
    quantised = shutil.copytree(dense, tmp_path / "quantised")
    rng, stem = np.random.default_rng(5), "model.layers.0.mlp.down_proj"
    shape = weights[f"{stem}.weight"].shape
    weights[f"{stem}.weight"] = rng.integers(-127, 128, shape).astype(np.int8)
    weights[f"{stem}.SCB"] = rng.uniform(0.1, 0.2, shape[0]).astype(np.float32)
    save_file(weights, quantised / "model.safetensors")
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (quantised / "config.json").write_text(json.dumps(config))
    words = ("--experts", 2, "--top-k", 1, "--no-verify", "-o")
    run("upcycle", pickled, "--allow-pickle", *words, tmp_path / "a", check=True)
    run("upcycle", quantised, "--dequantize", *words, tmp_path / "b", check=True)
    told = run("verify", tmp_path / "a", "--json", check=True).reference
    assert "--allow-pickle" in told["skipped"][0]
    assert run("verify", tmp_path / "a", "--json", "--allow-pickle", check=True).reference["proof"]["exact"]
    assert run("verify", tmp_path / "b", "--json", check=True).reference["proof"]["exact"]
    refused = run("verify", pickled, "--json").reference
    assert not refused["ok"] and "--allow-pickle" in refused["problems"][0]
    assert run("verify", pickled, "--json", "--allow-pickle", check=True).reference["ok"]


def test_a_broken_promise_is_found(ask, copy):
    """The files are what the manifest says, but they are not the function that it promises."""
    from moeforge.checkpoint.digest import artifact_digest, file_digest

    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    file = copy / index[name]
    data = bytearray(file.read_bytes())
    head = int.from_bytes(data[:8], "little")
    begin, end = json.loads(bytes(data[8 : 8 + head]))[name]["data_offsets"]
    data[8 + head + begin : 8 + head + end] = bytes(end - begin)
    file.write_bytes(data)
    body = json.loads((copy / "moeforge.json").read_text())
    body["files"][file.name]["digest"] = file_digest(file)
    body["digest"] = artifact_digest({key: info["digest"] for key, info in body["files"].items()})
    (copy / "moeforge.json").write_text(json.dumps(body))
    answer = ask(Verify, copy)
    assert answer.exit_code == ExitCode.GATE
    assert "not the same function" in answer.data["problems"][0] and "layer 1" in answer.data["problems"][0]


def test_commands(mixture):
    assert run("verify", mixture, "--no-proof").code == 0
    assert run("verify", "org/name").code == ExitCode.BAD_INPUT
    assert run("show", "/nowhere/at/all").code == ExitCode.BAD_INPUT
    assert run("show", mixture, "--json").reference["kind"] == "checkpoint"


def test_show_of_a_hub_id_downloads_no_weights(dense, tmp_path):
    from moeforge.testing.hub_server import HubServer

    weights = (dense / "model.safetensors").read_bytes()
    with HubServer() as hub:
        commit = hub.put("org/tiny", {file.name: file.read_bytes() for file in dense.iterdir() if file.is_file()})
        told = run("show", "org/tiny", "--json", env=hub.environment(tmp_path / "home"))
    assert told.code == 0, told.err
    assert told.reference["revision"] == commit
    assert told.reference["parameters_total"] == run("show", dense, "--json").reference["parameters_total"]
    held = [
        file for file in (tmp_path / "home").rglob("*") if file.is_file() and file.stat().st_size >= len(weights) // 2
    ]
    assert held == []


def test_show_of_an_adapter_without_its_base(ask, tmp_path):
    (tmp_path / "lora").mkdir()
    body = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(tmp_path / "gone"),
    }
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(body))
    answer = ask(Show, tmp_path / "lora")
    assert (
        answer.data["adapter"]["r"] == 4 and "base_unreadable" in answer.data and "target modules q_proj" in answer.text
    )


@pytest.mark.parametrize("query", [Show, Verify])
def test_a_strangers_manifest_ends_in_an_answer_or_in_one_line(ask, mixture, tmp_path, query):
    """150 mutated manifests, and every key left out once; each is read, or refused as bad input."""
    whole = json.loads((mixture / "moeforge.json").read_text())
    copy, answered = shutil.copytree(mixture, tmp_path / "copy"), 0
    for number in range(150 + len(whole)):
        if number < 150:
            (copy / "moeforge.json").write_text(json.dumps(whole))
            manifest_changed(random.Random(number), copy)
        else:
            lost = sorted(whole)[number - 150]
            (copy / "moeforge.json").write_text(json.dumps({k: v for k, v in whole.items() if k != lost}))
        try:
            ask(query, copy, **({"proof": False} if query is Verify else {}))
            answered += 1
        except MoeforgeError as error:
            assert error.exit_code == ExitCode.BAD_INPUT and str(error).isprintable()
    assert answered > 20


def test_a_parent_whose_name_is_too_long_for_a_file_is_bad_input():
    with pytest.raises(BadInput):
        open_parent({"ref": "x" * 5000, "revision": "main"}, {}, allow_pickle=False)
