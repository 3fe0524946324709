"""Every policy against a loop over tokens in plain Python, on random inputs, odd shapes, padding and groups without a token."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from moeforge.errors import BadInput
from moeforge.mixture.config import RouterConfig
from moeforge.mixture.router import Router

D = 5


def ranked(values):
    """Indices, the largest value first, equal ones by index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def softmax(values):
    top = max(values)
    exps = [math.exp(v - top) for v in values]
    return [e / sum(exps) for e in exps]


def scored(config, logits):
    if config.score == "softmax":
        return softmax(logits)
    if config.score == "sparsegen":
        return projected(logits, config.sparsity)
    return [1 / (1 + math.exp(-v)) if v > -math.inf else 0.0 for v in logits]


def projected(logits, sparsity):
    """The tau at which the parts above it sum to 1 - sparsity, by halving."""
    low, high = min(v for v in logits if v > -math.inf) - 1, max(logits)
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if sum(max(v - tau, 0.0) for v in logits) > 1 - sparsity else (low, tau)
    return [max(v - low, 0.0) / (1 - sparsity) for v in logits]


def group_of(config, expert):
    ends = list(itertools.accumulate(config.by_label))
    return next((g for g, end in enumerate(ends) if expert < end), None)


def naive(config, experts, logits, real, labels=None, bias=None):
    """(token, expert) -> weight, by the words of RouterConfig's documentation."""
    scores, allowed = {}, {}
    for t, row in enumerate(logits):
        if not real[t] or (config.by_label and not 0 <= labels[t] < len(config.by_label)):
            continue
        row = [v / config.temperature for v in row]
        if config.by_label:
            row = [v if group_of(config, e) in (labels[t], None) else -math.inf for e, v in enumerate(row)]
        allowed[t] = [e for e, v in enumerate(row) if v > -math.inf]
        scores[t] = (row, scored(config, row))
    if config.select == "expert_choice":
        found = experts_choose(config, experts, scores, allowed, labels)
    else:
        found = tokens_choose(config, experts, scores, allowed, bias or [0.0] * (experts + config.null_experts))
    out = {}
    for t, weights in found.items():
        for e, w in weights.items():
            if e < experts:
                out[t, e] = config.factor * (w if config.gate_scale == "prob" else 1.0)
    return out


def tokens_choose(config, experts, scores, allowed, bias):
    found, order = {}, {}
    for t, (row, score) in scores.items():
        compared = [v + b for v, b in zip(row if config.order == "select_score" else score, bias, strict=True)]
        can = set(allowed[t])
        if config.groups > 1:
            size = len(row) // config.groups
            parts = [range(g * size, (g + 1) * size) for g in range(config.groups)]
            worth = [sum(sorted((compared[e] for e in part), reverse=True)[:2]) for part in parts]
            can &= {e for g in ranked(worth)[: config.top_groups] for e in parts[g]}
        best = [e for e in ranked(compared) if e in can]
        if config.select in ("topk", "switch"):
            picks = best[: config.top_k if config.select == "topk" else 1]
        elif config.select == "topp":
            picks, total = [], 0.0
            for e in best:
                if total > config.top_p:
                    break
                picks.append(e)
                total += score[e]
        elif config.select == "threshold":
            picks = [e for e in best if compared[e] > config.threshold]
            if not picks and config.fallback == "argmax":
                picks = best[:1]
        else:
            picks = best
        if config.order == "select_score" and config.score == "softmax":
            weights = dict(zip(picks, softmax([row[e] for e in picks]) if picks else [], strict=True))
        else:
            total = sum(score[e] for e in picks) if config.renormalise else 1.0
            weights = {e: score[e] / total for e in picks}
        found[t], order[t] = weights, picks
    if config.capacity_factor is not None:
        k = config.top_k if config.select == "topk" else 1
        quota = max(1, math.ceil(Fraction(str(config.capacity_factor)) * len(scores) * k / experts))
        load = [0] * (experts + config.null_experts)
        for rank in range(k):
            for t, picks in order.items():
                if rank < len(picks):
                    e = picks[rank]
                    load[e] += 1
                    if e < experts and load[e] > quota:
                        del found[t][e]
    return found


def experts_choose(config, experts, scores, allowed, labels):
    found = {t: {} for t in scores}
    for e in range(experts):
        size = config.by_label[group_of(config, e)] if config.by_label else experts
        pool = [t for t in scores if e in allowed[t]]
        share = Fraction(str(config.capacity_factor or 1)) * config.top_k / size
        quota = min(len(pool), max(1, math.ceil(share * len(pool))))
        for i in ranked([scores[t][1][e] for t in pool])[:quota]:
            found[pool[i]][e] = scores[pool[i]][1][e]
    for t, weights in found.items():
        if not weights and config.fallback == "argmax":
            e = next(e for e in ranked(scores[t][1]) if e in allowed[t])
            weights[e] = scores[t][1][e]
        if config.renormalise:
            total = sum(weights.values())
            found[t] = {e: w / total for e, w in weights.items()}
    return found


def as_dict(pairs):
    end = int(pairs.offsets[-1])
    keys = list(zip(pairs.token[:end].tolist(), pairs.expert[:end].tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    assert keys == sorted(keys, key=lambda pair: (pair[1], pair[0]))
    assert (pairs.expert[end:] == pairs.experts).all()
    assert not pairs.weight[end:].any()
    return dict(zip(keys, pairs.weight[:end].tolist(), strict=True))


POLICIES = {
    "mixtral": {"top_k": 2},
    "qwen without renormalising": {"top_k": 2, "renormalise": False},
    "granite": {"top_k": 2, "order": "select_score"},
    "sigmoid": {"top_k": 2, "score": "sigmoid", "factor": 2.5},
    "llama4": {"top_k": 1, "score": "sigmoid", "order": "select_score", "renormalise": False},
    "selection bias": {"top_k": 2, "score": "sigmoid", "bias": True},
    "bias on softmax": {"top_k": 2, "bias": True, "renormalise": False},
    "hot": {"top_k": 2, "temperature": 0.3},
    "null": {"top_k": 2, "null_experts": 2},
    "no gate": {"top_k": 2, "gate_scale": "none"},
    "straight through": {"top_k": 2, "gate_scale": "straight_through", "factor": 0.5},
    "top p": {"select": "topp", "top_p": 0.6, "renormalise": False},
    "top p, null": {"select": "topp", "top_p": 0.8, "null_experts": 1},
    "threshold": {"select": "threshold", "threshold": 0.6, "score": "sigmoid", "renormalise": False},
    "threshold, fallback": {"select": "threshold", "threshold": 0.7, "score": "sigmoid", "fallback": "argmax"},
    "threshold on logits": {"select": "threshold", "threshold": 0.5, "order": "select_score"},
    "sparsemax": {"select": "threshold", "score": "sparsegen", "renormalise": False},
    "sparsegen": {"select": "threshold", "score": "sparsegen", "sparsity": 0.6, "renormalise": False},
    "sparsegen, dense, top 2": {"top_k": 2, "score": "sparsegen", "sparsity": -3.0, "null_experts": 1},
    "sparsegen by label": {"select": "threshold", "score": "sparsegen", "by_label": True},
    "all": {"select": "all"},
    "all, sigmoid": {"select": "all", "score": "sigmoid", "renormalise": False},
    "switch": {"select": "switch", "capacity_factor": 0.8, "renormalise": False, "causal": False},
    "capacity": {"top_k": 2, "capacity_factor": 0.7, "causal": False},
    "capacity, null": {"top_k": 2, "capacity_factor": 0.5, "null_experts": 1, "causal": False},
    "expert choice": {"select": "expert_choice", "top_k": 1, "causal": False, "renormalise": False, "score": "sigmoid"},
    "expert choice, exact": {"select": "expert_choice", "top_k": 1, "causal": False, "score": "sigmoid", "fallback": "argmax"},
    "expert choice, capacity": {"select": "expert_choice", "top_k": 2, "capacity_factor": 1.3, "causal": False, "renormalise": False},
    "by label": {"top_k": 2, "by_label": True},
    "by label, sigmoid": {"top_k": 2, "by_label": True, "score": "sigmoid", "bias": True},
    "by label, null": {"top_k": 2, "by_label": True, "null_experts": 1},
    "by label, top p": {"select": "topp", "by_label": True},
    "moma": {"select": "expert_choice", "top_k": 1, "by_label": True, "score": "sigmoid", "causal": False, "renormalise": False},
    "moma, exact": {"select": "expert_choice", "top_k": 1, "by_label": True, "score": "sigmoid", "causal": False, "fallback": "argmax"},
}  # fmt: skip


def split(experts, parts=3):
    """Experts in up to three groups of uneven size."""
    parts = min(parts, experts)
    return tuple([1] * (parts - 1) + [experts - parts + 1])


def make(options, experts, **more):
    options = options | more
    if options.get("by_label") is True:
        options["by_label"] = split(experts)
    if options.get("top_k", 2) > experts:
        options["top_k"] = experts
    config = RouterConfig(**options)
    config.check(experts)
    return Router(config, D, experts).double()


@pytest.mark.parametrize("shape", [(13, 4), (1, 4), (6, 1), (9, 7), (30, 3)], ids=str)
@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_is_the_loop_over_tokens(policy, padding, shape):
    tokens, experts = shape
    generator = torch.Generator().manual_seed(tokens * 100 + experts)
    router = make(POLICIES[policy], experts).eval()
    config = router.config
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    bias = None
    if config.bias:
        router.selection_bias.copy_(torch.randn(experts, generator=generator) * 0.3)
        bias = router.selection_bias.tolist()
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    real = torch.rand(tokens, generator=generator) < {"none": 2, "some": 0.7, "all": -1}[padding]
    # 255 is no label's number, and the middle group is often without a token
    labels = torch.tensor([0, 2, 0, 255, 2, 1])[torch.randint(6 if experts > 4 else 5, (tokens,), generator=generator)]
    logits = (x @ router.weight.T).tolist()
    expected = naive(config, experts, logits, real.tolist(), labels.tolist(), bias)
    routing = router(x, real=None if padding == "none" else real, labels=labels)
    found = as_dict(routing.pairs)
    assert set(found) == set(expected)
    assert list(found.values()) == pytest.approx([expected[key] for key in found], rel=1e-12)
    assert routing.pairs.weight.dtype == torch.float64
    if padding == "all":
        assert not found


@pytest.mark.parametrize(("groups", "top_groups", "size"), [(2, 1, 4), (4, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_groups_limit_top_k(groups, top_groups, size, score):
    generator = torch.Generator().manual_seed(groups)
    experts = groups * size
    router = make({"top_k": 2, "groups": groups, "top_groups": top_groups, "score": score, "bias": True}, experts)
    router.weight.data = torch.randn(experts, D, generator=generator, dtype=torch.float64)
    router.selection_bias.copy_(torch.randn(experts, generator=generator) * 0.2)
    x = torch.randn(17, D, generator=generator, dtype=torch.float64)
    expected = naive(
        router.config, experts, (x @ router.weight.T).tolist(), [True] * 17, bias=router.selection_bias.tolist()
    )
    found = as_dict(router(x).pairs)
    assert found == pytest.approx(expected, rel=1e-12)


def test_a_fixed_choice_is_the_label():
    router = Router(RouterConfig(kind="label", select="fixed", factor=0.5), D, 3)
    assert list(router.parameters()) == []
    labels = torch.tensor([2, 0, 255, 2, -1, 1, 3])
    real = torch.tensor([True, True, True, False, True, True, True])
    routing = router(torch.randn(7, D), real=real, labels=labels)
    assert as_dict(routing.pairs) == {(0, 2): 0.5, (1, 0): 0.5, (5, 1): 0.5}
    assert routing.real.tolist() == [True, True, False, False, False, True, False]
    assert routing.logits is None


@pytest.mark.parametrize("options", [{"kind": "label", "select": "fixed"}, {"by_label": (1, 2)}])
def test_a_policy_by_labels_without_labels_is_refused(options):
    router = Router(RouterConfig(**options), D, 3)
    with pytest.raises(BadInput, match=r"needs a label for every token"):
        router(torch.randn(4, D))


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_those_of_finite_differences(policy):
    router = make(POLICIES[policy], 4).eval()
    if router.config.gate_scale == "straight_through":
        pytest.skip("its gradient is not that of its value; tested below")
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(router.total, D, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, D, generator=generator, dtype=torch.float64, requires_grad=True)
    labels, real = torch.tensor([0, 1, 2, 2, 0, 1]), torch.tensor([True] * 5 + [False])

    def pairs(x, weight):
        routing = torch.func.functional_call(router, {"weight": weight}, (x,), {"real": real, "labels": labels})
        return routing.pairs.gates(), routing.probabilities.where(real.unsqueeze(-1), 0)

    assert torch.autograd.gradcheck(pairs, (x, weight))


def test_straight_through_has_the_weights_gradient_and_the_value_one():
    plain = make({"top_k": 2}, 4)
    through = make({"top_k": 2, "gate_scale": "straight_through"}, 4)
    through.weight = plain.weight
    x = torch.randn(6, D, dtype=torch.float64)
    upstream = torch.randn(6, 4, dtype=torch.float64)
    gradients = []
    for router in (plain, through):
        gates = router(x).pairs.gates()
        gradients.append(torch.autograd.grad((gates * upstream).sum(), router.weight)[0])
    assert torch.equal(gates.unique(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize(
    "policy", ["expert choice, exact", "moma, exact", "threshold, fallback", "mixtral", "by label"]
)
def test_weights_of_an_exact_policy_add_up_to_one_for_every_token(policy):
    router = make(POLICIES[policy], 6)
    router.weight.data.normal_()
    x, labels = torch.randn(40, D, dtype=torch.float64) * 3, torch.randint(3, (40,))
    total = router(x, labels=labels).pairs.gates().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-14, atol=0)
