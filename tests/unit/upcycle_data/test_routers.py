import dataclasses

import numpy as np
import pytest

from moeforge.errors import BadInput, UsageProblem
from moeforge_upcycle.recipe import LayerStats
from moeforge_upcycle.routers import NEEDS, check, describe, idle, make, mean_top1, temperature

DATA = ["centroid", "ridge", "kmeans"]


def router(kind, stats, rows=4, width=12, seed=0, **options):
    return make(kind, rows, width, stats, np.random.default_rng(seed), **options)


def softmax(logits):
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", DATA)
def test_domains_go_to_rows_of_their_own(blobs, kind):
    stats = blobs()
    found = router(kind, stats)
    assert found.rows.shape == (4, 12) and found.rows.dtype == np.float32
    choice = (stats.samples @ found.rows.T).argmax(1)
    pure = [np.bincount(choice[stats.labels == d], minlength=4).max() / 50 for d in range(4)]
    assert min(pure) > 0.95
    if kind != "kmeans":
        assert (choice == stats.labels).mean() > 0.95
    else:
        assert len({np.bincount(choice[stats.labels == d]).argmax() for d in range(4)}) == 4


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("target", [0.3, 0.5, 0.9])
def test_temperature_hits_its_target(blobs, kind, target):
    stats = blobs()
    found = router(kind, stats, top1=target)
    measured = softmax(stats.samples.astype(np.float64) @ found.rows.T.astype(np.float64)).max(1).mean()
    assert measured == pytest.approx(target, abs=1e-3)
    assert found.top1 == pytest.approx(measured, abs=1e-6)


def test_default_targets(blobs):
    assert router("centroid", blobs()).top1 == pytest.approx(0.5, abs=1e-3)
    assert router("centroid", blobs(domains=2), rows=2).top1 == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("kind", DATA)
def test_the_common_mean_prefers_nobody(blobs, kind):
    stats = blobs(common=50.0)
    found = router(kind, stats)
    at_mean = found.rows @ stats.samples.mean(0)
    spread = (stats.samples @ found.rows.T).std()
    assert np.abs(at_mean).max() < 1e-3 * spread
    assert found.as_json()["load_cv"] < 0.2


def test_centroid_is_the_centred_mean(blobs):
    stats = blobs()
    means = np.stack([stats.samples[stats.labels == d].mean(0) for d in range(4)]).astype(np.float64)
    wanted = means - means.mean(0)
    m = stats.samples.mean(0).astype(np.float64)
    m /= np.linalg.norm(m)
    wanted -= np.outer(wanted @ m, m)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    found = router("centroid", stats).rows
    assert np.allclose(found / np.linalg.norm(found, axis=1, keepdims=True), wanted, atol=1e-5)


def test_ridge_solves_the_normal_equations(blobs):
    stats = blobs()
    x = stats.samples.astype(np.float64)
    y = np.eye(4)[stats.labels] - 0.25
    gram = stats.gram + np.eye(12) * 0.01 * np.trace(stats.gram) / 12
    wanted = np.linalg.lstsq(gram, x.T @ y, rcond=None)[0].T
    m = x.mean(0) / np.linalg.norm(x.mean(0))
    wanted -= np.outer(wanted @ m, m)
    found = router("ridge", stats, ridge=0.01).rows
    assert np.allclose(found / np.linalg.norm(found), wanted / np.linalg.norm(wanted), atol=1e-4)


def test_prompts_point_from_the_negative_to_the_positive(blobs):
    base = blobs(domains=3)
    # row 0: domain 0 against domain 1; row 1: domain 1, no negative; row 2: domain 2 against domain 0
    order = [0, 1, 1, None, 2, 0]
    zero = np.zeros(12)
    stats = dataclasses.replace(
        base,
        domain_sums=np.stack([zero if d is None else base.domain_sums[d] for d in order]),
        domain_counts=np.array([0 if d is None else 50 for d in order]),
    )
    found = router("prompts", stats, rows=3)
    assert np.isfinite(found.rows).all()
    assert ((base.samples @ found.rows.T).argmax(1) == base.labels).mean() > 0.9


def test_plain_starts():
    zero = router("zero", None)
    assert not zero.rows.any() and zero.rows.dtype == np.float32 and zero.as_json() == {}
    random = make("random", 64, 512, None, np.random.default_rng(1), std=0.03)
    assert random.rows.std() == pytest.approx(0.03, rel=0.02) and abs(random.rows.mean()) < 1e-3
    uniform = make("uniform", 8, 512, None, np.random.default_rng(1), std=0.02)
    assert uniform.rows.std() == pytest.approx(0.02, rel=1e-5)
    assert np.abs(uniform.rows.mean(0)).max() < 1e-8
    assert np.abs(uniform.rows).max() < 0.02 * np.sqrt(3) * 1.5  # no normal tails


@pytest.mark.parametrize("kind", NEEDS)
def test_the_seed_decides(blobs, kind):
    if kind == "prompts":
        stats = dataclasses.replace(blobs(domains=8), samples=blobs().samples)
    else:
        stats = blobs()
    first, again = (router(kind, stats, seed=3).rows for _ in range(2))
    assert np.array_equal(first, again)
    other = router(kind, stats, seed=4).rows
    assert np.array_equal(first, other) == (kind in ("zero", "centroid", "ridge", "prompts"))


def test_load_counts_visits(blobs):
    stats = blobs()
    found = router("centroid", stats, visits=2)
    logits = stats.samples.astype(np.float64) @ found.rows.T.astype(np.float64)
    visits = np.zeros(4)
    for row in logits:
        visits[np.argsort(-row)[:2]] += 1
    assert np.allclose(found.load, visits / (2 * len(logits)))
    cv = found.load.std() / found.load.mean()
    assert found.as_json() == pytest.approx({"top1": found.top1, "load_cv": cv, "load_max": found.load.max() * 4})


def test_a_router_of_zeros_is_reported_as_lopsided(blobs):
    found = router("zero", blobs())
    assert found.load.tolist() == [1, 0, 0, 0] and found.top1 == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("kind", "rows", "texts", "top1", "told"),
    [
        ("best", 4, None, None, "best"),
        ("centroid", 4, 3, None, "4 rows, 3 --calibration"),
        ("ridge", 4, None, None, "4 rows, no --calibration"),
        ("kmeans", 4, None, 0.25, "more than 0.25"),
        ("kmeans", 4, None, 1.0, "less than 1"),
        ("kmeans", 4, None, float("nan"), "router-top1"),
    ],
)
def test_refusals_from_numbers_alone(kind, rows, texts, top1, told):
    with pytest.raises(UsageProblem, match=told):
        check(kind, rows, texts, top1)


def test_random_routers_ignore_what_they_do_not_use():
    check("random", 2, 7, 0.1)


def test_texts_that_do_not_differ_are_refused(blobs):
    same = blobs()
    same = dataclasses.replace(same, domain_sums=np.repeat(same.domain_sums[:1], 4, axis=0))
    with pytest.raises(BadInput, match="does not tell"):
        router("centroid", same)


def test_too_few_tokens_for_clusters(blobs):
    with pytest.raises(UsageProblem, match="too few"):
        router("kmeans", blobs(domains=1, each=10))


def test_temperature():
    rng = np.random.default_rng(0)
    for scale in (1e-8, 1.0, 1e6):
        logits = rng.standard_normal((200, 6)) * scale
        s = temperature(logits, 0.6)
        assert softmax(s * logits).max(1).mean() == pytest.approx(0.6, abs=1e-6)
        assert mean_top1(s * (logits - logits.max(1, keepdims=True))) == pytest.approx(0.6, abs=1e-6)
    with pytest.raises(BadInput, match="do not differ"):
        temperature(np.ones((5, 3)), 0.5)
    tied = np.repeat(rng.standard_normal((50, 1)), 2, axis=1)
    with pytest.raises(BadInput, match="tie"):
        temperature(np.hstack([tied, tied.min() - 1 + np.zeros((50, 1))]), 0.9)


def test_stats_without_samples_give_no_report():
    assert make("random", 4, 8, LayerStats(activation=np.ones(3)), np.random.default_rng(0)).load is None


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("target", [None, 0.6, 0.9])
def test_sigmoid_routers_are_as_sure_as_asked_by_their_own_score(blobs, kind, target):
    stats = blobs()
    found = router(kind, stats, top1=target, scoring="sigmoid")
    measured = sigmoid(stats.samples.astype(np.float64) @ found.rows.T.astype(np.float64)).max(1).mean()
    assert measured == pytest.approx(target or 0.75, abs=1e-3)
    assert found.top1 == pytest.approx(measured, abs=1e-6)
    softmaxed = router(kind, stats, top1=target)
    assert not np.allclose(found.rows, softmaxed.rows, rtol=1e-2)


def test_a_sigmoid_target_is_found_where_the_score_falls_again():
    """Tokens that no row answers score less with every factor: the mean has a peak, and the target lies left of it."""
    rng = np.random.default_rng()
    best = np.concatenate([rng.uniform(2, 3, 60), rng.uniform(-0.2, -0.1, 40)])
    logits = np.stack([best, best - rng.uniform(0.5, 1, 100)], axis=1)
    assert mean_top1(1e6 * logits, "sigmoid") == pytest.approx(0.6)
    factors = np.geomspace(1e-3, 1e3, 2000)
    scores = np.array([sigmoid(factor * best).mean() for factor in factors])
    target = (0.6 + scores.max()) / 2
    found = temperature(logits, target, "sigmoid")
    assert sigmoid(found * best).mean() == pytest.approx(target, abs=1e-6)
    assert found == pytest.approx(factors[scores >= target][0], rel=0.01)
    with pytest.raises(BadInput, match="none answers"):
        temperature(logits, scores.max() + 0.01, "sigmoid")


def test_a_sigmoid_scores_half_by_chance():
    check("kmeans", 8, None, 0.4)
    with pytest.raises(UsageProblem, match=r"sigmoid scores allow more than 0\.5"):
        check("kmeans", 8, None, 0.4, scoring="sigmoid")
    with pytest.raises(BadInput, match="none answers"):
        temperature(np.array([[-1.0, -2.0], [-3.0, -1.0], [1.0, -1.0]]), 0.9, "sigmoid")


@pytest.mark.parametrize(
    ("kind", "rows", "options", "told"),
    [
        ("zero", 4, {"untie": 0.1}, "--untie 0.1.*zero"),
        ("uniform", 1, {}, "single row"),
        ("random", 4, {"std": float("inf")}, "finite"),
        ("random", 4, {"untie": float("inf")}, "finite"),
    ],
)
def test_starts_that_make_no_router_are_refused(kind, rows, options, told):
    with pytest.raises(UsageProblem, match=told):
        check(kind, rows, None, None, **options)


def test_the_report_tells_of_the_busiest_layer_and_of_rows_without_tokens(blobs):
    even, lopsided = router("centroid", blobs()), router("zero", blobs())
    said = describe({2: even, 5: lopsided})
    assert "4.0 times the mean load (layer 5)" in said
    assert f"scores {(even.top1 + lopsided.top1) / 2:.2f} on average" in said
    assert idle({2: even}) is None
    assert "row 1 of layer 5 and 2 more rows got none" in idle({2: even, 5: lopsided})
