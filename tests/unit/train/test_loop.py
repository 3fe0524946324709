"""The loop against a reference written out by hand, and continued after every kind of stop."""

import json
import math
import os
import re
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from moeforge.errors import GateRefused, Interrupted
from moeforge.pipeline.progress import Progress
from moeforge.train.data import Document, Pool
from moeforge.train.loop import Loop, Settings, evaluate, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose
from moeforge.train.routing import find_sites

LENGTHS = [9, 30, 4, 17, 2, 25, 12, 8, 40, 3]


def corpus(seed=0, lengths=LENGTHS):
    generator = np.random.default_rng(seed)
    bodies = {f"d{i}": generator.integers(3, 61, length) for i, length in enumerate(lengths)}
    documents = tuple(Document(key, len(body), lambda key=key: key) for key, body in bodies.items())
    return [Pool(documents)], lambda document: bodies[document.key]


class Keeper:
    """States in a directory, newest last."""

    def __init__(self, directory):
        self.directory = directory
        self.saved = []

    def newest(self):
        return max(self.directory.glob("state-*"), default=None)

    def place(self, step):
        return self.directory / f"state-{step:06}"

    def record(self, path, step):
        self.saved.append(step)


class Stop:
    """Raises at the n-th check."""

    def __init__(self, at):
        self.left = at

    def __call__(self):
        self.left -= 1
        if self.left < 0:
            raise Interrupted("stopped")


def bar(title, total, unit):
    return Progress("tune", "none").bar(title, total, unit, lambda: None)


def make(tiny, directory, family="mixtral", *, shared=True, select="all", held=True, dtype=torch.float32, keep=True, check=None,
         length=16, precise=None, wide=None, **settings):  # fmt: skip
    directory.mkdir(exist_ok=True)
    model = tiny(family, **(wide or {})).to(dtype)
    sites = find_sites(model)
    choice = choose(model, sites, select)
    pools, encode = corpus()
    options = {"rows": 2, "accumulate": 2, "amount": 6, "learning_rate": 3e-3, "warmup": 0.2, **settings}
    return Loop(model, sites, choice, Settings(**options), Packer(pools, encode, length, 5, shared=shared),
                Packer(*corpus(1, [20, 7]), length, None) if held else None, directory, precise=precise,
                keeper=Keeper(directory) if keep else None, **({"check": check} if check else {}))  # fmt: skip


def weights(loop):
    return {name: param.detach().clone() for name, param in loop.model.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "llama"])
@pytest.mark.parametrize("shared", [True, False])
def test_a_step_is_the_gradient_of_the_mean_over_all_tokens(tiny, tmp_path, family, shared):
    """float64: accumulated, unevenly padded micro-batches against one document at a time, and AdamW by hand."""
    settings = {
        "amount": 1,
        "warmup": 0.0,
        "schedule": "constant",
        "weight_decay": 0.1,
        "clip": 0.5,
        "balance": 0.0,
        "router_scale": 3.0,
    }
    loop = make(tiny, tmp_path, family, shared=shared, held=False, dtype=torch.float64, **settings)
    reference = tiny(family).to(torch.float64)
    pieces = []
    stream = loop.train.rows()
    for row in (next(stream) for _ in range(4)):
        starts = [i for i in range(16) if row.positions[i] == 0] + [16]
        pieces += [(row.tokens[a:b], row.labels[a:b]) for a, b in pairwise(starts) if row.real[a]]
    count = sum(len(tokens) for tokens, _ in pieces)
    assert shared is (count == 64)
    total = torch.zeros((), dtype=torch.float64)
    for tokens, labels in pieces:
        logits = reference(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        total = total - F.log_softmax(logits, -1)[torch.arange(len(labels)), torch.from_numpy(labels)].sum()
    (total / count).backward()
    before = {name: param.detach().clone() for name, param in reference.named_parameters()}
    gradients = {
        name: param.grad if param.grad is not None else torch.zeros_like(param)
        for name, param in reference.named_parameters()
    }
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))

    record = loop.run(bar).metrics.of("step")[0]
    assert record["loss"] == pytest.approx(float(total.detach()) / count, rel=1e-6)
    assert record["tokens"] == count
    assert record["norm"] == pytest.approx(norm, rel=1e-6)
    routers = loop.choice.routers
    assert bool(routers) is (family != "llama")
    for name, param in loop.model.named_parameters():
        rate = 3e-3 * (3.0 if name in routers else 1.0)
        gradient = gradients[name] * min(1.0, 0.5 / norm)
        decay = 0.1 if param.ndim > 1 and not name.endswith("bias") and name not in routers else 0.0
        expected = before[name] * (1 - rate * decay) - rate * gradient / (gradient.abs() + 1e-8)
        # the first AdamW step is the sign of the gradient wherever it is far above epsilon
        clear = gradient.abs() > 1e-5
        assert clear.sum() >= 0.5 * (gradient != 0).sum()
        torch.testing.assert_close(param[clear], expected[clear], rtol=1e-6, atol=2e-6)


def test_balance_and_z_enter_the_gradient_once_for_each_token(tiny, tmp_path):
    """One micro-batch, so that the fractions are those of the step: the router gradient against plain autograd."""
    settings = {"amount": 1, "accumulate": 1, "rows": 3, "balance": 0.7, "z": 0.3, "clip": 0.0}
    loop = make(tiny, tmp_path, "mixtral", shared=False, held=False, dtype=torch.float64, select="routers", **settings)
    reference = tiny("mixtral").to(torch.float64)
    stream = loop.train.rows()
    rows = [next(stream) for _ in range(3)]
    kept = {}
    hooks = [layer.mlp.gate.register_forward_hook(lambda m, i, out, n=n: kept.setdefault(n, []).append(out))
             for n, layer in enumerate(reference.model.layers)]  # fmt: skip
    total, count = 0.0, sum(int(row.real.sum()) for row in rows)
    assert count < 48
    for row in rows:
        real = torch.from_numpy(row.real)
        logits = reference(input_ids=torch.from_numpy(row.tokens)[real][None], use_cache=False).logits[0]
        total = total + F.cross_entropy(logits, torch.from_numpy(row.labels)[real], reduction="sum")
    for hook in hooks:
        hook.remove()
    loss = total / count
    for outputs in kept.values():
        logits = torch.cat([out[0] for out in outputs])
        chosen = torch.cat([out[2] for out in outputs])
        fraction = F.one_hot(chosen, 4).double().sum((0, 1)) / chosen.numel()
        loss = (
            loss + 0.7 * 4 * (logits.softmax(-1).mean(0) * fraction).sum() + 0.3 * logits.logsumexp(-1).square().mean()
        )
    loss.backward()
    norm = math.sqrt(sum(float(layer.mlp.gate.weight.grad.square().sum()) for layer in reference.model.layers))
    assert loop.run(bar).metrics.of("step")[0]["norm"] == pytest.approx(norm, rel=1e-5)


def test_training_learns_and_evenness_counts(tiny, tmp_path):
    free = make(tiny, tmp_path / "a", amount=25, balance=0.0).run(bar).metrics
    steps = free.of("step")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.2
    assert [record["step"] for record in free.of("held_out")] == [0, 25]
    crowded = make(
        tiny, tmp_path / "b", amount=40, balance=10.0, select="routers", router_scale=10.0, rows=8, length=32
    )
    with torch.no_grad():  # what all tokens have in common leads them to the first two experts
        crowded.model.model.embed_tokens.weight += 1
        crowded.model.model.layers[0].mlp.gate.weight[:2] += 0.2
    even = [r["balance"] - 1 for r in crowded.run(bar).metrics.of("step")]
    assert even[0] > 0.3
    assert sum(even[-8:]) / 8 < 0.3 * even[0]


@pytest.mark.parametrize("save_every", [0, 2])
@pytest.mark.parametrize("at", [1, 3, 6, 10, 13])
def test_stopped_anywhere_and_continued_the_bits_are_the_same(tiny, tmp_path, save_every, at):
    whole = make(tiny, tmp_path / "whole", evaluate_every=3)
    whole.run(bar)
    torch.rand(3)
    part = make(tiny, tmp_path / "part", evaluate_every=3, save_every=save_every, check=Stop(at))
    with pytest.raises(Interrupted):
        part.run(bar)
    torch.manual_seed(99)
    rest = make(tiny, tmp_path / "part", evaluate_every=3, save_every=save_every)
    with torch.no_grad():  # what is in memory at the start must not matter
        for param in rest.named.values():
            param.add_(0.1)
    rest.run(bar)
    assert same(weights(whole), weights(rest))
    assert (tmp_path / "part/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [json.loads(line)["step"] for line in (tmp_path / "whole/metrics.jsonl").open() if "held_out" in line] == [
        0,
        3,
        6,
    ]


WIDE = {"hidden_size": 64, "intermediate_size": 96}
"""Experts of more than the 4096 values from which on moments are stored in 8 bits."""


def test_moments_of_8_bits_survive_a_stop_bit_for_bit(tiny, tmp_path):
    options = {"wide": WIDE, "optimizer": "adamw-8bit", "save_every": 2}
    whole = make(tiny, tmp_path / "whole", **options)
    whole.run(bar)
    part = make(tiny, tmp_path / "part", **options, check=Stop(9))
    with pytest.raises(Interrupted):
        part.run(bar)
    again = make(tiny, tmp_path / "part", **options)
    again.run(bar)
    assert same(weights(whole), weights(again))
    states = [state for state in again.optimizer.state.values() if state["state1"].dtype == torch.uint8]
    assert len(states) > 4


def test_moments_of_8_bits_learn_as_those_of_32(tiny, tmp_path):
    full, short = (
        make(tiny, tmp_path / kind, wide=WIDE, amount=20, optimizer=kind).run(bar).metrics.of("step")
        for kind in ("adamw", "adamw-8bit")
    )
    fallen = full[0]["loss"] - full[-1]["loss"]
    assert fallen > 0.2
    assert short[0]["loss"] == full[0]["loss"]
    assert short[-1]["loss"] == pytest.approx(full[-1]["loss"], abs=0.1 * fallen)


def test_killed_between_saves_the_bits_are_the_same(tiny, tmp_path):
    """As after kill -9: the state is older than metrics.jsonl, which also has a torn last line."""
    whole = make(tiny, tmp_path / "whole")
    whole.run(bar)
    part = make(tiny, tmp_path / "part", save_every=2)
    part.run(bar)
    assert part.keeper.saved == [2, 4, 6]
    for late in (4, 6):
        (tmp_path / f"part/state-{late:06}").unlink()
    with open(tmp_path / "part/metrics.jsonl", "a") as file:
        file.write('{"event": "st')
    rest = make(tiny, tmp_path / "part", save_every=2)
    rest.run(bar)
    assert rest.keeper.saved == [4, 6]
    assert same(weights(whole), weights(rest))
    assert (tmp_path / "part/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_what_was_learnt_outlives_a_result_that_could_not_be_written(tiny, tmp_path, monkeypatch):
    """The state of a finished run is enough to write its result: nothing is trained or measured again."""
    first = make(tiny, tmp_path / "run")
    first.run(bar)
    told = (tmp_path / "run/metrics.jsonl").read_bytes()
    monkeypatch.setattr(Loop, "_update", lambda self: pytest.fail("trained again"))
    monkeypatch.setattr("moeforge.train.loop.evaluate", lambda *_: pytest.fail("measured again"))
    second = make(tiny, tmp_path / "run")
    result = second.run(bar)
    assert same(weights(first), weights(second)) and result.steps == 6
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == told


def test_a_full_disk_takes_the_saved_state_and_not_the_result(tiny, tmp_path, monkeypatch):
    said = []
    loop = make(tiny, tmp_path / "run")
    monkeypatch.setattr(loop, "say", said.append)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert loop.run(bar).steps == 6
    assert "No space left on device" in said[-1]
    assert not list((tmp_path / "run").glob("state-*"))


def full(tensors, path, metadata):
    """As safetensors puts it, after some bytes."""
    path.write_bytes(b"half")
    raise SafetensorError(f'Error while serializing: I/O error: No space left on device (os error 28) at path "{path}"')


def test_gradient_checkpointing_changes_nothing_but_memory(tiny, tmp_path):
    plain, saving = make(tiny, tmp_path / "a"), make(tiny, tmp_path / "b")
    save_memory(saving.model)
    records = [[r["balance"] for r in loop.run(bar).metrics.of("step")] for loop in (plain, saving)]
    assert records[0] == pytest.approx(records[1], rel=1e-5)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(saving)[name], value, rtol=1e-4, atol=1e-6)


def test_bf16_sums_in_float32(tiny, tmp_path):
    """A rate far below bfloat16's resolution still moves the masters, and the model follows once it adds up."""
    exact = weights(make(tiny, tmp_path / "x"))
    loop = make(tiny, tmp_path / "a", dtype=torch.bfloat16, learning_rate=1e-6, weight_decay=0.0, amount=3,
                precise=lambda name: exact[name])  # fmt: skip
    assert all(torch.equal(loop.named[name], exact[name]) for name in exact)
    start = weights(loop)
    loop.run(bar)
    moved = [(loop.named[name] - exact[name]).abs().max() for name in exact]
    assert max(moved) > 1e-6
    assert min(moved) >= 0
    assert all(torch.equal(loop.named[name].to(torch.bfloat16), param) for name, param in loop.model.named_parameters())
    unmoved = sum(int((start[n] == p).sum()) for n, p in loop.model.named_parameters())
    assert unmoved > 0.9 * sum(p.numel() for p in loop.model.parameters())
    assert all(param.grad is None for param in loop.model.parameters())


def test_bf16_follows_fp32(tiny, tmp_path):
    short = make(tiny, tmp_path / "a", dtype=torch.bfloat16, amount=15).run(bar).metrics.of("step")
    full = make(tiny, tmp_path / "b", amount=15).run(bar).metrics.of("step")
    assert short[-1]["loss"] == pytest.approx(full[-1]["loss"], rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_with_advice(tiny, tmp_path, value):
    loop = make(tiny, tmp_path, held=False)
    with torch.no_grad():
        loop.model.lm_head.weight[5, 3] = value
    with pytest.raises(GateRefused, match=r"at step 1; .*--learning-rate"):
        loop.run(bar)


def test_the_bar_tells_loss_speed_and_memory(tiny, tmp_path):
    told = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def advance(self, amount, note):
            told.append(note)

    make(tiny, tmp_path, amount=2).run(lambda *_: Bar())
    assert len(told) == 2
    assert all(re.fullmatch(r"loss \d\.\d{4}, \d+ tokens/s, peak [\d.]+ [MG]B", note) for note in told), told


def test_budgets(tiny, tmp_path):
    by_tokens = make(tiny, tmp_path / "t", budget="tokens", amount=200).run(bar)
    assert 200 <= by_tokens.tokens < 200 + 64
    by_time = make(tiny, tmp_path / "m", budget="minutes", amount=0.01).run(bar)
    assert by_time.steps >= 1


def test_held_out_loss_is_the_mean_over_its_tokens(tiny):
    model = tiny("mixtral").double()
    pools, encode = corpus(1, [20, 7, 11])
    found = evaluate(model, find_sites(model), Packer(pools, encode, 8, None, shared=False), 2, torch.device("cpu"))
    total, count = 0.0, 0
    for document in pools[0].documents:
        body = torch.from_numpy(encode(document))
        for start in range(0, len(body) - 1, 8):
            tokens, labels = body[start : start + 8], body[start + 1 : start + 9]
            tokens = tokens[: len(labels)]
            logits = model(input_ids=tokens[None], use_cache=False).logits[0].detach()
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    assert found["tokens"] == count == 35
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)
    assert [sum(layer) for layer in found["load"]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found["imbalance"] >= 1


def test_memory_is_that_of_this_process_not_of_the_one_that_started_it():
    """Linux hands ru_maxrss on to a started process: a small child of a large parent must not report the parent's peak."""
    big = 2_000_000_000
    code = "import torch; from moeforge.train.loop import peak_memory; print(peak_memory(torch.device('cpu')))"
    start = f"import subprocess, sys; held = b'x' * {big}; subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=True, env=env)
    assert 50_000_000 < int(done.stdout) < big
