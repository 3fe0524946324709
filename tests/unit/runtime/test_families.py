"""The same function with mixtures of copied experts, in memory and from disk, for every family."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig

from .conftest import FAMILIES, answer, auto_of, dense, inputs_of, mixed

SHAPES = {"gpt2": (128, "gelu_new", False, True), "phi3": (44, "silu", True, False), "llava": (44, "silu", True, True),
          "bert": (44, "gelu", False, True), "vit": (44, "gelu", False, True)}  # fmt: skip
"""Family -> (width, activation, gated, bias) of its network."""


def experts(family, **more):
    width, activation, gated, bias = SHAPES[family]
    return ExpertsConfig(**{"width": width, "activation": activation, "gated": gated, "bias": bias, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_copied_experts_compute_what_the_dense_network_does(family):
    wanted = answer(dense(family), **inputs_of(family))
    model = mixed(family)
    found = answer(model, **inputs_of(family))
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert len(model.mixtures) == 2
    changed = answer(mixed(family, scatter=0.1), **inputs_of(family))
    assert (changed - wanted).abs().max() > 1e-3 * wanted.abs().max(), "the mixtures take part"


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_model(family, tmp_path, written):
    model = mixed(family, scatter=0.1)
    wanted = answer(model, **inputs_of(family))
    model.save_pretrained(tmp_path / "a", max_shard_size="30KB")
    stock = auto_of(family).from_pretrained(tmp_path / "a")
    streamed = moeforge.load(str(tmp_path / "a"))
    for again in (stock, streamed):
        assert type(again) is type(model)
        assert torch.equal(answer(again, **inputs_of(family)), wanted)
    stock.save_pretrained(tmp_path / "b", max_shard_size="30KB")
    streamed.save_pretrained(tmp_path / "c", max_shard_size="30KB")
    assert len(written(tmp_path / "a")) > 3, "several shards"
    assert written(tmp_path / "a") == written(tmp_path / "b") == written(tmp_path / "c")


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("kind", ["kept", "shared", "lora_ffn", "lora"])
def test_what_stands_beside_the_experts_is_saved_under_dense_names(family, kind, tmp_path):
    plain = {"experts": ExpertsConfig(count=3)}
    entry = MixtureConfig(**{
        "kept": {**plain, "keep": True},
        "shared": {**plain, "shared": experts(family, width=10), "router": RouterConfig(bias=True)},
        "lora_ffn": {"layers": (1,), "experts": experts(family, type="lora_ffn", count=3, options={"rank": 4, "alpha": 8.0})},
        "lora": {"site": "down", "experts": ExpertsConfig(type="lora", count=3, options={"rank": 4})},
    }[kind])  # fmt: skip
    model = mixed(family, entry, scatter=0.1)
    wanted = answer(model, **inputs_of(family))
    model.save_pretrained(tmp_path / "mixed")
    for again in (auto_of(family).from_pretrained(tmp_path / "mixed"), moeforge.load(str(tmp_path / "mixed"))):
        assert torch.equal(answer(again, **inputs_of(family)), wanted)
    dense(family).save_pretrained(tmp_path / "dense")
    names, plain_names = (set(load_file(tmp_path / which / "model.safetensors")) for which in ("mixed", "dense"))
    if kind == "shared":
        without = {name.replace("shared_expert.", "") for name in names if "shared_expert." in name}
        assert without and without <= plain_names
    else:
        assert plain_names <= names, "the network that stays has the dense model's names"


def test_the_names_on_disk(tmp_path):
    roots = {
        "llama": "model.layers.0.mlp.experts.3.gate_proj.weight",
        "phi3": "model.layers.0.mlp.experts.3.gate_up_proj.weight",
        "gpt2": "transformer.h.0.mlp.experts.3.c_fc.weight",
        "bert": "bert.encoder.layer.0.experts.3.intermediate.dense.weight",
        "vit": "vit.encoder.layer.0.experts.3.intermediate.dense.weight",
        "opt": "model.decoder.layers.0.experts.3.fc1.weight",
        "llava": "language_model.model.layers.0.mlp.experts.3.gate_proj.weight",
    }
    for family, name in roots.items():
        mixed(family).save_pretrained(tmp_path / family)
        dense(family).save_pretrained(tmp_path / f"{family}-dense")
        tensors, plain = (load_file(tmp_path / which / "model.safetensors") for which in (family, f"{family}-dense"))
        root = name.partition(".experts.")[0]
        assert f"{root}.router.weight" in tensors
        assert torch.equal(tensors[name], plain[name.replace(".experts.3", "")]), "a copy, the way round it was"


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen", "one expert too few", "no router"])
def test_wrong_tensors_are_refused(damage, tmp_path):
    mixed("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    first = "model.layers.1.mlp.experts.2.up_proj.weight"
    if damage == "missing":
        del tensors[first]
    elif damage == "unexpected":
        tensors["model.layers.1.mlp.experts.2.side_proj.weight"] = torch.randn(3, 4)
    elif damage == "misshapen":
        tensors[first] = torch.randn(45, 32)
    elif damage == "one expert too few":
        tensors = {name: value for name, value in tensors.items() if ".1.mlp.experts.3." not in name}
    else:
        del tensors["model.layers.0.mlp.router.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"do(es)? not hold the weights|disagree"):
        moeforge.load(str(tmp_path))
    with pytest.raises((BadInput, RuntimeError, ValueError)):
        auto_of("llama").from_pretrained(tmp_path)


def test_a_body_is_loaded_from_a_model_with_a_head(tmp_path):
    import transformers

    model = mixed("llama", scatter=0.1)
    model.save_pretrained(tmp_path)
    body = transformers.AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**inputs_of("llama"), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(answer(body, **inputs_of("llama")), wanted)


def test_stock_transformers_refuses_the_checkpoint_until_moeforge_is_imported(tmp_path):
    """It must not be taken for the dense model."""
    mixed("llama").save_pretrained(tmp_path)
    code = f"""
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
except ValueError as error:
    print(error)
import moeforge
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model type `moeforge`" in done.stdout and "does not recognize this architecture" in done.stdout
    assert done.stdout.split()[-1] == "MoeforgeForCausalLM"


def test_importing_moeforge_is_enough_and_imports_no_torch(tmp_path):
    mixed("llama").save_pretrained(tmp_path)
    code = f"""
import sys, moeforge
assert not any(name in sys.modules for name in ("torch", "transformers"))
from transformers import AutoConfig, AutoModelForCausalLM
assert AutoConfig.from_pretrained({str(tmp_path)!r}).mixtures
print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "MoeforgeForCausalLM"


def test_the_dense_config_is_kept(tmp_path):
    mixed("gpt2").save_pretrained(tmp_path)
    dense("gpt2").save_pretrained(tmp_path / "dense")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "moeforge" and config["architectures"] == ["MoeforgeForCausalLM"]
    assert config["base_config"] == json.loads((tmp_path / "dense" / "config.json").read_text())


def test_the_config_may_be_the_first_thing_that_is_imported():
    """Its own import is what brings the Auto classes in, whose hook then meets a module that is not whole yet."""
    code = "from moeforge.model.config import MoeforgeConfig; import transformers; print(transformers.CONFIG_MAPPING['moeforge'].__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "MoeforgeConfig", done.stderr
