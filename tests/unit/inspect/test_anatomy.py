"""Counts from headers alone, against stock transformers models that really hold the parameters."""

import pytest

from moeforge.checkpoint import open_checkpoint
from moeforge.checkpoint.anatomy import anatomy, parameters_of, spans
from moeforge.checkpoint.roles import place_of, role_of
from moeforge.checkpoint.tensor import TensorInfo
from moeforge.testing.models import SIZES, tiny

MIXTURES = {
    "mixtral": ({"num_local_experts": 5, "num_experts_per_tok": 2}, 2),
    "qwen2_moe": (
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 72,
         "mlp_only_layers": [1]},
        3,
    ),
    "qwen3_moe": ({"num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}, 2),
    "granitemoe": ({"num_local_experts": 5, "num_experts_per_tok": 2}, 2),
    "gpt_oss": ({"num_local_experts": 4, "num_experts_per_tok": 3, "head_dim": 16}, 3),
    "deepseek_v3": (
        {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_shared_experts": 1, "n_group": 2,
         "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
         "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
        2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_are_counted_as_the_model_holds_them(model_type, tmp_path):
    from transformers import AutoConfig

    extra, top_k = MIXTURES[model_type]
    model, config = tiny(AutoConfig.for_model(model_type, **{**SIZES, **extra}))
    model.save_pretrained(tmp_path)
    total = sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())
    experts = next(extra[k] for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in extra)
    stacked = [(name, p) for name, p in model.named_parameters() if p.ndim == 3 or "experts" in name.split(".")]
    assert stacked and all(p.shape[0] == experts for _, p in stacked)
    idle = sum(p.numel() for _, p in stacked) * (experts - top_k) // experts
    with open_checkpoint(str(tmp_path)) as checkpoint:
        found = anatomy(checkpoint.config, checkpoint.tensors)
        written = {info.name: info for info in checkpoint.tensors.values()}
    assert found.parameters_total == total == sum(info.size for info in written.values())
    assert found.parameters_active == total - idle
    assert found.layers == 3
    assert found.architectures == (type(model).__name__,)
    (mixture,) = found.mixtures
    sparse = tuple(sorted({int(name.split("layers.")[1].split(".")[0]) for name, _ in stacked}))
    assert (mixture.layers, mixture.experts, mixture.top_k) == (sparse, experts, top_k)
    assert mixture.width == getattr(config, "moe_intermediate_size", config.intermediate_size)
    shared = {"qwen2_moe": 72, "deepseek_v3": 20}.get(model_type)
    assert mixture.shared_width == shared
    assert "other" not in found.parameters_by_role
    assert (
        sum(found.bytes_by_role.values())
        == sum(found.bytes_by_dtype.values())
        == sum(i.nbytes for i in written.values())
    )


def table(*infos):
    return {name: TensorInfo(name, dtype, shape) for name, dtype, shape in infos}


def test_layers_with_different_experts_are_told_apart():
    layout = {0: 4, 1: 4, 2: 8, 5: 4}
    tensors = table(*[
        (f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight", "BF16", (6, 10) if part == "down" else (10, 6))
        for layer, experts in layout.items() for e in range(experts) for part in ("gate", "up", "down")
    ], *[(f"model.layers.{layer}.mlp.down_proj.weight", "BF16", (6, 11)) for layer in (3, 4)])  # fmt: skip
    found = anatomy({"num_experts_per_tok": 2, "hidden_size": 6}, tensors)
    assert [(m.layers, m.experts, m.width) for m in found.mixtures] == [((0, 1, 5), 4, 10), ((2,), 8, 10)]
    assert found.parameters_total == 20 * 180 + 2 * 66
    assert found.parameters_active == 4 * 2 * 180 + 2 * 66
    assert found.mixtures[0].describe() == "3 layers (0-1, 5): 4 experts, 2 active, width 10"


def test_an_unknown_top_k_is_not_guessed():
    found = anatomy({}, table(("model.layers.0.mlp.experts.0.up_proj.weight", "F32", (3, 2))))
    assert found.parameters_active is None and found.mixtures[0].top_k is None
    assert anatomy({}, table(("model.layers.0.mlp.up_proj.weight", "F32", (3, 2)))).parameters_active == 6


def test_quantised_weights_count_as_what_they_stand_for():
    name = "model.layers.0.mlp.experts.1.w2.weight"
    tensors = table((name, "U8", (96, 1)), (f"{name}.absmax", "U8", (3,)), (f"{name}.nested_absmax", "F32", (1,)),
                    (f"{name}.quant_state.bitsandbytes__nf4", "U8", (80,)), ("lm_head.weight", "F16", (4, 3)),
                    ("model.layers.0.self_attn.q_proj.weight", "I8", (5, 5)), ("model.layers.0.self_attn.q_proj.SCB", "F32", (5,)),
                    ("model.layers.0.self_attn.k_proj.qweight", "I32", (8, 5)), ("model.layers.0.self_attn.k_proj.scales", "F16", (1, 5)))  # fmt: skip
    config = {"quantization_config": {"bits": 4}}
    assert [parameters_of(info, tensors, config) for info in tensors.values()] == [192, 0, 0, 0, 12, 25, 0, 320, 0]
    found = anatomy(
        {**config, "moeforge_compression": {}, "base_config": {"hidden_size": 12, "num_experts_per_tok": 1}}, tensors
    )
    assert found.parameters_total == 192 + 12 + 25 + 320
    assert found.mixtures[0].width == 16


def test_names_are_read_by_component():
    def role(name, *shape):
        return role_of(TensorInfo(name, "F32", shape))

    assert role("model.layers.1.mlp.gate_proj.weight", 4, 3) == "feed-forward"
    assert role("model.layers.1.mlp.gate.weight", 4, 3) == "routers"
    assert role("model.layers.1.mlp.shared_expert_gate.weight", 1, 3) == "routers"
    assert role("model.layers.1.mlp.shared_expert.gate_proj.weight", 4, 3) == "shared experts"
    assert role("model.layers.1.input_layernorm.weight", 3) == "norms and biases"
    assert role("model.layers.1.block_sparse_moe.input_linear.weight", 5, 4, 3) == "experts"
    assert place_of("model.layers.12.mlp.experts.7.w1.weight") == (12, 7)
    assert place_of("model.layers.12.mlp.experts.gate_up_proj") == (12, None)
    assert place_of("bert.encoder.layer.5.intermediate.dense.weight") == (5, None)
    assert place_of("model.norm.weight") == (None, None)
    assert spans((3, 1, 2, 9, 7)) == "1-3, 7, 9"
