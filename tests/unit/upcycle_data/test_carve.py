import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file

from moeforge.errors import BadInput, UsageProblem
from moeforge.testing import inprocess
from moeforge_upcycle.methods.carve import Carve, Options, analytic_router
from moeforge_upcycle.options import Options as Stage
from moeforge_upcycle.recipe import LayerStats

F, D = 48, 12


@pytest.fixture
def figures(ffn, layer):
    """A layer and its statistics on random tokens."""
    weights = ffn(3, F, D)
    x = np.random.default_rng(1).standard_normal((400, D)) + 0.5
    z = x @ weights["gate"].T
    h = (z / (1 + np.exp(-z)) * (x @ weights["up"].T)).astype(np.float32)
    stats = LayerStats(samples=x.astype(np.float32), activations=h, rate=np.random.default_rng(2).random(F),
                       activation=np.abs(h).mean(0).astype(np.float64))  # fmt: skip
    return weights, layer([weights], stats=[stats]), x


@pytest.mark.parametrize("partition", ["coactivation", "kmeans", "activation", "random", "contiguous"])
@pytest.mark.parametrize("shared", [0, 2])
def test_every_neuron_once(figures, partition, shared):
    _, layer, _ = figures
    stage, options = Stage(experts=6 if shared else 8, top_k=2), Options(partition=partition, shared=shared)
    shape = Carve().shape(F, stage, options)
    made = Carve().recipe(layer, shape, stage, options)
    assert len(made.experts) == shape.experts and shape.width == F // 8
    parts = [e.neurons for e in made.experts] + ([made.shared.neurons] if shared else [])
    assert sorted(np.concatenate(parts)) == list(range(F))
    assert made.router.shape == (shape.experts, D) and made.router.dtype == np.float32
    if shared:
        rate = layer.stats[0].rate
        assert rate[made.shared.neurons].min() >= rate[np.concatenate(parts[:-1])].max()
    else:
        assert made.shared is None


def output(weights, swiglu, x, sets, rows, k, a):
    """Float64 softmax, top-k, renormalised, times a."""
    logits = x @ rows.T.astype(np.float64)
    total = np.zeros_like(x)
    parts = [swiglu(weights, x, s) for s in sets]
    for n, row in enumerate(logits):
        top = np.argsort(-row)[:k]
        w = np.exp(row[top] - row[top].max())
        for e, weight in zip(top, w / w.sum(), strict=True):
            total[n] += a * weight * parts[e][n]
    return total


def test_the_analytic_router_beats_chance_and_reaches_for_the_best(figures, swiglu):
    weights, layer, x = figures
    stage, options = Stage(experts=8, top_k=4), Options()
    shape = Carve().shape(F, stage, options)
    made = Carve().recipe(layer, shape, stage, options)
    sets = [e.neurons for e in made.experts]
    whole = swiglu(weights, x)

    def loss(rows):
        return ((output(weights, swiglu, x, sets, rows, 4, shape.routed_scale) - whole) ** 2).mean()

    rng = np.random.default_rng(0)
    chance = np.mean([loss(1e-3 * rng.standard_normal(made.router.shape)) for _ in range(5)])
    assert loss(made.router) < 0.8 * chance


def test_the_router_solves_its_least_squares(figures):
    weights, layer, x = figures
    sets = list(np.arange(F).reshape(4, 12))
    rows = analytic_router(layer, layer.stats[0], sets, 0.02, 1.1).astype(np.float64)
    h = np.abs(layer.stats[0].activations.astype(np.float64)) * np.linalg.norm(
        weights["down"].astype(np.float64), axis=0
    )
    y = np.stack([h[:, s].sum(1) for s in sets], 1)
    y -= y.mean(1, keepdims=True)
    penalty = 0.02 * np.trace(x.T @ x) / D
    stacked = np.vstack([x, np.sqrt(penalty) * np.eye(D)])
    wanted = np.linalg.lstsq(stacked, np.vstack([y, np.zeros((D, 4))]), rcond=None)[0].T
    assert np.allclose(rows / np.linalg.norm(rows), wanted / np.linalg.norm(wanted), atol=1e-4)
    p = np.exp(x @ rows.T)
    assert (p / p.sum(1, keepdims=True)).max(1).mean() == pytest.approx(1.1 / 4, abs=1e-3)


def test_for_a_sigmoid_layout_the_analytic_router_is_flat_in_its_scores(figures):
    _, layer, x = figures
    sets = list(np.arange(F).reshape(4, 12))
    rows = analytic_router(dataclasses.replace(layer, scoring="sigmoid"), layer.stats[0], sets, 0.02, 1.1)
    scores = 1 / (1 + np.exp(-x @ rows.T.astype(np.float64)))
    assert scores.max(1).mean() == pytest.approx(1.1 / 2, abs=1e-3)


def test_a_router_init_without_effect_is_refused(spoken):
    with pytest.raises(UsageProblem, match=r"--router-init kmeans has no effect.*--router stage"):
        inprocess.plan("upcycle", spoken(3), "carve", experts=4, top_k=2, router_init="kmeans")
    inprocess.plan("upcycle", spoken(3), "carve", experts=4, top_k=2, router_init="kmeans", router="stage")


@pytest.mark.parametrize(("scale", "wanted"), [("visited", 2), ("expected", 6), ("llama-moe", 3)])
def test_output_scales(scale, wanted):
    shape = Carve().shape(F, Stage(experts=6, top_k=2), Options(output_scale=scale))
    assert shape.routed_scale == wanted and not shape.exact and "2 of 6" in shape.why_inexact


def test_all_experts_with_equal_weights_are_the_dense_function(figures, swiglu):
    """The scale `visited` is the one under which nothing is lost when nothing is left out."""
    weights, layer, x = figures
    stage, options = Stage(experts=4, top_k=4), Options()
    shape = Carve().shape(F, stage, options)
    sets = [e.neurons for e in Carve().recipe(layer, shape, stage, options).experts]
    whole = swiglu(weights, x)
    found = output(weights, swiglu, x, sets, np.zeros((4, D)), 4, shape.routed_scale)
    assert np.abs(found - whole).max() < 1e-12 * np.abs(whole).max()


def test_only_what_is_needed_is_measured():
    stage = Stage()
    assert Carve().needs(stage, Options(partition="kmeans", router="stage")) == set()
    assert Carve().needs(stage, Options(partition="random", router="stage", shared=1)) == {"rate"}
    assert Carve().needs(stage, Options(partition="random")) == {"samples", "activations"}
    assert Carve().needs(stage, Options(partition="activation", router="stage")) == {"activation"}


def test_widths_that_do_not_divide_are_refused():
    with pytest.raises(UsageProblem, match=r"--experts 5 and --shared 2.*7 equal parts.*48"):
        Carve().shape(F, Stage(experts=5), Options(shared=2))


def test_written_and_measured(spoken, tmp_path):
    """Through the stage: no parameter is added but the routers, every neuron is in one expert, and the drift is told."""
    source = spoken(1)
    text = tmp_path / "text"
    text.write_text(" ".join(np.random.default_rng(0).choice("the a of to in is it on".split(), 4000)))
    done = inprocess.run("upcycle", source, tmp_path / "out", "carve", experts=4, top_k=3, calibration=(str(text),),
                         calibration_tokens=256)  # fmt: skip
    made, dense = load_file(done.path / "model.safetensors"), load_file(source / "model.safetensors")
    assert sum(v.size for v in made.values()) == sum(v.size for v in dense.values()) + 3 * 4 * 64
    for i in range(3):
        up = np.concatenate([made[f"model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight"] for e in range(4)])
        wanted = dense[f"model.layers.{i}.mlp.up_proj.weight"]
        assert sorted(map(bytes, up)) == sorted(map(bytes, wanted))
        down = np.concatenate(
            [made[f"model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)], axis=1
        )
        scaled = 3 * dense[f"model.layers.{i}.mlp.down_proj.weight"]
        assert sorted(map(bytes, down.T)) == sorted(map(bytes, scaled.T))
    routed = done.manifest["counts"]["routers"]
    assert set(routed) == {"0", "1", "2"} and all(
        1 <= r["load_max"] <= 4 and 0.25 < r["top1"] < 0.27 for r in routed.values()
    )
    verdicts = done.manifest["verdicts"]
    assert verdicts["exact"] is False and "3 of 4" in verdicts["why_inexact"]
    measured = verdicts["measured"]
    assert measured["text_kl"] > 0 and len(measured["cross_entropy"]) == 2
    again = inprocess.run("upcycle", source, tmp_path / "again", "carve", experts=4, top_k=3, calibration=(str(text),),
                          calibration_tokens=256, verify=False)  # fmt: skip
    assert again.manifest["digest"] == done.manifest["digest"]


def test_without_a_tokenizer_it_is_refused_before_anything_is_written(spoken, tmp_path):
    source = spoken(2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    with pytest.raises(BadInput, match="no tokenizer"):
        inprocess.plan("upcycle", source, "carve", experts=4, top_k=2)
    plan = inprocess.plan("upcycle", source, "carve", experts=4, top_k=2, partition="kmeans", router="stage")
    assert plan.verdicts["exact"] is False
    assert dataclasses.asdict(Options())["router"] == "analytic"
