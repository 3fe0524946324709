"""Losses against plain Python, token by token; what they leave out; and that parts of a batch add up to the whole."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moeforge.mixture.config import RouterConfig
from moeforge.mixture.context import MixtureContext
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.losses import (
    Weights,
    assignments,
    balance_loss,
    entropy,
    importance_loss,
    layer_losses,
    orthogonality_loss,
    relative_load,
    router_probabilities,
    z_loss,
)
from moeforge.mixture.router import Router

D = 6


def make(experts=4, **options):
    config = RouterConfig(**options)
    config.check(experts)
    router = Router(config, D, experts).double()
    router.weight.data.normal_()
    return router


@pytest.mark.parametrize("experts", [3, 8])
def test_balance_is_one_when_even_and_more_when_not(experts):
    even = torch.full((experts,), 1 / experts, dtype=torch.float64)
    assert float(balance_loss(even, even)) == pytest.approx(1.0, rel=1e-12)
    one = torch.zeros(experts, dtype=torch.float64)
    one[1] = 1
    assert float(balance_loss(one, one)) == pytest.approx(experts, rel=1e-12)


@pytest.mark.parametrize("options", [
    {"top_k": 1}, {"top_k": 2}, {"top_k": 4}, {"select": "all"}, {"top_k": 2, "score": "sigmoid"}, {"top_k": 2, "null_experts": 4},
    {"top_k": 1, "by_label": (2, 2)}, {"top_k": 1, "by_label": (2, 2), "score": "sigmoid"},
], ids=str)  # fmt: skip
def test_an_even_mixture_has_balance_one_whatever_it_is(options):
    """A router that tells one-hot tokens apart and spreads them: shifts of one row of logits."""
    router = make(4, **options)
    width = router.total
    router.weight = nn.Parameter(torch.zeros(width, width, dtype=torch.float64))
    labels = torch.arange(2).repeat_interleave(24)
    row = torch.randn(width, dtype=torch.float64)
    if options.get("by_label"):  # within its group each token is shifted by one
        router.weight.data[:, 0], router.weight.data[:, 1] = row, row[[1, 0, 3, 2]]
        x = torch.eye(4, dtype=torch.float64)[torch.arange(48) % 2]
    else:
        router.weight.data = torch.stack([row.roll(i) for i in range(width)], 1)
        x = torch.eye(width, dtype=torch.float64).repeat(48 // width, 1)
    if options.get("by_label"):
        router.weight.data[2:] = router.weight.data[:2]
    terms = layer_losses({"a": router(x, labels=labels)})
    assert terms.balance.item() == pytest.approx(1.0, rel=1e-12)


def reference(logits, picks, real, config, experts):
    """(balance, z, entropy) of one layer, token by token."""
    probability, count, z, h, tokens = [0.0] * experts, [0] * experts, 0.0, 0.0, 0
    for values, chosen, counted in zip(logits.tolist(), picks.tolist(), real.tolist(), strict=True):
        if not counted:
            continue
        tokens += 1
        scores = [1 / (1 + math.exp(-v)) if config.score == "sigmoid" else math.exp(v) for v in values]
        probability = [p + s / sum(scores[:experts]) for p, s in zip(probability, scores[:experts], strict=True)]
        z += math.log(sum(math.exp(v) for v in values)) ** 2
        h -= sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores)
        for e in chosen:
            if e < experts:
                count[e] += 1
    fractions = [c / max(sum(count), 1) for c in count]
    balance = experts * sum(p / tokens * f for p, f in zip(probability, fractions, strict=True))
    return balance, z / tokens, h / tokens


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid"}, {"null_experts": 2}, {"noise": "gumbel"}], ids=str)
def test_layers_are_averaged_and_padding_left_out(options):
    real = torch.tensor([True] * 9 + [False] * 4)
    x = torch.randn(13, D, dtype=torch.float64) * 2
    routers = {"a": make(5, **options).eval(), "b": make(3, **options).eval()}
    seen = {name: router(x, real=real) for name, router in routers.items()}
    expected = [
        reference(r.logits, r.logits.topk(2, -1).indices, real, routers[n].config, r.pairs.experts)
        for n, r in seen.items()
    ]
    terms = layer_losses(seen)
    for found, values in zip((terms.balance, terms.z, terms.entropy), zip(*expected, strict=True), strict=True):
        assert found.item() == pytest.approx(sum(values) / 2, rel=1e-10)
    assert terms.layers == 2
    x[9:] = 1e3  # what stands in padding must not matter
    again = layer_losses({name: router(x, real=real) for name, router in routers.items()})
    assert float(again.balance) == float(terms.balance)
    assert float(again.z) == float(terms.z)


def test_one_scope_for_all_layers():
    x = torch.randn(20, D, dtype=torch.float64)
    seen = {name: make(4)(x) for name in "ab"}
    pooled = sum(routing.pairs.counts() for routing in seen.values()).double()
    mean = torch.stack([routing.probabilities.mean(0) for routing in seen.values()]).mean(0)
    expected = balance_loss(mean, pooled / pooled.sum())
    assert float(layer_losses(seen, scope="global").balance) == pytest.approx(float(expected), rel=1e-12)
    assert float(layer_losses(seen).balance) != pytest.approx(float(expected), rel=1e-3)
    with pytest.raises(ValueError, match="cannot be balanced together"):
        layer_losses({"a": make(4)(x), "b": make(5)(x)}, scope="global")
    fixed = Router(RouterConfig(kind="label", select="fixed"), D, 3)(x, labels=torch.zeros(20, dtype=torch.long))
    assert layer_losses(seen | {"fixed": fixed}).layers == 2
    with pytest.raises(ValueError, match="no router among fixed has probabilities"):
        layer_losses({"fixed": fixed})


def test_a_busy_group_does_not_excuse_an_idle_one():
    """Many image tokens, spread evenly; few text tokens, all to one expert."""
    assert relative_load(torch.tensor([2.0, 0, 50, 50]), (2, 2)).tolist() == [2, 0, 1, 1]
    assert relative_load(torch.tensor([3.0, 1])).tolist() == [1.5, 0.5]
    assert relative_load(torch.zeros(4), (2, 2)).tolist() == [0] * 4


def test_the_gradient_lowers_the_busy_expert():
    router = make(4)
    router.weight.data = torch.tensor([[3.0], [0.0], [0.0], [-1.0]], dtype=torch.float64)
    routing = router(torch.ones(6, 1, dtype=torch.float64))
    layer_losses({"a": routing}, {"a": torch.tensor([12.0, 0, 0, 0])}).balance.backward()
    assert router.weight.grad[0] > 0
    assert (router.weight.grad[1:] < 0).all()


def test_forbidden_experts_have_finite_gradients():
    router = make(4, by_label=(2, 2), top_k=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 255])
    x = torch.randn(6, D, dtype=torch.float64)
    routing = router(x, labels=labels)
    counts = {"a": torch.tensor([9.0, 1, 3, 3])}
    terms = layer_losses({"a": routing}, counts)
    Weights(balance=1.0).total(terms).backward(retain_graph=True)
    assert router.weight.grad.isfinite().all() and router.weight.grad[:2].abs().max() > 0
    torch.testing.assert_close(router.weight.grad[2:], torch.zeros_like(router.weight.grad[2:]))
    router.weight.grad = None
    Weights(z=1.0, entropy=0.5, importance=0.1).total(terms).backward()
    assert router.weight.grad.isfinite().all()


def test_the_sign_of_the_entropy():
    router = make(4)
    x = torch.randn(30, D, dtype=torch.float64)
    for sign, sharper in (("plus", True), ("minus", False)):
        terms = layer_losses({"a": router(x)})
        (gradient,) = torch.autograd.grad(Weights(entropy=1.0, entropy_sign=sign).total(terms), router.weight)
        moved = (x @ (router.weight - 1e-3 * gradient).T).softmax(-1)
        assert bool(entropy(moved).mean() < terms.entropy) is sharper
    assert float(entropy(torch.full((5,), 0.2))) == pytest.approx(math.log(5))
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0


def test_importance_is_what_experts_weigh():
    values = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    assert float(importance_loss(values)) == pytest.approx(((2**2 + 1 + 3**2) / 3) / 9)
    assert float(importance_loss(torch.ones(4))) == 0
    routing = make(4)(torch.randn(11, D, dtype=torch.float64))
    expected = importance_loss(routing.pairs.gates().sum(0))
    assert float(layer_losses({"a": routing}).importance) == pytest.approx(float(expected), rel=1e-12)


def test_orthogonality_of_rows_and_of_answers():
    assert float(orthogonality_loss(torch.eye(4)[:3] * 7)) == pytest.approx(0, abs=1e-7)
    assert float(orthogonality_loss(torch.tensor([[1.0, 2], [-2, -4]]))) == pytest.approx(1)
    answers = torch.randn(5, 3, 8, dtype=torch.float64)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = torch.stack(
        [nn.functional.cosine_similarity(answers[:, i], answers[:, j], dim=-1) ** 2 for i, j in pairs]
    ).mean()
    assert float(orthogonality_loss(answers)) == pytest.approx(float(expected), rel=1e-10)
    router = make(4)
    terms = layer_losses({"a": router(torch.randn(3, D, dtype=torch.float64))}, rows={"a": router.weight})
    (gradient,) = torch.autograd.grad(Weights(orthogonality=1.0).total(terms), router.weight)
    assert float(orthogonality_loss(router.weight - 0.01 * gradient)) < float(terms.orthogonality)


def test_probabilities_sum_to_one_in_float32():
    logits = (torch.randn(7, 5) * 20).to(torch.bfloat16)
    for scoring in ("softmax", "sigmoid"):
        found = router_probabilities(logits, scoring)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.sum(-1), torch.ones(7))
    assert z_loss(logits).dtype == torch.float32


def test_micro_batches_add_up_to_the_batch():
    """Uneven padding; each part weighs by its real tokens, and the counts are those of all."""
    router = make(5)
    x, real = (
        torch.randn(40, D, dtype=torch.float64),
        torch.arange(40) % 10 < torch.tensor([9, 2, 5, 7]).repeat_interleave(10),
    )
    weights = Weights(balance=0.3, z=0.1, entropy=0.2)
    whole = torch.autograd.grad(weights.total(layer_losses({"a": router(x, real=real)})), router.weight)[0]
    parts = [(x[i : i + 10], real[i : i + 10]) for i in range(0, 40, 10)]
    counts = {"a": sum(assignments({"a": router(a, real=b)})["a"] for a, b in parts)}
    total = sum(weights.total(layer_losses({"a": router(a, real=b)}, counts)) * b.sum() / real.sum() for a, b in parts)
    torch.testing.assert_close(torch.autograd.grad(total, router.weight)[0], whole, rtol=1e-11, atol=1e-13)
    without = sum(weights.total(layer_losses({"a": router(a, real=b)})) * b.sum() / real.sum() for a, b in parts)
    assert (torch.autograd.grad(without, router.weight)[0] - whole).abs().max() > 1e-4


def test_checkpointing_counts_once():
    torch.manual_seed(5)
    layers = nn.ModuleList(
        MixtureLayer(make(4, noise="gumbel", noise_scale=1.0), FFNExperts(4, D, 8).double(), name=f"layer {i}")
        for i in range(2)
    )
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    context = MixtureContext()
    for layer in layers:
        layer.context = context
    x = torch.randn(2, 10, D, dtype=torch.float64)
    context.begin(real=torch.arange(20).view(2, 10) % 10 < 8)
    calls = []
    layers[1].router.register_forward_hook(lambda *_: calls.append(1))

    def gradients(saving):
        calls.clear()
        layers.zero_grad()
        torch.manual_seed(6)
        with context.record() as seen:
            hidden = x
            for layer in layers:
                hidden = hidden + (checkpoint(layer, hidden, use_reentrant=False) if saving else layer(hidden))
        terms = layer_losses(seen)
        before = {name: routing.pairs.offsets.clone() for name, routing in seen.items()}
        (hidden.square().mean() + Weights(balance=1.0, z=0.1).total(terms)).backward()
        assert all(torch.equal(seen[name].pairs.offsets, value) for name, value in before.items())
        assert [int(routing.pairs.counts().sum()) for routing in seen.values()] == [32, 32]
        return torch.cat([layer.router.weight.grad.flatten() for layer in layers]), len(calls)

    plain, once = gradients(False)
    saved, twice = gradients(True)
    assert (once, twice) == (1, 2)
    assert plain.abs().max() > 0
    torch.testing.assert_close(saved, plain, rtol=1e-12, atol=1e-14)


WORKER = """
import sys, torch, torch.distributed as dist
from moeforge.mixture.config import RouterConfig
from moeforge.mixture.losses import Weights, assignments, layer_losses
from moeforge.mixture.router import Router

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
router = Router(RouterConfig(top_k=2, init_std=1.0), 6, 5).double()
x, real = torch.randn(2, 15, 6, dtype=torch.float64), torch.arange(15) < torch.tensor([[13], [4]])
weights = Weights(balance=0.7, z=0.1)
routing = router(x[rank], real=real[rank])
counts = assignments({"a": routing})
dist.all_reduce(counts["a"])
loss = weights.total(layer_losses({"a": routing}, counts)) * real[rank].sum() / real.sum()
loss.backward()
value = loss.detach()
dist.all_reduce(value)
dist.all_reduce(router.weight.grad)
if rank == 0:
    torch.save((value, router.weight.grad), sys.argv[1])
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "worker.py",
        tmp_path / "out.pt",
    ]
    subprocess.run(
        command,
        check=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    value, gradient = torch.load(tmp_path / "out.pt")
    torch.manual_seed(0)
    router = Router(RouterConfig(top_k=2, init_std=1.0), 6, 5).double()
    x, real = torch.randn(2, 15, 6, dtype=torch.float64), torch.arange(15) < torch.tensor([[13], [4]])
    loss = Weights(balance=0.7, z=0.1).total(layer_losses({"a": router(x.flatten(0, 1), real=real.flatten())}))
    loss.backward()
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, router.weight.grad, rtol=1e-11, atol=1e-14)
