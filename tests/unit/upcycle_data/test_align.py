import numpy as np
import pytest

from moeforge_upcycle.align import align
from moeforge_upcycle.recipe import LayerStats


def permuted(ffn, order):
    return {"gate": ffn["gate"][order], "up": ffn["up"][order], "down": ffn["down"][:, order]}


def hidden(ffn, x):
    z = x @ ffn["gate"].T
    return (z / (1 + np.exp(-z)) * (x @ ffn["up"].T)).astype(np.float32)


@pytest.mark.parametrize("kind", ["weights", "activations"])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_shuffled_parent_is_put_back_in_order(layer, ffn, kind, noise):
    rng = np.random.default_rng(8)
    anchor = ffn(1)
    order = rng.permutation(24)
    other = permuted({k: v + noise * rng.standard_normal(v.shape).astype(np.float32) for k, v in anchor.items()}, order)
    x = rng.standard_normal((200, 10))
    stats = [LayerStats(activations=hidden(f, x)) for f in (anchor, other)]
    found = align(kind, layer([anchor, other], stats=stats), 1)
    # neuron i of the anchor lies at the place where `order` put it
    assert np.array_equal(order[found], np.arange(24))


@pytest.mark.parametrize("kind", ["weights", "activations"])
def test_an_equal_parent_stays_in_order(layer, ffn, kind):
    x = np.random.default_rng(2).standard_normal((100, 10))
    stats = [LayerStats(activations=hidden(ffn(1), x))] * 2
    assert np.array_equal(align(kind, layer([ffn(1), ffn(1)], stats=stats), 1), np.arange(24))


def test_the_assignment_is_the_best_one(layer, ffn):
    """Against every permutation of five neurons."""
    import itertools

    a, b = ffn(1, width=5), ffn(2, width=5)
    found = align("weights", layer([a, b]), 1)

    def likeness(order):
        p = permuted(b, np.array(order))
        return sum(float((a[m].astype(np.float64) * p[m]).sum()) for m in a)

    best = max(itertools.permutations(range(5)), key=likeness)
    assert likeness(found) == pytest.approx(likeness(best), rel=1e-12)


def test_any_answer_keeps_the_experts_function(layer, ffn, swiglu):
    a, b = ffn(1), ffn(2)
    order = align("weights", layer([a, b]), 1)
    assert sorted(order) == list(range(24)) and order.dtype == np.int64
    x = np.random.default_rng(3).standard_normal((30, 10))
    wanted = swiglu(b, x)
    assert np.abs(swiglu(permuted(b, order), x) - wanted).max() < 1e-12 * np.abs(wanted).max()


def test_dead_neurons_do_no_harm(layer, ffn):
    activations = hidden(ffn(1), np.random.default_rng(2).standard_normal((50, 10)))
    activations[:, 3] = 0
    stats = [LayerStats(activations=activations)] * 2
    assert np.array_equal(align("activations", layer([ffn(1), ffn(1)], stats=stats), 1), np.arange(24))
