"""Sizes read from configs, beside the models that transformers builds from them."""

import pytest

from moeforge.errors import BadInput
from moeforge_plan.shape import read

COMMON = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
          "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "llama": {**COMMON, "intermediate_size": 160},
    "qwen3": {**COMMON, "intermediate_size": 160, "head_dim": 32},
    "gemma2": {**COMMON, "intermediate_size": 160, "head_dim": 16, "tie_word_embeddings": True},
    "phi3": {**COMMON, "intermediate_size": 160, "pad_token_id": 0},
    "gpt2": {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 320, "n_positions": 16},
    "mixtral": {**COMMON, "intermediate_size": 160, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {**COMMON, "intermediate_size": 96, "num_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {**COMMON, "intermediate_size": 160, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 96,
                  "num_experts": 8, "num_experts_per_tok": 4},
    "qwen3_moe": {**COMMON, "head_dim": 32, "intermediate_size": 160, "moe_intermediate_size": 48, "num_experts": 16,
                  "num_experts_per_tok": 4, "decoder_sparse_step": 2},
    "deepseek_v3": {**COMMON, "num_key_value_heads": 4, "intermediate_size": 160, "moe_intermediate_size": 48, "n_routed_experts": 8,
                    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 32,
                    "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2, "topk_group": 1},
    "glm4_moe": {**COMMON, "head_dim": 16, "intermediate_size": 160, "moe_intermediate_size": 48, "n_routed_experts": 8,
                 "num_experts_per_tok": 2, "n_shared_experts": 2, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
}  # fmt: skip


def built(model_type, config):
    """The model, on no device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))


@pytest.mark.parametrize("model_type", MODELS)
def test_parameters_are_those_of_the_model(model_type):
    """Up to norms, biases and position embeddings: vectors, and a thousandth of a real model."""
    model = built(model_type, MODELS[model_type])
    named = {name: p for name, p in model.named_parameters() if p.dim() > 1 and ".wpe." not in name}
    shape = read({"model_type": model_type, **MODELS[model_type]})
    gates = sum(p.numel() for name, p in named.items() if name.endswith("shared_expert_gate.weight"))
    assert shape.parameters == sum(p.numel() for p in named.values()) - gates


@pytest.mark.parametrize(
    ("model_type", "sparse", "experts", "top_k", "width", "shared"),
    [
        ("mixtral", 4, 8, 2, 160, 0),
        ("qwen2_moe", 4, 8, 4, 48, 96),
        ("qwen3_moe", 2, 16, 4, 48, 0),
        ("glm4_moe", 2, 8, 2, 48, 96),
    ],
)
def test_mixtures(model_type, sparse, experts, top_k, width, shared):
    shape = read({"model_type": model_type, **MODELS[model_type]})
    found = (shape.sparse_layers, shape.experts, shape.top_k, shape.expert_width, shape.shared_width)
    assert found == (sparse, experts, top_k, width, shared)


def test_active_parameters_are_those_a_token_is_multiplied_with():
    shape = read({"model_type": "mixtral", **MODELS["mixtral"]})
    idle = 4 * 6 * 3 * 64 * 160
    assert shape.active == shape.parameters - idle - 320 * 64
    dense = read({"model_type": "llama", **MODELS["llama"]})
    assert dense.active == dense.parameters - 320 * 64
    assert dense.flops(128) == 6 * dense.active + 3 * 4 * 2 * 128 * 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, r"hidden_size = None; plan needs a whole number from 1 on"),
        ({"hidden_size": "wide"}, r"hidden_size = 'wide'"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers = 0"),
        ({"num_local_experts": 8.0}, r"num_local_experts = 8\.0; plan needs a whole number"),
        ({"num_local_experts": True}, r"num_local_experts = True; plan needs a whole number"),
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers = 1000000; no model has more than 10000"),
        ({"num_local_experts": 10**6}, r"num_experts = 1000000; no model has more than 100000"),
        ({"hidden_size": 10**12}, r"hidden_size = 1000000000000; no model"),
        ({"model_type": "bert", "num_local_experts": None}, r"model_type = 'bert' is no language model that writes"),
        ({"num_experts_per_tok": 9}, r"8 experts, of which 9 are active"),
        ({"num_experts_per_tok": None}, r"8 experts, of which 0 are active a token; expected num_experts_per_tok"),
    ],
)
def test_sizes_that_are_missing_or_wrong(changes, message):
    config = {"model_type": "mixtral", **MODELS["mixtral"], **changes}
    with pytest.raises(BadInput, match=message):
        read(config)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({"mlp_only_layers": [0, 3]}, 2),
        ({"mlp_only_layers": [0], "decoder_sparse_step": 2}, 2),
        ({"moe_layer_freq": [0, 1, 1, 1]}, 3),
        ({"first_k_dense_replace": 3}, 1),
    ],
)
def test_layers_without_experts(changes, sparse):
    shape = read({"model_type": "qwen2_moe", **MODELS["qwen2_moe"], **changes})
    assert (shape.sparse_layers, shape.dense_layers, shape.dense_width) == (sparse, 4 - sparse, 160)


def test_our_own_mixtures_need_their_headers():
    with pytest.raises(BadInput, match="name the directory"):
        read({"model_type": "moeforge", "base_config": {"model_type": "llama", **MODELS["llama"]}, "mixtures": [{}]})


def test_the_text_model_of_a_larger_one_is_meant():
    inner = {"model_type": "qwen3_moe", **MODELS["qwen3_moe"]}
    assert read({"model_type": "some_vl", "text_config": inner, "vision_config": {}}) == read(inner)
