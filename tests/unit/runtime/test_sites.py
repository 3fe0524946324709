"""Sites are found by structure, on models without weights, or refused with what was found."""

import pytest
import torch
import transformers
from torch import nn

from moeforge.errors import BadInput
from moeforge.model.formulas import activation_beside, gated_formula
from moeforge.model.layout import stored_site
from moeforge.model.sites import find_sites, towers

from .conftest import SIZES, WORDS, auto_of, config_of, dense

FFN = {
    "llama": ("model.layers.1.mlp", "silu", ("gate", "up", "down"), True, False),
    "gemma": ("model.layers.1.mlp", "gelu_tanh", ("gate", "up", "down"), False, False),
    "phi3": ("model.layers.1.mlp", "silu", ("gate_up", "down"), False, False),
    "phi": ("model.layers.1.mlp", "gelu_tanh", ("up", "down"), True, False),
    "gpt2": ("transformer.h.1.mlp", "gelu_tanh", ("up", "down"), True, True),
    "gpt_neox": ("gpt_neox.layers.1.mlp", "gelu", ("up", "down"), True, False),
    "falcon": ("transformer.h.1.mlp", "gelu", ("up", "down"), False, False),
    "opt": ("model.decoder.layers.1", "relu", ("up", "down"), True, False),
    "bert": ("bert.encoder.layer.1", "gelu", ("up", "down"), True, False),
    "vit": ("vit.layers.1.mlp", "gelu", ("up", "down"), True, False),
    "dinov2": ("encoder.layer.1.mlp", "gelu", ("up", "down"), True, False),
    "llava": ("model.language_model.layers.1.mlp", "silu", ("gate", "up", "down"), True, False),
}


def on_meta(family, **more):
    config = config_of(family)
    for key, value in more.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return auto_of(family).from_config(config)


@pytest.mark.parametrize("family", FFN)
def test_a_feed_forward_network_is_recognised(family):
    sites = find_sites(on_meta(family))
    root, activation, roles, bias, transposed = FFN[family]
    assert [site.layer for site in sites] == [0, 1]
    site = sites[1]
    assert (site.root, site.activation, tuple(site.projections), site.bias) == (root, activation, roles, bias)
    assert (site.width, site.out_width) == (32, 32)
    assert site.gated == ("up" not in roles or "gate" in roles)
    assert all(p.transposed == transposed for p in site.projections.values())


def test_the_activation_is_the_modules_own_and_not_the_configs():
    """DINOv2's gated variant uses SiLU whatever hidden_act says."""
    site = find_sites(on_meta("dinov2", use_swiglu_ffn=True, hidden_act="gelu"))[0]
    assert site.gated and site.activation == "silu"


@pytest.mark.parametrize(("family", "kind", "path"), [
    ("llama", "q", "model.layers.0.self_attn.q_proj"), ("gpt2", "qkv", "transformer.h.0.attn.c_attn"),
    ("gpt2", "o", "transformer.h.0.attn.c_proj"), ("bert", "o", "bert.encoder.layer.0.attention.output.dense"),
    ("bert", "v", "bert.encoder.layer.0.attention.self.value"), ("gpt_neox", "o", "gpt_neox.layers.0.attention.dense"),
    ("phi3", "gate_up", "model.layers.0.mlp.gate_up_proj"), ("phi3", "down", "model.layers.0.mlp.down_proj"),
    ("llama", "attention", "model.layers.0.self_attn"), ("llama", "layer", "model.layers.0"),
    ("llava", "vision.layer", "model.vision_tower.encoder.layers.0"),
    ("llava", "vision.ffn", "model.vision_tower.encoder.layers.0.mlp"), ("llava", "text.k", "model.language_model.layers.0.self_attn.k_proj"),
])  # fmt: skip
def test_other_sites(family, kind, path):
    site = find_sites(on_meta(family), kind, [0])[0]
    assert site.root == path
    assert site.name == kind.removeprefix("text.")


def test_towers_are_named_by_their_configs():
    assert set(towers(on_meta("llava"))) == {"text", "vision"}
    assert set(towers(on_meta("llama"))) == {""}


@pytest.mark.parametrize(("site", "layers", "told"), [
    ("ffm", None, "expected one of ffn"), ("audio.ffn", None, "no tower 'audio'"), ("ffn", [2], "layer 2 does not exist"),
    ("qkv", None, "projection 'qkv' of attention, found none"), ("gate_up", None, "has gate, up, down, no gate_up"),
])  # fmt: skip
def test_what_is_not_there_is_named(site, layers, told):
    with pytest.raises(BadInput, match=told):
        find_sites(on_meta("llama"), site, layers)


def test_ambiguity_is_an_error_with_the_candidates():
    model = dense("llama")
    model.model.layers[0].side = nn.Linear(32, 7)
    with pytest.raises(BadInput, match=r"two or three linear maps.*mlp\.gate_proj 32 -> 44.*side 32 -> 7"):
        find_sites(model)
    moe = transformers.AutoConfig.for_model("mixtral", **SIZES, **WORDS, num_key_value_heads=2)
    with pytest.raises(BadInput, match="found outside attention: none"):
        find_sites(transformers.AutoModelForCausalLM.from_config(moe))
    t5 = transformers.AutoConfig.for_model("t5", d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=44, vocab_size=97)
    with pytest.raises(BadInput, match=r"one list of layers for each tower, found encoder\.block.*decoder\.block"):
        find_sites(transformers.AutoModelForSeq2SeqLM.from_config(t5))


class Gated(nn.Module):
    """Unhelpful names, and the gate comes second."""

    def __init__(self, act):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 12), nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.act = act

    def forward(self, x):
        return self.three(self.one(x) * self.act(self.two(x)))


def test_a_formula_is_learnt_from_what_the_module_computes():
    found = gated_formula(Gated(nn.functional.relu), ["one", "two", "three"], "here")
    assert (found.gate, found.up, found.down, found.activation) == ("two", "one", "three", "relu")
    with pytest.raises(BadInput, match=r"here: Gated .* is no gated network"):
        gated_formula(Gated(torch.sin), ["one", "two", "three"], "here")


def test_only_activations_pass_for_activations():
    layer = nn.Module()
    layer.act, layer.drop, layer.same, layer.norm = nn.GELU(), nn.Dropout(0.1), nn.Identity(), nn.LayerNorm(8)
    layer.function = nn.functional.silu
    assert [(a.path, a.name) for a in activation_beside(layer, "")] == [("function", "silu"), ("act", "gelu")]


def test_a_site_is_stored_under_the_dense_models_names():
    model = auto_of("vit").from_config(config_of("vit"))
    root, paths = stored_site(model, find_sites(model)[0])
    assert (root, paths) == ("vit.encoder.layer.0", {"up": "intermediate.dense", "down": "output.dense"})
    root, paths = stored_site(dense("llama"), find_sites(dense("llama"))[0])
    assert (root, paths["gate"]) == ("model.layers.0.mlp", "gate_proj")
