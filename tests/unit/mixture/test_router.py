"""The router as a module: precision, ties, noise, what it does in training, its own kinds, and the graph."""

import pytest
import torch
from torch import nn

from moeforge.errors import BadInput
from moeforge.mixture import scores
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.mixture.context import MixtureContext
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.router import Router

D = 6


def chosen(routing):
    """[T, E] bool."""
    return routing.pairs._replace(weight=(routing.pairs.expert < routing.pairs.experts).float()).gates() > 0


def make(experts=4, **options):
    config = RouterConfig(**options)
    config.check(experts)
    router = Router(config, D, experts)
    router.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return router


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_float32_whatever_the_model_computes_in(dtype):
    router = make(8).to(dtype)
    x = torch.randn(30, D).to(dtype)
    wide = make(8)
    wide.weight.data = router.weight.float()
    expected = wide(x.float())
    routing = router(x)
    assert routing.logits.dtype == routing.probabilities.dtype == routing.pairs.weight.dtype == torch.float32
    assert torch.equal(routing.logits, expected.logits)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert torch.equal(cast.logits, expected.logits)
    assert torch.equal(cast.pairs.token, expected.pairs.token)


@pytest.mark.parametrize("options", [
    {"top_k": 3}, {"top_k": 3, "order": "select_score"}, {"select": "topp", "top_p": 0.5}, {"select": "switch", "capacity_factor": 8.0, "causal": False},
    {"top_k": 3, "groups": 4, "top_groups": 2}, {"select": "threshold", "threshold": 0.9, "fallback": "argmax"},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equal_logits_go_to_the_lowest_experts(options, dtype):
    router = make(8, **options).to(dtype)
    router.weight.data[:] = torch.randint(-3, 4, (1, D)).to(dtype)  # whole numbers: products are exact, so equal
    found = chosen(router(torch.randint(-3, 4, (50, D)).to(dtype)))
    count = int(found[0].sum())
    assert count >= 1
    assert torch.equal(found, (torch.arange(8) < count).expand(50, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_expert_choice_takes_the_first_of_equal_tokens(dtype):
    router = make(4, select="expert_choice", top_k=1, causal=False, score="sigmoid").to(dtype)
    router.weight.data = torch.randint(-3, 4, (4, D)).to(dtype)
    x = torch.randint(-3, 4, (1, D)).to(dtype).expand(12, D)
    routing = router(x)
    # torch rounds the last numbers of a sigmoid another way than those that fill its vectors, so equal tokens may differ by one bit
    rows = routing.probabilities.T.tolist()
    first = [sorted(range(12), key=lambda t: (-row[t], t))[:3] for row in rows]
    assert sum(len(set(row)) == 1 for row in rows) >= 2
    assert [found.nonzero().flatten().tolist() for found in chosen(routing).T] == [sorted(tokens) for tokens in first]


def test_some_ties_and_some_not():
    """bfloat16 weights of few values: ties within rows, broken by index."""
    router = make(16, top_k=5).bfloat16()
    router.weight.data = torch.randint(-1, 2, router.weight.shape).bfloat16()
    x = torch.randint(-1, 2, (200, D)).bfloat16()
    logits = (x.float() @ router.weight.float().T).tolist()
    ties = 0
    for row, found in zip(logits, chosen(router(x)).tolist(), strict=True):
        order = sorted(range(16), key=lambda e: (-row[e], e))
        ties += row[order[4]] == row[order[5]]
        assert {e for e, hit in enumerate(found) if hit} == set(order[:5])
    assert ties > 50


def test_capacity_drops_later_tokens_and_second_choices_first():
    router = Router(RouterConfig(top_k=2, capacity_factor=0.75, causal=False), 3, 3)
    router.weight.data = torch.eye(3)
    # first choice 0 and second 1, four times; then first choice 1 and second 0
    x = torch.tensor([[2.0, 1.0, 0.0]] * 4 + [[1.0, 2.0, 0.0]] * 2)
    found = chosen(router(x))  # 0.75 * 6 * 2 / 3 = 3 places an expert
    assert found[:, 0].tolist() == [True, True, True, False, False, False]
    assert found[:, 1].tolist() == [True, False, False, False, True, True]
    # padding takes no place, and makes the rest smaller: ceil(0.75 * 4 * 2 / 3) = 2
    real = torch.tensor([False, False, True, True, True, True])
    found = chosen(router(x, real=real))
    assert found[:, 0].tolist() == [False, False, True, True, False, False]
    assert found[:, 1].tolist() == [False, False, False, False, True, True]


def test_capacity_counts_in_fractions_not_in_floats():
    from moeforge.mixture.select import Share

    # 1.1 * 30 in floats is 33.00000000000001-ish, whose ceiling is one too many
    for tokens, expected in ((10, 11), (30, 33), (70, 77), (1, 2)):
        share = Share.of(1.1, 1, 1)
        assert -(-tokens * share.over // share.under) == expected
    assert Share.of(1 / 3, 2, 4).quota(600) == int(Share.of(1 / 3, 2, 4).quota_of(torch.tensor(600))) == 100


@pytest.mark.parametrize(
    "options",
    [{"noise": "jitter", "noise_scale": 0.3}, {"noise": "gumbel", "noise_scale": 1.0}, {"noise": "noisy_topk", "noise_scale": 0.2}],
    ids=lambda options: options["noise"],
)  # fmt: skip
def test_noise_is_for_training_only_and_leaves_the_reported_choice_true(options):
    router = make(4, top_k=1, **options)
    x = torch.randn(400, D)
    clean = make(4, top_k=1)(x)
    assert torch.equal(router.eval()(x).probabilities, clean.probabilities)
    router.train()
    torch.manual_seed(1)
    one = router(x)
    torch.manual_seed(1)
    again = router(x)
    assert torch.equal(one.probabilities, again.probabilities)
    assert not torch.equal(one.probabilities, clean.probabilities)
    assert torch.equal(one.probabilities.argmax(-1), chosen(one).int().argmax(-1))
    moved = (chosen(one) != chosen(clean)).any(-1).float().mean()
    assert 0.01 < moved < 0.7
    if options["noise"] != "jitter":
        assert torch.equal(one.logits, clean.logits)


def test_the_size_of_the_noise():
    x = torch.randn(20000, D)
    router = make(4, noise="gumbel", noise_scale=0.5)
    difference = router(x).probabilities.log() - router.eval()(x).probabilities.log()
    spread = (difference - difference.mean(-1, keepdim=True)).var(-1, correction=1).mean()
    assert spread.item() == pytest.approx(0.25 * torch.pi**2 / 3, rel=0.05)  # the logistic distribution's variance
    noisy = make(4, noise="noisy_topk", noise_scale=0.1)
    torch.nn.init.normal_(noisy.noise_weight, std=0.5)
    difference = noisy(x).probabilities.log() - noisy.eval()(x).probabilities.log()
    spread = (difference - difference.mean(-1, keepdim=True)).var(-1, correction=1).mean()
    scale = nn.functional.softplus(x @ noisy.noise_weight.T) + 0.1
    assert spread.item() == pytest.approx(scale.square().mean().item(), rel=0.05)


def test_mosa_draws_one_expert_in_training_and_averages_all_afterwards():
    router = Router(RouterConfig(kind="random", select="all", train_select="topk", top_k=1), D, 4)
    x = torch.randn(9, D)
    torch.testing.assert_close(router.eval()(x).pairs.gates(), torch.full((9, 4), 0.25))
    draws = torch.stack([router.train()(x).pairs.gates() for _ in range(200)])
    assert torch.equal(draws, draws[:, :1].expand_as(draws))  # the whole batch at once
    assert draws[:, 0].sum(-1).unique().tolist() == [1.0]
    assert draws[:, 0].sum(0).min() > 20
    each = Router(RouterConfig(kind="random", top_k=1, options={"draw": "token"}), D, 4)
    assert len(each(x.repeat(20, 1)).pairs.gates().unique(dim=0)) == 4


def test_another_selection_in_training():
    router = make(4, select="topk", top_k=1, train_select="all")
    x = torch.randn(5, D)
    assert int(chosen(router.train()(x)).sum()) == 20
    assert int(chosen(router.eval()(x)).sum()) == 5


def test_prototypes_and_static_weights():
    cosine = make(4, kind="cosine", select="all", temperature=0.2)
    x = torch.randn(7, D) * 50
    expected = nn.functional.cosine_similarity(x[:, None], cosine.weight[None], dim=-1)
    torch.testing.assert_close(cosine(x).logits, expected)
    torch.testing.assert_close(cosine(x).probabilities, (expected / 0.2).softmax(-1))
    signless = make(4, kind="cosine", options={"absolute": True})
    torch.testing.assert_close(signless(x).logits, expected.abs())
    static = Router(RouterConfig(kind="static", select="all"), D, 4)
    torch.testing.assert_close(static(x).pairs.gates(), torch.full((7, 4), 0.25))
    static.weight.data = torch.tensor([0.0, 1.0, 2.0, 3.0])
    torch.testing.assert_close(static(x).pairs.gates(), static.weight.softmax(0).expand(7, 4))


def test_a_registered_kind_and_its_options(monkeypatch):
    class Doubled(scores.Linear):
        OPTIONS = {"times": (2, 3)}

        def __call__(self, x, parameters, training):
            return self.options["times"] * super().__call__(x, parameters, training)

    monkeypatch.setattr(scores, "KINDS", dict(scores.KINDS))
    with pytest.raises(BadInput, match="kind = 'doubled': not registered; known are cosine, label"):
        Router(RouterConfig(kind="doubled"), D, 4)
    scores.register_scores("doubled", Doubled)
    scores.register_scores("doubled", Doubled)
    with pytest.raises(ValueError, match="already"):
        scores.register_scores("doubled", scores.Linear)
    x = torch.randn(3, D)
    torch.testing.assert_close(make(4, kind="doubled", options={"times": 3})(x).logits, 3 * make(4)(x).logits)
    with pytest.raises(BadInput, match=r"options.times = 4: expected 2 or 3"):
        Router(RouterConfig(kind="doubled", options={"times": 4}), D, 4)
    with pytest.raises(BadInput, match=r"options.time: kind 'linear' knows no options"):
        Router(RouterConfig(options={"time": 4}), D, 4)


def test_the_bias_moves_against_the_load_and_stays_in_float32():
    router = make(4, bias=True, score="sigmoid").bfloat16()
    assert router.weight.dtype == torch.bfloat16
    router.balance_bias(torch.tensor([4, 0, 2, 2], dtype=torch.int32), 0.25)
    assert router.selection_bias.tolist() == [-0.25, 0.25, 0.0, 0.0]
    router.balance_bias(torch.tensor([9, 1, 1, 1]), 0.001)
    kept = router.selection_bias.clone()
    router = router.half().bfloat16()
    assert router.selection_bias.dtype == torch.float32
    assert torch.equal(router.selection_bias, kept)
    assert torch.equal(router.state_dict()["selection_bias"], kept)
    # it chooses and does not weigh
    x = torch.randn(5, D).bfloat16()
    router.selection_bias[:] = torch.tensor([0.0, 0.0, 9.0, 9.0])
    routing = router(x)
    assert chosen(routing).tolist() == [[False, False, True, True]] * 5
    weights = routing.probabilities[:, 2:]
    torch.testing.assert_close(routing.pairs.gates()[:, 2:], weights / weights.sum(-1, keepdim=True))


def test_a_bias_that_is_moved_evens_out_the_load():
    router = make(6, bias=True, score="sigmoid", top_k=2)
    router.weight.data[0] += 1.0
    x = torch.randn(500, D) + 0.7
    before = router(x).pairs.counts().float()
    for _ in range(300):
        router.balance_bias(router(x).pairs.counts(), 0.01)
    after = router(x).pairs.counts().float()
    assert before.max() / before.mean() > 2
    assert after.max() / after.mean() < 1.2


REFUSED = [
    ({"top_k": 5}, r"top_k = 5: must lie between 1 and the number of experts, 4"),
    ({"select": "topp", "score": "sigmoid"}, r"score = 'sigmoid': top-p adds up probabilities"),
    ({"select": "topp", "order": "select_score"}, r"order = 'select_score'"),
    ({"select": "topk", "train_select": "topp", "top_p": 1.5}, r"top_p = 1.5"),
    ({"kind": "label"}, r"select = 'topk': a fixed choice"),
    ({"select": "fixed"}, r"select = 'fixed'"),
    ({"kind": "label", "select": "fixed", "train_select": "all"}, r"kind = 'label'"),
    ({"by_label": (1, 2)}, r"by_label = \(1, 2\): must be positive and add up to the number of experts, 4"),
    ({"by_label": (4, 0)}, r"by_label"),
    ({"by_label": (2, 2), "groups": 2}, r"groups = 2: labels split the experts already"),
    ({"by_label": (2, 2), "capacity_factor": 1.0, "causal": False}, r"capacity_factor = 1.0"),
    ({"select": "all", "capacity_factor": 1.0}, r"capacity_factor = 1.0: select = 'all' has no capacity"),
    ({"capacity_factor": 1.0}, r"causal = True: a capacity counts the other tokens"),
    ({"select": "switch", "causal": False}, r"capacity_factor = None"),
    ({"select": "expert_choice"}, r"causal = True"),
    ({"select": "expert_choice", "causal": False, "null_experts": 1}, r"null_experts = 1"),
    ({"select": "expert_choice", "causal": False, "bias": True}, r"bias = True"),
    ({"fallback": "argmax"}, r"fallback = 'argmax': only expert choice and threshold"),
    ({"score": "sparsegen", "order": "select_score"}, r"order = 'select_score': sparsegen scores all experts together"),
    ({"sparsity": 0.5}, r"sparsity = 0.5: belongs to score = 'sparsegen', not 'softmax'"),
    ({"score": "sparsegen", "sparsity": 1.0}, r"sparsity = 1.0: must be below 1"),
    ({"top_k": 1, "gate_scale": "straight_through"}, r"gate_scale = 'straight_through'"),
    ({"scale_at": "input"}, r"scale_at = 'input'"),
    ({"groups": 2, "select": "all"}, r"groups = 2: groups limit top-k, not all"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=str)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(BadInput, match=message):
        RouterConfig(**options).check(4)


def test_a_config_with_labels_and_options_comes_back():
    import json

    router = RouterConfig(by_label=(1, 3), kind="cosine", options={"absolute": True})
    config = MixtureConfig(layers=(0, 2), experts=ExpertsConfig(count=4, width=8), router=router)
    assert MixtureConfig.from_json(json.loads(json.dumps(config.as_json()))) == config


COMPILED = {
    "topk": {"top_k": 2}, "sigmoid, groups, bias": {"top_k": 2, "score": "sigmoid", "groups": 2, "bias": True},
    "topp, null": {"select": "topp", "null_experts": 1}, "capacity": {"top_k": 2, "capacity_factor": 0.8, "causal": False},
    "moma": {"select": "expert_choice", "top_k": 1, "by_label": (2, 2), "causal": False, "score": "sigmoid", "fallback": "argmax"},
    "by label": {"by_label": (1, 3)}, "threshold": {"select": "threshold", "threshold": 0.2, "fallback": "argmax"},
    "input": {"top_k": 1, "score": "sigmoid", "renormalise": False, "scale_at": "input"}, "all": {"select": "all"},
}  # fmt: skip


@pytest.mark.parametrize("policy", COMPILED)
def test_one_graph(policy):
    """fullgraph: a graph break, so a wait for the device, is an error."""
    router = make(4, noise="gumbel", **COMPILED[policy])
    experts = FFNExperts(4, D, 8)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer = MixtureLayer(router, experts, name="layer")
    layer.context = MixtureContext()
    layer.context.begin(torch.rand(10) < 0.8, torch.randint(2, (10,)))
    x = torch.randn(10, D)
    torch._dynamo.reset()
    # tracing is what fails on a break; one policy also runs what autograd makes of it
    compiled = torch.compile(layer, backend="aot_eager" if policy == "topk" else "eager", fullgraph=True)
    torch.manual_seed(0)
    plain = layer(x)
    torch.manual_seed(0)
    with layer.context.record() as seen:
        found = compiled(x)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert set(seen) == {"layer"}
    (wanted,) = torch.autograd.grad(plain.square().sum(), [router.weight])
    (got,) = torch.autograd.grad(found.square().sum(), [router.weight])
    assert got.abs().sum() > 0
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)
