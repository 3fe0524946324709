"""The loop on LoRA experts: parts of a batch, checkpointing and two processes each give what one big batch gives."""

import os
import subprocess
import sys

import pytest
import torch

from moeforge.errors import GateRefused
from moeforge.mixture.always import Always
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.model.adapters import forced, put
from moeforge.pipeline.progress import Progress
from moeforge.train.batch import Batch, forward
from moeforge.train.data import Document, Pool
from moeforge.train.loop import Loop, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose, frozen_in
from moeforge.train.routing import find_sites, forcing
from moeforge.train.settings import Settings

ALL_LOSSES = {"balance": 0.3, "z": 0.1, "entropy": 0.2, "entropy_sign": "minus", "importance": 0.4}


def adapted(dense, dtype=torch.float64, **router):
    """A frozen Llama with experts that are not zero: a network of 3, linear ones of 4, and a plain LoRA."""
    router = RouterConfig(**{"top_k": 2, "init_std": 0.5, **router})
    plain = RouterConfig(kind="always", select="all", top_k=1)
    model = dense.to(dtype)
    put(model, [
        MixtureConfig("ffn", (0, 1), ExpertsConfig("lora_ffn", 3, options={"rank": 3}), router),
        MixtureConfig("q", (0, 1), ExpertsConfig("lora", 4, options={"rank": 2}), router),
        MixtureConfig("v", (1,), ExpertsConfig("lora", 1, options={"rank": 2}), plain),
    ], "test")  # fmt: skip
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def bodies(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {f"d{i}": torch.randint(3, 61, (length,), generator=generator).tolist() for i, length in enumerate(lengths)}


def make(model, directory, lengths=(9, 17), *, select="all", shared=False, **settings):
    directory.mkdir(exist_ok=True)
    text = bodies(lengths)
    documents = tuple(Document(key, len(body), lambda: "", label=i % 3) for i, (key, body) in enumerate(text.items()))
    sites = find_sites(model)
    choice = choose(model, sites, select, frozen_in(model))
    options = {"rows": 2, "accumulate": 1, "amount": 3, "learning_rate": 3e-3, "warmup": 0.2, **settings}
    return Loop(model, sites, choice, Settings(**options), Packer([Pool(documents)], lambda d: text[d.key], 16, 5, shared=shared), None,
                directory)  # fmt: skip


def bar(title, total, unit):
    return Progress("tune", "none").bar(title, total, unit, lambda: None)


def trained(loop):
    """Its records, and what learnt."""
    records = loop.run(bar).metrics.of("step")
    return [{k: v for k, v in r.items() if k != "event"} for r in records], {
        n: v.detach().clone() for n, v in loop.named.items()
    }


def agree(one, other, tolerance):
    for a, b in zip(one[0], other[0], strict=True):
        assert b == pytest.approx(a, rel=tolerance, abs=1e-12)
    for name, value in one[1].items():
        assert float((other[1][name] - value).norm()) <= tolerance * float(value.norm()), name


@pytest.mark.parametrize("route", ["config", "label", "all"])
def test_micro_batches_are_one_big_batch(tiny, tmp_path, route):
    """Rows of 8 and 16 real tokens of 16, twice in one pass or once in each of two: every loss, gradient norm and weight."""
    losses = {} if route == "label" else ALL_LOSSES
    one = trained(make(adapted(tiny("llama")), tmp_path / "a", rows=4, route=route, **losses))
    two = trained(make(adapted(tiny("llama")), tmp_path / "b", rows=2, accumulate=2, route=route, **losses))
    agree(one, two, 1e-9)
    assert ("balance" in one[0][0]) is (route != "label")


@pytest.mark.parametrize("route", ["config", "label", "all"])
def test_checkpointing_chooses_the_same_again_and_counts_once(tiny, tmp_path, route):
    losses = {} if route == "label" else ALL_LOSSES
    runs = []
    for saving in (False, True):
        model = adapted(tiny("llama"))
        if saving:
            save_memory(model)
        runs.append(trained(make(model, tmp_path / str(saving), (9, 17, 5, 12), route=route, **losses)))
    agree(*runs, 1e-9)


def test_every_loss_reaches_the_routers(tiny, tmp_path):
    """The gradient of each, alone, against plain autograd over the whole batch."""
    for number, (name, weight) in enumerate((("balance", 5.0), ("z", 5.0), ("entropy", 5.0), ("importance", 5.0))):
        norms = [trained(make(adapted(tiny("llama")), tmp_path / f"{number}{on}", (9, 17, 5, 12), rows=4, amount=1, clip=0.0,
                              select="routers", **({"balance": 0.0, name: weight if on else 0.0})))[0][0]["norm"] for on in (0, 1)]  # fmt: skip
        assert abs(norms[1] - norms[0]) > 1e-3 * norms[0], name


def test_padding_weighs_nothing_in_any_loss(tiny, tmp_path):
    """The same documents in rows of 16 and of 24 slots."""
    runs = []
    for length in (16, 24):
        loop = make(adapted(tiny("llama")), tmp_path / str(length), (9, 17, 5, 12), rows=4, amount=2, **ALL_LOSSES)
        loop.train.length = length
        runs.append(trained(loop))
    agree(*runs, 1e-9)


WORKER = """
import gc
import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
sys.path[:0] = sys.argv[2:]
from conftest import make_model
from test_adapter_loop import ALL_LOSSES, adapted, make, trained

loop = make(adapted(make_model("llama"), torch.float32), Path(sys.argv[1]) / os.environ["RANK"], (9, 17, 5, 12),
            rows=2, **ALL_LOSSES)
assert loop.ranks.size == 2
found = trained(loop)
if loop.ranks.main:
    torch.save(found, Path(sys.argv[1]) / "out.pt")
# experts without a token have gradients too: the wrapper would refuse its second pass otherwise
wrapped = DistributedDataParallel(adapted(make_model("llama"), torch.float32, top_k=1, renormalise=False))
for _ in range(2):
    wrapped(input_ids=torch.tensor([[5, 5, 5]]), use_cache=False).logits.square().mean().backward()
torch.distributed.barrier()
del wrapped, loop  # a group that something still holds is taken down too late, while its threads run
gc.collect()
torch.distributed.destroy_process_group()
"""


def test_two_processes_are_one(tiny, tmp_path):
    here = os.path.dirname(__file__)
    (tmp_path / "worker.py").write_text(WORKER)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        tmp_path / "worker.py",
        tmp_path,
        here,
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    subprocess.run(command, check=True, timeout=240, env=env)
    found = torch.load(tmp_path / "out.pt")
    one = trained(make(adapted(tiny("llama"), torch.float32), tmp_path / "one", (9, 17, 5, 12), rows=4, **ALL_LOSSES))
    agree(one, found, 1e-6)


def test_idle_experts_have_gradients_of_zero(tiny):
    model = adapted(tiny("llama"), top_k=1, renormalise=False)
    tokens = torch.full((1, 4), 7)
    batch = Batch(tokens, tokens, torch.arange(4)[None], tokens > 0)
    logits, seen = forward(model.train(), find_sites(model), batch)
    idle = {name: [e for e, n in enumerate(routing.pairs.counts()) if not n] for name, routing in seen.items()}
    assert all(idle.values())
    logits.square().mean().backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learning.values())
    for mount, (_, layer) in model.mixtures.items():
        for expert in idle.get(layer.name, ()):
            assert not any(p.grad[expert].any() for p in layer.experts.parameters(recurse=False)), mount


@pytest.mark.parametrize("select", ["topk", "all", "topp"])
def test_gates_that_are_no_numbers_stop_with_the_router_s_name(tiny, tmp_path, select):
    model = adapted(tiny("llama"), select=select)
    with torch.no_grad():
        model.model.layers[1].mlp.router.weight[1, 2] = torch.nan
    with pytest.raises(
        GateRefused, match=r"router of .*1.* became nan at step 1; nothing was written\. Lower --learning-rate"
    ):
        make(model, tmp_path, balance=0.0).run(bar)


def test_preserve_pulls_towards_the_start(tiny, tmp_path):
    kept = []
    for beta in (0.0, 0.7):
        loop = make(adapted(tiny("llama")), tmp_path / str(beta), preserve=beta, amount=1, clip=0.0)
        with torch.no_grad():
            for master in loop.named.values():
                master.add_(0.1)
        step = loop.optimizer.step
        loop.optimizer.step = lambda loop=loop, step=step: (
            kept.append({n: m.grad.clone() for n, m in loop.named.items()}),
            step(),
        )
        moved = loop.run(bar).metrics.of("step")[0].get("preserve")
    experts = sum(loop.named[name].numel() for name in loop.choice.experts)
    assert moved == pytest.approx(0.01 * experts, rel=1e-9)
    for name, gradient in kept[0].items():
        pull = 2 * 0.7 * 0.1 if name in loop.choice.experts else 0.0
        torch.testing.assert_close(kept[1][name] - gradient, torch.full_like(gradient, pull), rtol=1e-9, atol=1e-12)


def test_rates_and_decay_by_name(tiny, tmp_path):
    loop = make(
        adapted(tiny("llama")), tmp_path, lora_plus=16.0, router_scale=0.5, weight_decay=0.1, learning_rate=1e-3
    )
    found = {
        name: (group["peak"], group["weight_decay"]) for group in loop.optimizer.param_groups for name in group["names"]
    }
    assert set(found) == {name for name, p in loop.model.named_parameters() if p.requires_grad}
    for name, pair in found.items():
        wanted = (0.5e-3, 0.0) if "router" in name else (16e-3, 0.1) if name.endswith("lora_B") else (1e-3, 0.1)
        assert pair == pytest.approx(wanted), name
    told = loop.choice.told(sum(p.numel() for p in loop.model.parameters()))
    assert "experts" in told and "routers" in told and "others" not in told and told.count("%") == 3


@pytest.mark.parametrize("router", [{}, {"select": "topp", "renormalise": False}, {"kind": "label", "select": "fixed"}])
def test_forcing_one_expert_is_that_expert_alone(tiny, router):
    model = adapted(tiny("llama"), **router).eval()
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids, mixture_labels=ids % 2).logits
    for expert in (0, 2):
        layers = [layer for _, layer in model.mixtures.values()]
        routers = [layer.router for layer in layers]
        for layer in layers:
            layer.router = Always(expert % layer.experts.count, layer.experts.count)
        wanted = model(input_ids=ids).logits
        for layer, router_before in zip(layers, routers, strict=True):
            layer.router = router_before
        with forced(model, expert):
            found = model(input_ids=ids).logits
        with forcing(find_sites(model), "label"):
            labelled = model(input_ids=ids, mixture_labels=torch.full_like(ids, expert)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(labelled, wanted, rtol=1e-12, atol=1e-12)
        assert float((found - plain).detach().norm()) > 1e-3
    torch.testing.assert_close(model(input_ids=ids, mixture_labels=ids % 2).logits, plain, rtol=0, atol=0)
