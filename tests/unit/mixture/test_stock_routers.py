"""The routers of transformers, said in our configuration: the same experts, the same weights to the bit, on the same matrices."""

import pytest
import torch

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router

D, E = 24, 8


def mixtral(config):
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralTopKRouter

    return MixtralTopKRouter(MixtralConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=config.top_k))


def qwen2(config):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeTopKRouter

    return Qwen2MoeTopKRouter(
        Qwen2MoeConfig(
            hidden_size=D, num_experts=E, num_experts_per_tok=config.top_k, norm_topk_prob=config.renormalise
        )
    )


def qwen3(config):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeTopKRouter

    return Qwen3MoeTopKRouter(
        Qwen3MoeConfig(
            hidden_size=D, num_experts=E, num_experts_per_tok=config.top_k, norm_topk_prob=config.renormalise
        )
    )


def grouped(config):
    return {"hidden_size": D, "n_routed_experts": E, "num_experts_per_tok": config.top_k, "n_group": config.groups, "topk_group": config.top_groups,
            "norm_topk_prob": config.renormalise, "routed_scaling_factor": config.factor}  # fmt: skip


def deepseek(config):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3TopkRouter

    return DeepseekV3TopkRouter(DeepseekV3Config(**grouped(config)))


def glm(config):
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeConfig, Glm4MoeTopkRouter

    return Glm4MoeTopkRouter(Glm4MoeConfig(**grouped(config)))


def granite(config):
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeConfig, GraniteMoeTopKRouter

    return GraniteMoeTopKRouter(GraniteMoeConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=config.top_k))


DEEPSEEK = {"score": "sigmoid", "bias": True, "factor": 2.5}
CASES = {
    "mixtral": (mixtral, {"top_k": 2}),
    "qwen2-moe": (qwen2, {"top_k": 4, "renormalise": False}),
    "qwen2-moe renormalised": (qwen2, {"top_k": 3}),
    "qwen3-moe": (qwen3, {"top_k": 3}),
    "deepseek-v3": (deepseek, {"top_k": 3, "groups": 4, "top_groups": 2, **DEEPSEEK}),
    "deepseek-v3 as it is": (deepseek, {"top_k": 3, "renormalise": False, **DEEPSEEK}),
    "glm-4-moe": (glm, {"top_k": 4, "groups": 2, "top_groups": 1, **DEEPSEEK}),
    "granite": (granite, {"top_k": 3, "order": "select_score"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_choice_and_the_same_weights(case):
    make, options = CASES[case]
    config = RouterConfig(**options)
    config.check(E)
    stock, ours = make(config), Router(config, D, E)
    weight = torch.randn(E, D)
    x = torch.randn(300, D)
    with torch.no_grad():
        stock.weight.copy_(weight)
        ours.weight.copy_(weight)
        if config.bias:
            stock.e_score_correction_bias.copy_(torch.randn(E) * 0.2)
            ours.selection_bias.copy_(stock.e_score_correction_bias)
        _, weights, index = stock(x)
        pairs = ours(x).pairs
    expected = torch.zeros(300, E).scatter(1, index, weights)
    found = pairs.gates()
    assert torch.equal(found > 0, expected > 0)
    assert int((found > 0).sum()) == 300 * config.top_k
    if config.score == "softmax":
        assert torch.equal(found, expected)
    else:  # DeepSeek's chosen are in no order, so their sum is rounded otherwise
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_llama4_scales_what_its_expert_is_given():
    from transformers.models.llama4.modeling_llama4 import Llama4TextConfig, Llama4TextMoe

    stock = Llama4TextMoe(
        Llama4TextConfig(
            hidden_size=D, intermediate_size=16, num_local_experts=E, num_experts_per_tok=1, intermediate_size_mlp=16
        )
    )
    config = RouterConfig(top_k=1, score="sigmoid", order="select_score", renormalise=False, scale_at="input")
    config.check(E)
    experts = FFNExperts(E, D, 16)
    ours = MixtureLayer(Router(config, D, E), experts, shared=stock.shared_expert)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(std=0.4)
        experts.gate_up_proj.copy_(stock.experts.gate_up_proj.transpose(1, 2))
        experts.down_proj.copy_(stock.experts.down_proj.transpose(1, 2))
        ours.router.weight.copy_(stock.router.weight)
    x = torch.randn(2, 20, D, requires_grad=True)
    expected, logits = stock(x)
    found = ours(x)
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(found)
    gradients = [torch.autograd.grad((out.view_as(upstream) * upstream).sum(), [x, router]) for out, router in
                 ((expected, stock.router.weight), (found, ours.router.weight))]  # fmt: skip
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # a scaled answer is another function
    plain = MixtureLayer(ours.router, experts, shared=stock.shared_expert)
    plain.router.config = RouterConfig(top_k=1, score="sigmoid", order="select_score", renormalise=False)
    assert (plain(x).flatten(0, 1) - expected).abs().max() > 0.1
