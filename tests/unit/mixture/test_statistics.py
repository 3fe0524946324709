"""Statistics against a count by hand, over batches, processes and domains."""

import json
import math

import pytest
import torch

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.router import Router
from moeforge.mixture.statistics import Statistics

D = 5


def make(experts=4, **options):
    router = Router(RouterConfig(init_std=1.0, **options), D, experts).double()
    return router


def by_hand(batches, router, labels_known):
    experts = router.experts
    counts, together = [0] * experts, [[0] * experts for _ in range(experts)]
    by_label, tokens, bare, entropy = [[0] * experts for _ in range(labels_known)], 0, 0, 0.0
    for x, real, labels in batches:
        routing = router(x, real=real)
        gates = routing.pairs.gates()
        for t in range(len(x)):
            if not real[t]:
                continue
            tokens += 1
            mine = [e for e in range(experts) if gates[t, e] > 0]
            bare += not mine
            p = routing.probabilities[t]
            p = (p / p.sum()).tolist()
            entropy -= sum(v * math.log(v) for v in p)
            for e in mine:
                counts[e] += 1
                for other in mine:
                    together[e][other] += 1
                if labels[t] < labels_known:
                    by_label[labels[t]][e] += 1
    return counts, together, by_label, tokens, bare, entropy


@pytest.mark.parametrize("options", [
    {}, {"score": "sigmoid"}, {"null_experts": 2}, {"select": "threshold", "threshold": 0.4},
    {"select": "expert_choice", "top_k": 1, "causal": False},
], ids=str)  # fmt: skip
def test_sums_over_batches_are_a_count_by_hand(options):
    router = make(**options)
    batches = [
        (torch.randn(n, D, dtype=torch.float64), torch.rand(n) < 0.8, torch.randint(3, (n,))) for n in (13, 1, 8)
    ]
    statistics = Statistics(labels=2)
    for x, real, labels in batches:
        statistics.add({"a": router(x, real=real)}, labels)
    found = statistics.as_json()["a"]
    counts, together, by_label, tokens, bare, entropy = by_hand(batches, router, 2)
    assert found["tokens"] == tokens
    assert found["load"] == pytest.approx([c / sum(counts) for c in counts])
    assert found["max_violation"] == pytest.approx(max(counts) * len(counts) / sum(counts) - 1)
    assert found["experts_per_token"] == pytest.approx(sum(counts) / tokens)
    assert found["uncovered"] == pytest.approx(bare / tokens)
    assert found["entropy"] == pytest.approx(entropy / tokens, rel=1e-9)
    assert found["together"] == [pytest.approx([c / tokens for c in row]) for row in together]
    assert found["by_label"] == [pytest.approx([c / max(sum(row), 1) for c in row]) for row in by_label]
    assert json.loads(json.dumps(found)) == found


def test_dead_experts_and_layers_that_saw_nothing():
    router = make(4, top_k=1)
    router.weight.data[2] = -router.weight.data[0]
    x = router.weight.data[:1].repeat(6, 1)
    statistics = Statistics()
    statistics.add({"a": router(x), "b": make()(x, real=torch.zeros(6, dtype=torch.bool))})
    found = statistics.as_json()
    assert found["a"]["dead"] == [1, 2, 3] and found["a"]["max_violation"] == 3
    assert found["b"]["tokens"] == 0 and found["b"]["entropy"] is None and found["b"]["load"] == [0.0] * 4
    assert "by_label" not in found["a"]


def test_a_fixed_choice_has_load_and_no_entropy():
    router = Router(RouterConfig(kind="label", select="fixed"), D, 3)
    statistics = Statistics(labels=3)
    labels = torch.tensor([0, 2, 2, 9])
    statistics.add({"a": router(torch.randn(4, D), labels=labels)}, labels)
    found = statistics.as_json()["a"]
    assert found["load"] == pytest.approx([1 / 3, 0, 2 / 3])
    assert found["by_label"] == [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert found["entropy"] is None and found["tokens"] == 3


def test_processes_add_up():
    router, x = make(), torch.randn(20, D, dtype=torch.float64)
    whole, one, two = Statistics(), Statistics(), Statistics()
    whole.add({"a": router(x)})
    one.add({"a": router(x[:7])})
    two.add({"a": router(x[7:])})
    others = iter([getattr(two.layers["a"], name) for name in two.layers["a"].__dataclass_fields__])
    both = one.over(lambda value: value + next(others))
    for name in whole.layers["a"].__dataclass_fields__:
        torch.testing.assert_close(getattr(both.layers["a"], name), getattr(whole.layers["a"], name))
    assert both.as_json()["a"]["load"] == whole.as_json()["a"]["load"]


def test_adding_a_batch_makes_no_graph_and_waits_for_no_device():
    """On the meta device any wait is an error."""
    router = make().to("meta")
    statistics = Statistics(labels=2)
    for _ in range(2):
        statistics.add({"a": router(torch.randn(9, D, device="meta"))}, torch.zeros(9, dtype=torch.long, device="meta"))
    assert statistics.layers["a"].visits.shape == (4, 4)
    assert not statistics.layers["a"].entropy.requires_grad
