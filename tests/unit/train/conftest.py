"""Tiny models of many families, with weights large enough that every path matters."""

import pytest
import torch

COMMON = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 0, "n_group": 1,
           "topk_group": 1, "n_shared_experts": 1, "head_dim": 8}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "glm4_moe": GROUPED,
    "dots1": GROUPED,
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
    "cohere2_moe": EXPERTS | {"num_shared_experts": 1, "head_dim": 8},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip
DENSE = {"llama": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8}}


def make_model(family: str, seed: int = 0, **extra):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**COMMON, **{**FAMILIES, **DENSE}[family], **extra})
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")  # the only one that takes float64
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "moe_statics" in name:
                param.zero_()  # a selection bias, moved by balancing only
            elif param.ndim > 1:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
            else:
                param.copy_(torch.rand(param.shape, generator=generator) + 0.5)
    return model


@pytest.fixture
def tiny():
    return make_model
