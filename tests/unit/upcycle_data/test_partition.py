import itertools

import numpy as np
import pytest

from moeforge.errors import UsageProblem
from moeforge_upcycle.partition import NEEDS, balanced_assignment, balanced_kmeans, importance, partition
from moeforge_upcycle.recipe import LayerStats


def stats(width: int = 24, seed: int = 1) -> LayerStats:
    rng = np.random.default_rng(seed)
    return LayerStats(activation=rng.random(width), activations=rng.standard_normal((40, width)).astype(np.float32))


@pytest.mark.parametrize("kind", NEEDS)
@pytest.mark.parametrize("parts", [1, 2, 4, 8, 24])
def test_every_neuron_once_in_equal_ascending_sets(layer, ffn, kind, parts):
    found = partition(kind, layer([ffn(0)], stats=[stats()]), parts)
    assert [len(part) for part in found] == [24 // parts] * parts
    assert all((np.diff(part) > 0).all() for part in found)
    assert sorted(itertools.chain.from_iterable(found)) == list(range(24))


@pytest.mark.parametrize("kind", NEEDS)
def test_only_the_given_neurons(layer, ffn, kind):
    pool = np.array([3, 1, 20, 7, 8, 15])
    found = partition(kind, layer([ffn(0)], stats=[stats()]), 3, neurons=pool)
    assert sorted(np.concatenate(found)) == sorted(pool) and [len(part) for part in found] == [2, 2, 2]


@pytest.mark.parametrize("kind", NEEDS)
def test_any_partition_keeps_the_function(layer, ffn, swiglu, kind):
    x = np.random.default_rng(5).standard_normal((30, 10))
    found = partition(kind, layer([ffn(0)], stats=[stats()]), 4)
    whole = swiglu(ffn(0), x)
    assert np.abs(sum(swiglu(ffn(0), x, part) for part in found) - whole).max() < 1e-12 * np.abs(whole).max()


@pytest.mark.parametrize("kind", ["random", "kmeans", "coactivation"])
def test_seed_and_layer_decide(layer, ffn, kind):
    def cut(seed, index=0):
        return np.concatenate(partition(kind, layer([ffn(0)], stats=[stats()], seed=seed, index=index), 4))

    assert np.array_equal(cut(1), cut(1))
    others = [cut(2), cut(1, index=3), cut(3), cut(4)]
    assert any(not np.array_equal(cut(1), other) for other in others)


def test_refusals(layer, ffn):
    with pytest.raises(UsageProblem, match="24 neurons do not divide into 5"):
        partition("contiguous", layer([ffn(0)]), 5)
    with pytest.raises(UsageProblem, match="metis"):
        partition("metis", layer([ffn(0)]), 2)


def test_activation_deals_busy_neurons_out_evenly(layer, ffn):
    figures = stats()
    one = layer([ffn(0)], stats=[figures])
    weight = figures.activation * np.linalg.norm(ffn(0)["down"].astype(np.float64), axis=0)
    assert np.allclose(importance(one), weight)
    found = partition("activation", one, 4)
    order = np.argsort(-weight)
    for round_ in range(6):
        dealt = order[4 * round_ : 4 * round_ + 4]
        assert all(np.isin(dealt, part).sum() == 1 for part in found)
    totals = [weight[part].sum() for part in found]
    assert max(totals) / min(totals) < 1.25


def test_kmeans_finds_groups_of_like_neurons(layer):
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((4, 2, 10)) * 4
    groups = rng.permutation(np.repeat(np.arange(4), 6))
    noise = 0.05 * rng.standard_normal((24, 2, 10))
    gate, up = ((centres[groups] + noise)[:, i].astype(np.float32) for i in (0, 1))
    found = partition("kmeans", layer([{"gate": gate, "up": up, "down": np.ones((10, 24), np.float32)}]), 4)
    assert {frozenset(part) for part in found} == {frozenset(np.flatnonzero(groups == g)) for g in range(4)}


def test_coactivation_finds_neurons_that_fire_together(layer, ffn):
    rng = np.random.default_rng(4)
    groups = rng.permutation(np.repeat(np.arange(3), 8))
    fire = rng.random((60, 3)) < 0.3
    activations = (fire[:, groups] * rng.uniform(0.8, 1.2, (60, 24)) * rng.choice([-1, 1], (60, 24))).astype(np.float32)
    found = partition("coactivation", layer([ffn(0)], stats=[LayerStats(activations=activations)]), 3)
    assert {frozenset(part) for part in found} == {frozenset(np.flatnonzero(groups == g)) for g in range(3)}


@pytest.mark.parametrize("seed", range(5))
def test_balanced_assignment_is_near_the_optimum(seed):
    from scipy.optimize import linear_sum_assignment

    cost = np.random.default_rng(seed).standard_normal((40, 5))
    labels = balanced_assignment(cost)
    assert np.bincount(labels, minlength=5).tolist() == [8] * 5
    rows, columns = linear_sum_assignment(np.repeat(cost, 8, axis=1))
    best = cost[rows, columns // 8].sum()
    chance = cost.mean() * 40
    assert best - 1e-9 <= cost[np.arange(40), labels].sum() <= best + 0.1 * (chance - best)


def test_balanced_assignment_gives_everyone_the_best_where_that_is_balanced():
    wanted = np.random.default_rng(1).permutation(np.repeat(np.arange(4), 3))
    cost = np.random.default_rng(2).random((12, 4)) + 5
    cost[np.arange(12), wanted] = 0
    assert np.array_equal(balanced_assignment(cost), wanted)
    with pytest.raises(ValueError, match="do not divide"):
        balanced_assignment(np.zeros((5, 2)))


def test_identical_points_still_make_equal_parts():
    labels = balanced_kmeans(np.ones((12, 3)), 4, np.random.default_rng(0))
    assert np.bincount(labels).tolist() == [3, 3, 3, 3]
