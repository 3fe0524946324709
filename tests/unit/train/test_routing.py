"""Routers are found by shape in every family, and packed documents do not see each other."""

import pytest
import torch

from moeforge.checkpoint.tensor import TensorInfo
from moeforge.errors import UsageProblem
from moeforge.train.estimate import count_selected
from moeforge.train.loop import Batch, borders_hold, forward
from moeforge.train.params import choose
from moeforge.train.routing import find_sites, read_output

MIXTURES = [
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "dots1",
    "granitemoe",
    "ernie4_5_moe",
    "cohere2_moe",
    "flex_olmo",
]


def ids(*shape, seed=0):
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", MIXTURES)
def test_watched_logits_are_those_that_chose(tiny, family):
    model = tiny(family)
    sites = find_sites(model)
    assert [(site.experts, site.top_k) for site in sites] == [(4, 2)] * 2
    tokens = ids(2, 7)
    with torch.no_grad():
        _, seen = forward(model, sites, Batch(tokens, tokens, torch.arange(7).expand(2, 7), tokens >= 0))
    assert list(seen) == [site.name for site in sites]
    for routing in seen.values():
        assert routing.logits.shape == (14, 4)
        # no family here has a selection bias at rest, so the largest logits are the chosen ones
        best = torch.zeros(14, 4).scatter(1, routing.logits.topk(2, -1).indices, 1.0)
        assert torch.equal(routing.pairs.gates() > 0, best > 0)
        assert [float(routing.pairs.counts().sum())] == [28.0]
    real = torch.tensor([True] * 5 + [False] * 9).view(2, 7)
    with torch.no_grad():
        _, seen = forward(model, sites, Batch(tokens, tokens, torch.arange(7).expand(2, 7), real))
    assert [int(routing.pairs.counts().sum()) for routing in seen.values()] == [10, 10]
    assert not any(site.router._forward_hooks for site in sites)


def test_sigmoid_routers_are_told_from_softmax(tiny):
    kinds = {family: find_sites(tiny(family))[0].scoring for family in ("mixtral", "glm4_moe", "dots1", "ernie4_5_moe")}
    assert kinds == {"mixtral": "softmax", "glm4_moe": "sigmoid", "dots1": "sigmoid", "ernie4_5_moe": "softmax"}


def test_both_orders_of_a_router_output_are_read():
    logits, weights, chosen = torch.randn(3, 4), torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [1, 0]])
    for output in ((logits, weights, chosen), (chosen, weights, logits)):
        found = read_output(output, 2)
        assert torch.equal(found[0], logits)
        assert torch.equal(found[2], chosen)
        assert torch.equal(found[1], weights)
    with pytest.raises(TypeError, match="not a router"):
        read_output(logits, 2)


@pytest.mark.parametrize("family", [*MIXTURES, "llama", "qwen3", "gemma2"])
def test_a_packed_document_is_the_document_alone(tiny, family):
    model = tiny(family)
    sites = find_sites(model)
    tokens = ids(1, 11)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]])
    with torch.no_grad():
        packed, _ = forward(model, sites, Batch(tokens, tokens, positions, tokens >= 0))
        for start, stop in ((0, 4), (4, 9), (9, 11)):
            alone = model(input_ids=tokens[:, start:stop], use_cache=False).logits
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-5, atol=1e-5)
        unpacked = model(input_ids=tokens, use_cache=False).logits
    assert (unpacked[:, 4:] - packed[:, 4:]).abs().max() > 1e-3
    assert borders_hold(model, sites, 61)


def test_a_model_that_ignores_positions_is_noticed(tiny):
    model = tiny("llama")
    inner = model.forward
    model.forward = lambda input_ids, position_ids, use_cache: inner(input_ids=input_ids, use_cache=use_cache)
    assert not borders_hold(model, [], 61)


def test_selection(tiny):
    model = tiny("mixtral")
    sites = find_sites(model)
    total = sum(p.numel() for p in model.parameters())
    assert choose(model, sites, "all").size == total
    experts = choose(model, sites, "experts")
    assert experts.size == 2 * 4 * 3 * 32 * 40
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(experts.params)
    routers = choose(model, sites, "routers")
    assert routers.size == 2 * 4 * 32
    assert routers.routers == set(routers.params)
    both = choose(model, sites, "experts,routers")
    assert both.size == experts.size + routers.size
    assert set(choose(model, sites, "*.layers.1.self_attn.*").params) == {
        f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkvo"
    }
    with pytest.raises(UsageProblem, match="selects no parameter"):
        choose(model, sites, "nothing*")
    dense = tiny("llama")
    with pytest.raises(UsageProblem, match="no mixture layers"):
        choose(dense, find_sites(dense), "experts")


@pytest.mark.parametrize("family", [*MIXTURES, "llama"])
@pytest.mark.parametrize("select", ["all", "experts", "routers"])
def test_the_plan_counts_what_the_model_trains(tiny, family, select, tmp_path):
    from safetensors import safe_open

    model = tiny(family, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        tensors = {name: TensorInfo(name, "F32", tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    config = model.config.to_dict()
    if family == "llama" and select != "all":
        with pytest.raises(UsageProblem, match="no mixture layers"):
            count_selected(config, tensors, select)
        return
    # selection biases, [E] a layer, are on disk but learn from no gradient; Ernie holds its [1, E] as parameters
    idle = sum(info.size for name, info in tensors.items() if name.endswith("e_score_correction_bias"))
    assert idle == (2 * 4 if family in ("glm4_moe", "dots1", "ernie4_5_moe") else 0)
    held = any(name.endswith("e_score_correction_bias") for name, _ in model.named_parameters())
    assert held is (family == "ernie4_5_moe")
    beyond = {"all": 0 if held else idle, "experts": 0, "routers": -idle if held else 0}
    assert count_selected(config, tensors, select) == choose(model, find_sites(model), select).size + beyond[select]


def test_a_pattern_that_no_parameter_can_match_is_refused_from_headers():
    shape = TensorInfo("model.layers.0.mlp.up_proj.weight", "F32", (3, 5))
    tensors = {shape.name: shape}
    assert count_selected({"model_type": "llama"}, tensors, "*.mlp.*") == 15
    with pytest.raises(UsageProblem, match="--train nosuch: selects no parameter"):
        count_selected({"model_type": "llama"}, tensors, "*.mlp.*,nosuch")
    # whoever renames parameters in memory is asked once the model is loaded
    assert count_selected({"model_type": "bloom"}, tensors, "nosuch") is None
    assert count_selected({"model_type": "gpt_neox"}, tensors, "lm_head.*") is None  # `embed_out` in its files
    expert = TensorInfo("model.layers.0.mlp.experts.0.up_proj.weight", "F32", (3, 5))
    assert count_selected({"model_type": "llama"}, {expert.name: expert}, "*.gate_up_proj") is None
