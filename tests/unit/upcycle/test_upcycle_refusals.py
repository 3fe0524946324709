"""What cannot be exact is refused before a byte is written, naming the config key and value in the way."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moeforge.errors import BadInput, ExitCode, UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle import pairs

REFUSED = [
    ("gemma", {}, "mixtral", "hidden_act = 'gelu_pytorch_tanh'"),
    ("gemma2", {}, "mixtral", r"final_logit_softcapping = 30\.0"),
    ("gemma3_text", {}, "mixtral", "hidden_activation = 'gelu_pytorch_tanh'"),
    ("exaone4", {}, "exaone_moe", "model_type = 'exaone4'"),
    ("gpt2", {}, "mixtral", "model_type = 'gpt2'"),
    ("smollm3", {"no_rope_layer_interval": 2}, "mixtral", r"no_rope_layers = \[1, 0, 1\]"),
    ("smollm3", {"no_rope_layers": [1, 1, 0]}, "mixtral", r"no_rope_layers = \[1, 1, 0\]"),
    ("llama", {"attention_bias": True}, "mixtral", "attention_bias = True"),
    ("llama", {"attention_bias": True}, "glm4_moe", "attention_bias = True: .*o_proj.bias"),
    ("llama", {"attention_bias": True}, "qwen2_moe", "attention_bias = True: .*o_proj.bias"),
    ("llama", {"mlp_bias": True}, "mixtral", "mlp_bias = True"),
    ("llama", {}, "llama4", "model_type = 'llama'"),
    ("llama", {}, "deepseek_v3", "model_type = 'llama'"),
    ("llama", {}, "qwen3_moe", "model_type = 'llama'"),
    ("qwen2", {}, "deepseek_v2", "model_type = 'qwen2'"),
    ("qwen3", {}, "gpt_oss", "hidden_act = 'silu'"),
    ("phi3", {}, "phimoe", "model_type = 'phi3'"),
    ("olmo2", {}, "olmoe", "model_type = 'olmo2'"),
    ("mistral", {"sliding_window": 8}, "glm4_moe", "sliding_window = 8"),
    ("mistral", {"sliding_window": 8}, "granitemoe", "sliding_window = 8"),
    ("mistral", {"sliding_window": 8}, "qwen2_moe", "sliding_window = 8"),
    ("smollm3", {"attention_bias": True}, "mixtral", "attention_bias = True"),
    ("smollm3", {"mlp_bias": True}, "mixtral", "mlp_bias = True"),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, "mixtral", "use_sliding_window = True"),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen3_moe",
        "use_sliding_window = True",
    ),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "glm4_moe",
        "use_sliding_window = True",
    ),
    ("qwen3", {"attention_bias": True}, "glm4_moe", "attention_bias = True"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "mixtral",
        r"rope_parameters.partial_rotary_factor = 0\.5",
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}},
        "mixtral",
        "rope_parameters.rope_type = 'longrope'",
    ),
    ("granite", {"mlp_bias": True}, "granitemoe", "mlp_bias = True"),
    ("ernie4_5", {"use_bias": True}, "ernie4_5_moe", "use_bias = True"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "config", "target", "named"), REFUSED)
def test_refused_with_key_and_value(source, config, target, named, dense, tmp_path):
    src = dense(source, **config)
    with pytest.raises(BadInput, match=named) as refusal:
        inprocess.run("upcycle", src, tmp_path / "out", target=target)
    assert refusal.value.exit_code == ExitCode.BAD_INPUT
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


HELD = [
    ("gemma", {}, "hidden_act = 'gelu_pytorch_tanh'"),
    ("gemma2", {}, r"final_logit_softcapping = 30\.0"),
    ("gemma3_text", {}, "hidden_activation = 'gelu_pytorch_tanh'"),
    ("exaone4", {}, "model_type = 'exaone4'"),
    ("gpt2", {}, "model_type = 'gpt2': no native mixture"),
    ("bert", {}, "model_type = 'bert': no native mixture"),
    ("smollm3", {"no_rope_layer_interval": 2}, r"no_rope_layers = \[1, 0, 1\]"),
    ("llama", {"mlp_bias": True}, "mlp_bias = True"),
    ("ernie4_5", {"use_bias": True}, "use_bias = True"),
]


@pytest.mark.parametrize(("source", "config", "named"), HELD)
def test_what_no_native_target_holds_becomes_our_own_and_says_why(source, config, named, dense):
    plan = inprocess.plan("upcycle", dense(source, **config))
    assert plan.config["model_type"] == plan.facts["target"] == "moeforge"
    assert plan.verdicts["exact"] is True
    assert any(re.search(f"target moeforge, because .*{named}", warning) for warning in plan.warnings)
    assert plan.verdicts["portability"]["transformers"].startswith("exact: with moeforge installed")
    assert {plan.verdicts["portability"][other].split(":")[0] for other in ("vllm", "llama.cpp")} == {"unsupported"}


def test_a_refusal_says_what_works(dense):
    with pytest.raises(BadInput, match="it can become mixtral, glm4_moe"):
        inprocess.plan("upcycle", dense("llama"), target="llama4")
    with pytest.raises(BadInput, match="--allow-inexact goes on and records it; --target moeforge holds it exactly"):
        inprocess.plan("upcycle", dense("llama", attention_bias=True), target="mixtral")
    with pytest.raises(BadInput, match="it can become moeforge"):
        inprocess.plan("upcycle", dense("gemma2"), target="mixtral")
    with pytest.raises(UsageProblem, match="did you mean 'mixtral'"):
        inprocess.plan("upcycle", dense("llama"), target="mixtrall")


def test_auto_passes_on_to_the_target_that_is_exact(dense, upcycle, compare):
    """GraniteMoE is the one with a home for o_proj.bias."""
    src = dense("llama", attention_bias=True)
    done = upcycle(src)
    assert done.manifest["facts"]["target"] == "granitemoe"
    assert compare(src, done.path).error <= 1e-5


def test_a_zero_bias_is_no_bias(dense, upcycle, compare, tmp_path):
    """Llama with attention_bias whose o_proj.bias is zero fits layouts with q, k, v biases only."""
    src = tmp_path / "zeroed"
    shutil.copytree(dense("llama", attention_bias=True), src)
    tensors = load_file(src / "model.safetensors")
    for name in tensors:
        if name.endswith("o_proj.bias"):
            tensors[name][:] = 0
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    for target in ("glm4_moe", "qwen2_moe"):
        done = upcycle(src, target=target)
        found = compare(src, done.path)
        assert (found.loading, found.argmax) == ({}, True)
        assert found.error <= 1e-5


def test_a_window_longer_than_the_context_is_no_window(dense, upcycle, compare):
    src = dense("mistral", sliding_window=256)
    assert compare(src, upcycle(src, target="glm4_moe").path).error <= 1e-5


@pytest.mark.parametrize(
    ("source", "config", "target", "key"),
    [
        ("llama", {"attention_bias": True}, "mixtral", "attention_bias"),
        ("smollm3", {"no_rope_layer_interval": 2}, "mixtral", "no_rope_layers"),
        ("mistral", {"sliding_window": 8}, "glm4_moe", "sliding_window"),
    ],
)
def test_allow_inexact_is_recorded_and_measured(source, config, target, key, dense, upcycle, compare):
    src = dense(source, **config)
    done = upcycle(src, target=target, allow_inexact=True, verify=True)
    verdicts = done.manifest["verdicts"]
    assert verdicts["exact"] is False
    assert len(verdicts["allowed_inexact"]) == 1
    assert verdicts["allowed_inexact"][0].startswith(f"{key} = ")
    assert verdicts["measured"]["exact"] is False
    found = compare(src, done.path)
    assert found.loading == {}
    assert found.error > 1e-3


def test_allow_inexact_does_not_open_what_has_no_mapping(dense):
    for source, target in (("gemma2", "mixtral"), ("llama", "llama4")):
        with pytest.raises(BadInput):
            inprocess.plan("upcycle", dense(source), target=target, allow_inexact=True)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("copy", {"experts": 4, "top_k": 5}, "--top-k 5 is more than --experts 4"),
        ("split", {"granularity": 4, "experts": 8, "top_k": 6}, "--top-k 6 is not a multiple of --granularity 4"),
        ("split", {"granularity": 4, "experts": 6, "top_k": 4}, "--experts 6 is not a multiple of --granularity 4"),
        ("split", {"granularity": 5, "experts": 5, "top_k": 5}, "--granularity 5 does not divide the FFN's 96 neurons"),
        ("shared", {"shared": 4}, "do not divide its 96 neurons"),
        ("copy", {"layers": "0,9"}, r"--layers '0,9' names layers \[0, 9\]"),
        ("copy", {"layers": "some"}, "is not understood"),
        ("copy", {"router_init": "prompts"}, "--prompts FILE go together"),
        ("copy", {"router_init": "magic"}, "--router-init"),
    ],
)
def test_options_that_do_not_fit(method, options, said, dense):
    with pytest.raises(UsageProblem, match=said):
        inprocess.plan("upcycle", dense("llama"), method, **options)


@pytest.mark.parametrize(
    ("method", "options", "target", "said"),
    [
        ("copy", {"layers": "every:2"}, "mixtral", "all of its layers are sparse"),
        ("copy", {"layers": "first:1"}, "glm4_moe", "its dense layers can only come first"),
        ("shared", {"rank": "norm"}, "mixtral", "mixtral has no shared expert"),
        ("shared", {"rank": "norm", "shared": 2}, "granitemoe", "no shared expert"),
        ("split", {"scale": "routed-factor", "top_k": 2}, "mixtral", "no factor on the routed sum"),
        ("copy", {"norm_topk": False}, "granitemoe", "always makes the top-k weights sum to one"),
    ],
)
def test_requests_that_a_layout_lacks(method, options, target, said, dense):
    with pytest.raises(BadInput, match=said):
        inprocess.plan("upcycle", dense("llama"), method, target=target, **options)


def test_auto_finds_a_layout_for_the_request(dense):
    plan = inprocess.plan("upcycle", dense("llama"), layers="0,2")
    assert plan.facts["target"] == "qwen2_moe"
    assert any("mixtral cannot have just these layers sparse" in warning for warning in plan.warnings)
    assert inprocess.plan("upcycle", dense("llama"), layers="last-half").facts["target"] == "glm4_moe"
    assert inprocess.plan("upcycle", dense("llama"), "shared", rank="norm").facts["target"] == "glm4_moe"


@pytest.fixture
def damaged(dense, tmp_path):
    """damaged(change, **config): a copy of a tiny model after `change(tensors)`, with config keys replaced."""

    def make(change=lambda tensors: None, family="llama", **config):
        directory = tmp_path / "damaged"
        shutil.copytree(dense(family), directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        old = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(old | config))
        return directory

    return make


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "config", "said"),
    [
        (lambda t: t.pop(NAME), {}, f"has {NAME}, the files do not"),
        (lambda t: t.pop("lm_head.weight"), {}, "has lm_head.weight, the files do not"),
        (lambda t: t.update({"model.extra.weight": t[NAME]}), {}, "model.extra.weight would be lost"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}), {}, "q_proj.bias would be lost"),
        (lambda t: t.update({NAME: t[NAME][:90]}), {}, r"shape \[90, 64\], which does not hold up of shape \[96, 64\]"),
        (lambda t: None, {"intermediate_size": 128}, "intermediate_size = 128"),
        (lambda t: t.update({NAME: t[NAME].astype(np.int8)}), {}, "dtype I8"),
        (lambda t: None, {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight and 8 more tensors would be lost"),
        (lambda t: None, {"model_type": "mamba"}, "model_type = 'mamba'"),
    ],
)  # fmt: skip
def test_a_source_that_contradicts_itself(change, config, said, damaged):
    with pytest.raises(BadInput, match=said):
        inprocess.plan("upcycle", damaged(change, **config))


def test_a_config_key_nobody_knows_is_named(damaged):
    plan = inprocess.plan("upcycle", damaged(value_residual=True))
    assert any("value_residual" in warning for warning in plan.warnings)


def test_a_head_stored_beside_tied_embeddings_is_not_written_twice(damaged):
    """Files of tied models often hold lm_head.weight too; transformers never reads it."""
    plan = inprocess.plan("upcycle", damaged(tie_word_embeddings=True))
    assert "lm_head.weight" not in plan.tensors


def test_rotary_caches_of_old_files_are_left_out(damaged):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plan = inprocess.plan("upcycle", damaged(lambda t: t.update({name: np.ones(8, np.float32)})))
    assert name not in plan.tensors


@pytest.mark.parametrize(
    ("family", "config", "named"),
    [
        # transformers reads every one of these as longrope for Phi-3
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}, "rope_scaling.type = 'su'"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type = 'yarn'"),
        ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type = 'linear'"),
        ("phi3", {"rope_parameters": {"rope_type": "magic"}}, "rope_parameters.rope_type = 'magic'"),
        ("llama", {"rope_scaling": {"rope_type": "magic", "factor": 2.0}}, "rope_scaling.rope_type = 'magic'"),
        ("qwen3", {"rope_scaling": {"type": "su"}}, "rope_scaling.type = 'su'"),
        ("qwen2", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("olmo2", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor = 0.5"),
        ("cohere2", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("ernie4_5", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("granite", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("smollm3", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("mistral", {"rope_parameters": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ],
)  # fmt: skip
def test_rotary_embeddings_that_no_target_has(family, config, named, damaged):
    """The refusal speaks the config's own dialect."""
    target = {"qwen2": "qwen2_moe", "olmo2": "flex_olmo", "cohere2": "cohere2_moe", "ernie4_5": "ernie4_5_moe",
              "granite": "granitemoe", "qwen3": "qwen3_moe"}.get(family, "mixtral")  # fmt: skip
    with pytest.raises(BadInput, match=rf"[ :]{re.escape(named)}") as refusal:
        inprocess.plan("upcycle", damaged(family=family, **config), target=target)
    assert "rope.rope_type" not in str(refusal.value)


def test_what_would_not_load_cannot_be_allowed(damaged):
    """An unknown rotary embedding is no matter of exactness: transformers could not build the mixture."""
    source = damaged(rope_scaling={"type": "magic"})
    with pytest.raises(BadInput, match=r"rope_scaling\.type = 'magic'") as refusal:
        inprocess.plan("upcycle", source, allow_inexact=True)
    assert "--allow-inexact" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, "whose text model is a gemma3_text; "),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "several modalities, whose text model is a llama; "),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}, "vision_config": {}}, "text model is a mistral; "),
        ({"model_type": "qwen2_vl", "vision_config": {"depth": 32}}, "model_type = 'qwen2_vl' is a model of several modalities; "),
    ],
)  # fmt: skip
def test_a_model_of_several_modalities_is_called_that(config, said, damaged):
    with pytest.raises(BadInput, match=said):
        inprocess.plan("upcycle", damaged(**config))


def test_only_some_families_have_a_native_mixture():
    assert not any(pairs.load(source)[0] for source in ("gemma", "gemma2", "gemma3_text", "exaone4", "gpt2"))
    assert all(pairs.load(source)[0] for source in ("llama", "qwen2", "olmo2"))
