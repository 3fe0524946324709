"""The families' data against the transformers classes that it describes."""

import json

import pytest
from safetensors import safe_open

from moeforge.checkpoint import architectures
from moeforge.checkpoint.family import REQUIRED
from moeforge.errors import BadInput
from moeforge.testing.models import FAMILIES, OTHERS, tiny_dense

BIASED = {"attention_bias": True, "mlp_bias": True, "use_bias": True}


def names(family, config):
    return {part.name for part in family.locate(family.resolve(config)).values()}


def check_names(directory, model_type, head=None, **overrides):
    """Described and saved names are the same, but for the tensors of heads."""
    family = architectures.find(model_type)
    model, config = tiny_dense(model_type, 0, head, **overrides)
    model.save_pretrained(directory)
    family = family.of_class(config.to_dict())
    with safe_open(directory / "model.safetensors", "np") as file:
        saved = {name for name in file.keys() if not family.is_ignored(name)}  # noqa: SIM118 - no mapping
    assert {name for name in saved if not family.belongs(name)} == names(family, config.to_dict())
    assert type(model).__name__ in family.classes
    return saved, family


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False, **BIASED}])
@pytest.mark.parametrize("model_type", sorted({**FAMILIES, **OTHERS}))
def test_names_are_those_that_the_stock_class_writes(model_type, overrides, tmp_path):
    family = architectures.find(model_type)
    overrides = {key: value for key, value in overrides.items() if key not in BIASED or key in family.when.values()}
    if family.kind == "vision":
        overrides = {}
    check_names(tmp_path, model_type, **overrides)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "num_kv_heads": 4}),
        ("falcon", {"parallel_attn": False, "multi_query": False, "alibi": True}),
        ("falcon", {"ffn_hidden_size": None, "bias": False}),
        ("gpt2", {"n_inner": None}),
        ("gpt_neox", {"attention_bias": False, "use_parallel_residual": False}),
        ("phi", {"qk_layernorm": True}),
        ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 4}),
        ("vit", {"qkv_bias": False}),
    ],
)
def test_names_follow_what_the_config_says(model_type, overrides, tmp_path):
    check_names(tmp_path, model_type, **overrides)


@pytest.mark.parametrize(("model_type", "head"), [(model_type, head) for model_type in ("bert", "roberta", "vit", "dinov2")
                                                  for head in architectures.find(model_type).heads])  # fmt: skip
def test_every_head_is_known_by_the_names_of_its_tensors(model_type, head, tmp_path):
    saved, family = check_names(tmp_path, model_type, head)
    others = [name for name in saved if not family.belongs(name) and family.is_another_head(name)]
    assert others == []
    patterns = next(iter(family.heads.values()))
    assert next(iter(family.heads)) == head
    for pattern in patterns:
        assert any(family._matches(name, [pattern]) for name in saved), pattern


@pytest.mark.parametrize("model_type", sorted({**FAMILIES, **OTHERS}))
def test_defaults_are_those_of_the_stock_class(model_type):
    """A config.json may leave out whatever has a default: then ours must be the one that transformers takes."""
    from transformers import AutoConfig

    family, stock = architectures.find(model_type), AutoConfig.for_model(model_type)
    given = {key: getattr(stock, key) for key in family.required if key not in family.derived}
    found = family.resolve(given | {"model_type": model_type})
    for key in family.settings:
        if hasattr(stock, key) and key not in ("rope_theta", "partial_rotary_factor", "head_dim"):
            wanted = getattr(stock, key)
            if key == "sliding_window" and not getattr(stock, "use_sliding_window", True):
                continue  # the class nulls it, we look at use_sliding_window instead
            ours = {own: name for name, own in family.keys.items()}.get(key, key)
            assert found[ours] == wanted or (wanted is None and ours in family.derived), key
    assert found["layer_types"] == (getattr(stock, "layer_types", None) or ["full_attention"] * stock.num_hidden_layers)
    if hasattr(stock, "head_dim"):
        assert found["head_dim"] == stock.head_dim
    if model_type != "gemma3_text" and getattr(stock, "rope_parameters", None):  # two bases, in nested tables
        assert found["rope"]["rope_theta"] == stock.rope_parameters["rope_theta"]


def test_fused_rows_follow_the_heads():
    """Phi-3 stores q, k, v one after the other: with shared key-value heads these are no thirds."""
    family = architectures.find("phi3")
    config = tiny_dense("phi3")[1].to_dict()
    parts = family.locate(family.resolve(config))
    assert [parts[role, 1].rows for role in "qkv"] == [slice(0, 64), slice(64, 96), slice(96, 128)]
    assert parts["gate", 0].rows == slice(0, 96)
    assert parts["up", 0].rows == slice(96, 192)
    assert parts["gate", 0].name == parts["up", 0].name == "model.layers.0.mlp.gate_up_proj.weight"


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        ),
        (
            {
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6},
                "max_position_embeddings": 128,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e6,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 128,
            },
        ),
    ],
)
def test_rope_is_read_in_both_dialects(written, wanted):
    sizes = dict.fromkeys(REQUIRED, 4)
    assert architectures.find("llama").resolve({**sizes, **written})["rope"] == wanted


def test_unknown_families_and_damaged_configs_are_refused():
    with pytest.raises(BadInput, match="model_type = 'mamba' is not a dense family"):
        architectures.architecture({"model_type": "mamba"})
    with pytest.raises(BadInput, match="model_type = 'mixtral', num_local_experts = 4: this is already a mixture"):
        architectures.architecture({"model_type": "mixtral", "num_local_experts": 4})
    with pytest.raises(BadInput, match="model_type = None"):
        architectures.architecture({})
    with pytest.raises(BadInput, match="not a dense family"):
        architectures.find("../../etc/passwd")
    family, sizes = architectures.find("llama"), dict.fromkeys(REQUIRED, 4)
    for value in (None, 0, -1, "4", True):
        with pytest.raises(BadInput, match="hidden_size = "):
            family.resolve({**sizes, "hidden_size": value})
    with pytest.raises(BadInput, match="num_key_value_heads = 3"):
        family.resolve({**sizes, "num_key_value_heads": 3})


def test_keys_nobody_looked_at_are_named():
    family = architectures.find("llama")
    assert family.unknown_keys(tiny_dense("llama")[1].to_dict()) == []
    assert family.unknown_keys({"vocab_size": 1, "value_residual": True, "_private": 1}) == ["value_residual"]


def test_a_third_party_adds_a_family(tmp_path, monkeypatch):
    described = tmp_path / "newlm.json"
    described.write_text(json.dumps({"model_type": "newlm", "like": "llama", "settings": {"rms_norm_eps": 1e-3}}))

    class Point:
        name, dist = "newlm", None

        def load(self):
            return described

    monkeypatch.delenv("MOEFORGE_PLUGINS", raising=False)
    monkeypatch.setattr(architectures.metadata, "entry_points", lambda group: [Point()])
    try:
        family = architectures.find("newlm")
    finally:
        architectures.find.cache_clear()
    assert family.settings["rms_norm_eps"] == 1e-3
    assert family.layer_tensors["gate"] == "mlp.gate_proj.weight"


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        ("cohere2", {"sliding_window": 8}),
        ("gemma2", {"sliding_window": 8}),
        ("gemma3_text", {"sliding_window": 8}),
        ("exaone4", {"sliding_window": 8}),
        ("smollm3", {"no_rope_layer_interval": 3}),
    ],
)
def test_layer_kinds_that_an_old_config_leaves_out(model_type, config):
    """Configs written before transformers 4.53 have no layer_types: they follow from other keys, differently in each family."""
    from transformers import AutoConfig

    config = {"num_hidden_layers": 7, **config}
    stock, family = AutoConfig.for_model(model_type, **config), architectures.find(model_type)
    found = family.resolve({key: getattr(stock, key) for key in REQUIRED} | config)
    assert found["layer_types"] == stock.layer_types
    assert found.get("no_rope_layers") == getattr(stock, "no_rope_layers", None)
