"""Configs that disagree with their tensors, or that make no sense at all: refused in the plan, whatever they say."""

import json
import math
import os
import random
import shutil

import pytest

from moeforge.checkpoint import architectures, open_checkpoint
from moeforge.errors import BadInput, MoeforgeError
from moeforge.pipeline.artifact import Artifact
from moeforge.testing import inprocess
from moeforge.testing.models import FAMILIES
from moeforge_upcycle import pairs
from moeforge_upcycle.dense import examine

BIASED = {"attention_bias": True, "mlp_bias": True, "use_bias": True}


def biased(model_type):
    """The options that give a family every bias it can have."""
    return {key: value for key, value in BIASED.items() if key in architectures.find(model_type).when.values()}


def planned(directory):
    """A checkpoint's config and headers, free to be changed."""
    with open_checkpoint(str(directory)) as source:
        return {
            "config": dict(source.config),
            "tensors": {info.name: [info.dtype, list(info.shape)] for info in source.tensors.values()},
        }


def opened(plan):
    return open_checkpoint("-", plan=plan)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_role_has_the_shape_that_the_config_gives_it(model_type, dense):
    """One dimension of one tensor at a time is off by one: the refusal names the tensor, both shapes and the deciding keys."""
    whole = planned(dense(model_type, **{"tie_word_embeddings": False, **biased(model_type)}))
    _, settings, parent = examine(opened(whole))
    checked = set()
    for (role, layer), part in parent.parts.items():
        if layer not in (None, 1):
            continue
        for axis, size in enumerate(part.sizes):
            dtype, shape = whole["tensors"][part.name]
            wrong = [n + (i == axis) for i, n in enumerate(shape)]
            with pytest.raises(BadInput) as refusal:
                examine(opened({**whole, "tensors": {**whole["tensors"], part.name: [dtype, wrong]}}))
            said = str(refusal.value)
            assert f"{part.name} has shape {wrong}" in said
            assert f"of shape {shape}" in said
            for key in size.split(" * "):
                assert f"{key} = {settings[key]}" in said
            checked.add((role, axis))
    assert {
        ("embed", 0),
        ("head", 0),
        ("norm", 0),
        ("q", 0),
        ("k", 0),
        ("v", 0),
        ("o", 1),
        ("gate", 0),
        ("down", 1),
    } <= checked


@pytest.mark.parametrize("model_type", [source for source in sorted(FAMILIES) if pairs.load(source)[0]])
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"])  # fmt: skip
def test_a_config_of_other_sizes_plans_nothing(model_type, key, dense):
    whole = planned(dense(model_type))
    _, settings, _ = examine(opened(whole))
    config = {**whole["config"], "head_dim": settings["head_dim"], key: 2 * settings[key]}
    request = inprocess.request("upcycle", "copy", {})
    with pytest.raises(BadInput, match=f"{key} = "):
        request.stage.plan(Artifact("plan", "-", plan={**whole, "config": config}), request.options, request.method)


ODD = {
    "rope_scaling": ["linear", 2.0, ["linear"], True],
    "rope_parameters": ["default", 3],
    "rope_theta": ["1e4", 0, -1.0, math.nan],
    "layer_types": ["full_attention", 3, ["full_attention"], ["full_attention"] * 4, ["full_attention", "chunked_attention", 1], {"0": "full_attention"}],
    "num_key_value_heads": ["2", 1.5, -2, [2], True],
    "head_dim": ["16", 16.0, -16, True],
    "num_hidden_layers": [3_000_000, 10**30, 3.0],
    "attention_bias": ["no", 0],
    "rms_norm_eps": ["1e-6", math.inf],
    "tie_word_embeddings": ["false"],
    "eos_token_id": ["</s>", [1, "2"]],
    "max_position_embeddings": ["4k", 0],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ODD.items() for value in values])
def test_a_value_of_the_wrong_kind_is_named(key, value, dense):
    whole = planned(dense("llama"))
    whole["config"].pop("rope_parameters")
    with pytest.raises(BadInput, match=rf"config\.json: {key}"):
        examine(opened({**whole, "config": {**whole["config"], key: value}}))


def test_more_heads_than_width(dense):
    whole = planned(dense("llama"))
    config = {**whole["config"], "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": None}
    with pytest.raises(BadInput, match="num_attention_heads = 128 is more than hidden_size = 64"):
        examine(opened({**whole, "config": config}))


@pytest.mark.parametrize(
    ("model_type", "config", "said"),
    [
        ("smollm3", {"no_rope_layers": [1, 1]}, "no_rope_layers is 2 entries"),
        ("smollm3", {"no_rope_layers": [1, 1, 2]}, r"no_rope_layers\[2\] = 2; expected 0 or 1"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval = 0"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": None}, "no_rope_layer_interval = null"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 0}, "sliding_window_pattern = 0"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": None}, "sliding_window_pattern = null"),
        ("qwen2", {"layer_types": None, "use_sliding_window": True, "max_window_layers": None}, "max_window_layers = null"),
        ("mistral", {"sliding_window": "4096"}, "sliding_window = '4096'"),
    ],
)  # fmt: skip
def test_what_alternates_from_layer_to_layer(model_type, config, said, dense):
    whole = planned(dense(model_type))
    with pytest.raises(BadInput, match=said):
        examine(opened({**whole, "config": {**whole["config"], "sliding_window": 8, **config}}))


ANYTHING = [None, True, -1, 0, 1, 3, 1.5, 3_000_000, 10**30, math.nan, -math.inf, "", "x", "4", "yarn", [], [1], ["x"], {}, {"a": 1}, {"type": "su"}, [None, {}]]  # fmt: skip


def mutated(config, rng):
    """`config` with one or two values, at any depth, gone or replaced by anything."""
    made = json.loads(json.dumps(config))
    for _ in range(rng.choice((1, 1, 2))):
        table = made
        tables = [value for value in made.values() if isinstance(value, dict) and value]
        if tables and rng.random() < 0.25:
            table = rng.choice(tables)
        key = rng.choice([*sorted(table), "rope_scaling", "head_dim", "layer_types", "sliding_window"])
        if rng.random() < 0.15:
            table.pop(key, None)
        else:
            table[key] = rng.choice(ANYTHING)
    return made


@pytest.mark.parametrize("model_type", ["llama", "phi3", "qwen2", "qwen3", "cohere2", "smollm3", "granite", "ernie4_5", "gemma3_text"])  # fmt: skip
def test_no_config_crashes_the_command(model_type, dense, tmp_path):
    """Sixty damaged configs a family: each is converted or refused in one line, and a refusal leaves nothing behind."""
    rng = random.Random(model_type)
    config = json.loads((dense(model_type) / "config.json").read_text())
    refused = 0
    for index in range(60):
        source, out = tmp_path / f"source{index}", tmp_path / f"out{index}"
        source.mkdir()
        os.link(dense(model_type) / "model.safetensors", source / "model.safetensors")
        damaged = mutated(config, rng)
        (source / "config.json").write_text(json.dumps(damaged))
        try:
            inprocess.run("upcycle", source, out, experts=2, verify=False)
        except MoeforgeError as error:
            refused += 1
            assert "\n" not in str(error)
            assert not out.exists(), damaged
            assert not out.with_name(out.name + ".partial").exists(), damaged
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}: from {damaged}") from error
        shutil.rmtree(source)
    assert refused > 10
