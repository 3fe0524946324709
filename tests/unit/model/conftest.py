"""Tiny models of every dense family and every mixture layout, saved as transformers saves them."""

from __future__ import annotations

import pytest

from moeforge.testing.models import FAMILIES, SIZES, tiny

MIXTURES = {
    "mixtral": {"num_local_experts": 12, "sliding_window": 6},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 24, "mlp_only_layers": [1], "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots1": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "layer_types": ["full_attention"] * 3,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "granitemoeshared": {"num_local_experts": 4, "shared_intermediate_size": 16, "embedding_multiplier": 3.0},
    "cohere2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "first_k_dense_replace": 0,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_intermediate_size": 24, "moe_k": 2, "moe_num_shared_experts": 1},
}


@pytest.fixture(params=[*FAMILIES, *MIXTURES])
def kind(request) -> str:
    """Every model type in turn, dense and sparse."""
    return request.param


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(model type, **overrides) -> (stock model in float32, its directory), made once."""
    from transformers import AutoConfig

    made = {}

    def make(kind: str, seed: int = 0, **overrides):
        key = (kind, seed, repr(sorted(overrides.items())))
        if key not in made:
            extra = FAMILIES.get(kind) or MIXTURES.get(kind) or {}
            model, _ = tiny(AutoConfig.for_model(kind, **{**SIZES, **extra, **overrides}), seed)
            directory = tmp_path_factory.mktemp(kind)
            model.save_pretrained(directory)
            made[key] = model, directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def other(saved, tmp_path_factory):
    """A saved model whose tensors are edited: (kind, {name: new array or None to drop}, **overrides) -> directory."""
    import shutil

    from safetensors.numpy import load_file, save_file

    def make(kind: str, edit, **overrides):
        _, source = saved(kind, **overrides)
        directory = tmp_path_factory.mktemp("edited")
        shutil.copytree(source, directory, dirs_exist_ok=True)
        tensors = load_file(directory / "model.safetensors")
        edit(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    return make
