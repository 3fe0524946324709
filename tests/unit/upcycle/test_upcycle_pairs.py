"""Every pair and every exact method: the stock class of the target computes what the stock dense class computes."""

import json

import pytest

from moeforge.testing.models import FAMILIES
from moeforge_upcycle import pairs, targets

SOURCES = [source for source in sorted(FAMILIES) if pairs.load(source)[0]]
ALL = [(source, pair.target.model_type) for source in SOURCES for pair in pairs.load(source)[0]]
WAYS = {
    "copy": ("copy", {}),
    "split 2": ("split", {"granularity": 2, "experts": 6, "top_k": 4}),
    "split 4": ("split", {"granularity": 4, "experts": 8, "top_k": 4, "partition": "random", "scale": "split"}),
    "shared": ("shared", {"rank": "norm"}),
    "shared 1+3": ("shared", {"rank": "random", "granularity": 3, "experts": 6, "top_k": 3, "partition": "kmeans"}),
    "last half": ("copy", {"layers": "last-half"}),
}


def can(target, way):
    """Whether the layout has what this way of upcycling needs."""
    layout = targets.load(target)
    if way.startswith("shared"):
        return layout.shared is not None
    return way != "last half" or layout.sparse != "all"


CASES = [(source, target, way) for source, target in ALL for way in WAYS if can(target, way)]


def test_the_sixteen_pairs_are_there():
    named = """llama mixtral, mistral mixtral, phi3 mixtral, smollm3 mixtral, qwen2 qwen2_moe, llama qwen2_moe, qwen3 qwen3_moe,
    qwen3 dots1, qwen3 glm4_moe, llama glm4_moe, qwen2 glm4_moe, olmo2 flex_olmo, granite granitemoe, granite granitemoeshared,
    llama granitemoe, cohere2 cohere2_moe, ernie4_5 ernie4_5_moe"""
    assert {tuple(pair.split()) for pair in named.split(",")} <= set(ALL)


@pytest.mark.parametrize(("source", "target", "way"), CASES)
def test_same_function(source, target, way, dense, upcycle, compare):
    method, options = WAYS[way]
    src = dense(source)
    done = upcycle(src, method, target=target, **options)
    found = compare(src, done.path)
    assert found.loading == {}
    assert found.model_class == targets.load(target).architecture
    assert found.error <= 1e-5
    assert found.argmax
    assert done.manifest["verdicts"]["exact"] is True


LOOSE = {
    "noise": {},
    "drop": {},
    "carve": {"partition": "random", "router": "stage", "experts": 4},
    "btx": {},
}
"""Methods that change the function, none of them on text."""


@pytest.mark.parametrize("method", LOOSE)
@pytest.mark.parametrize(("source", "target"), ALL)
def test_every_other_method_fills_every_layout(source, target, method, dense, upcycle, compare):
    """Nothing missing, nothing left over, finite logits in the stock class; and what is announced as inexact is."""
    src, options = dense(source), dict(LOOSE[method])
    if method == "btx":
        options |= {"experts": 2, "expert": (str(dense(source, seed=1)),)}
    done = upcycle(src, method, target=target, **options)
    found = compare(src, done.path)
    assert found.loading == {}
    assert found.model_class == targets.load(target).architecture
    assert done.manifest["verdicts"]["exact"] is False
    assert found.error > 1e-4


VARIANTS = {
    "llama: tied, wide heads, llama3 rope": (
        "llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "llama: no shared kv heads, gelu": (
        "llama",
        {"num_key_value_heads": 4, "hidden_act": "gelu", "rms_norm_eps": 1e-2},
    ),
    "mistral: window": ("mistral", {"sliding_window": 8}),
    "phi3: window, odd heads": ("phi3", {"sliding_window": 8, "num_key_value_heads": 1}),
    "qwen2: window on the last layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3: biases, tied": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3: window on the last layers": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "olmo2: biases": ("olmo2", {"attention_bias": True}),
    "granite: biases, tied": ("granite", {"attention_bias": True, "tie_word_embeddings": True}),
    "cohere2: biases": ("cohere2", {"attention_bias": True}),
    "ernie: theta": ("ernie4_5", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "smollm3: all layers rope": ("smollm3", {"no_rope_layers": [1, 1, 1], "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_config_can_say_survives(variant, dense, upcycle, compare):
    """The default target of each variant is exact: windows, biases, rope scaling, tied heads pass through."""
    source, overrides = VARIANTS[variant]
    src = dense(source, **overrides)
    done = upcycle(src)
    found = compare(src, done.path)
    assert (found.loading, found.argmax) == ({}, True)
    assert found.error <= 1e-5


@pytest.mark.parametrize(("source", "target"), ALL)
def test_old_readers_find_their_keys(source, target, dense, upcycle):
    """transformers 4 and C++ readers know rope_theta and torch_dtype only; without them they fall back to defaults."""
    done = upcycle(dense(source), target=target)
    config = json.loads((done.path / "config.json").read_text())
    stock = json.loads((dense(source) / "config.json").read_text())
    theta = stock["rope_parameters"]["rope_theta"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == theta
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["architectures"] == [targets.load(target).architecture]


@pytest.mark.parametrize(
    ("source", "target"), [("llama", "mixtral"), ("qwen3", "glm4_moe"), ("granite", "granitemoeshared")]
)
def test_save_pretrained_writes_the_same_names(source, target, dense, upcycle, tmp_path):
    """What we write is what transformers itself would write for this architecture."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    def names(directory):
        with safe_open(directory / "model.safetensors", "np") as file:
            return set(file.keys())

    done = upcycle(dense(source), target=target)
    AutoModelForCausalLM.from_pretrained(done.path).save_pretrained(tmp_path / "again")
    assert names(tmp_path / "again") == names(done.path)
