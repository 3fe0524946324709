"""The loop on models of our own mixtures: the same numbers as on a native model of the same function."""

import pytest
import torch

import moeforge.train.routing as routing_module
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.mixture.context import MixtureContext
from moeforge.mixture.experts.ffn import FFNExperts
from moeforge.mixture.experts.lora_ffn import LoraFFNExperts
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.low_rank import LowRank
from moeforge.mixture.router import Router
from moeforge.mixture.shared import Following, SharedRouter
from moeforge.model.runtime import mix
from moeforge.pipeline.progress import Progress
from moeforge.train.data import Document, Pool
from moeforge.train.loop import Loop, Settings, evaluate, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose
from moeforge.train.routing import find_sites

LENGTHS = [9, 30, 4, 17, 2, 25, 12, 8, 40, 3]


def corpus(seed=0, lengths=LENGTHS):
    import numpy as np

    generator = np.random.default_rng(seed)
    bodies = {f"d{i}": generator.integers(3, 61, length) for i, length in enumerate(lengths)}
    documents = tuple(Document(key, len(body), lambda key=key: key) for key, body in bodies.items())
    return [Pool(documents)], lambda document: bodies[document.key]


def bar(title, total, unit):
    return Progress("tune", "none").bar(title, total, unit, lambda: None)


def numbers(record):
    return {key: value for key, value in record.items() if key != "event"}


def mixed(tiny, **router):
    """A Llama whose FFNs are our mixtures, with the weights of the Mixtral beside it."""
    native = tiny("mixtral").double()
    like = {name: getattr(native.config, name) for name in ("rms_norm_eps", "rope_parameters")}
    model = tiny("llama", **like).double()
    entry = MixtureConfig(experts=ExpertsConfig(count=4, width=40), router=RouterConfig(**router))
    model = mix(model, [entry])
    values = native.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = name if name in values else name.replace(".router.", ".gate.")
            parameter.copy_(values[source])
    return native, model.eval()


def make(model, directory, *, select="all", shared=False, **settings):
    directory.mkdir(exist_ok=True)
    sites = find_sites(model)
    choice = choose(model, sites, select)
    options = {
        "rows": 2,
        "accumulate": 2,
        "amount": 4,
        "learning_rate": 3e-3,
        "warmup": 0.2,
        "balance": 0.5,
        "z": 0.1,
        **settings,
    }
    return Loop(model, sites, choice, Settings(**options), Packer(*corpus(), 16, 5, shared=shared), None, directory)


def test_our_mixture_trains_as_the_native_one(tiny, tmp_path):
    """Padded rows, accumulation, balance and z: the same losses and the same weights after four steps, to the float32 that the
    native router rounds its weights to."""
    native, ours = mixed(tiny)
    assert [(site.experts, site.top_k, site.scoring) for site in find_sites(ours)] == [(4, 2, "softmax")] * 2
    loops = [make(native, tmp_path / "a"), make(ours, tmp_path / "b")]
    records = [loop.run(bar).metrics.of("step") for loop in loops]
    for one, other in zip(*records, strict=True):
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-6)
    assert records[0][0]["balance"] > 1
    values = native.state_dict()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter, values[name if name in values else name.replace(".router.", ".gate.")], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_checkpointing_counts_once(tiny, tmp_path, noise):
    records = []
    for saving in (False, True):
        _, model = mixed(tiny, noise=noise, noise_scale=0.5)
        if saving:
            save_memory(model)
        torch.manual_seed(3)
        loop = make(model, tmp_path / str(saving), balance=1.0)
        records.append((loop.run(bar).metrics.of("step"), [p.detach() for p in model.parameters()]))
    for one, other in zip(records[0][0], records[1][0], strict=True):
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-9)
    for one, other in zip(records[0][1], records[1][1], strict=True):
        torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-9)


def test_padding_goes_nowhere_in_training_and_evaluation(tiny, tmp_path, monkeypatch):
    _, model = mixed(tiny)
    sites = find_sites(model)
    packer = Packer(*corpus(1, [20, 7]), 16, None, shared=False)
    real = sum(int(row.real.sum()) for row in packer.rows(repeat=False))
    counted = []
    record = MixtureContext.note
    monkeypatch.setattr(
        MixtureContext,
        "note",
        lambda self, layer, said: (counted.append(int(said.pairs.counts().sum())), record(self, layer, said)),
    )
    found = evaluate(model, sites, packer, 2, torch.device("cpu"))
    assert sum(counted) == 2 * 2 * real  # layers, K
    assert [sum(layer) for layer in found["load"]] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert len(found["entropy"]) == len(found["dead"]) == 2 and found["imbalance"] >= 1
    assert model.mixture_context.given is None


def test_a_selection_bias_moves_and_survives_a_stop(tiny, tmp_path):
    class Keeper:
        def newest(self):
            return max(tmp_path.glob("state-*"), default=None)

        def place(self, step):
            return tmp_path / f"state-{step}"

        def record(self, path, step):
            pass

    def run(amount, keeper):
        _, model = mixed(tiny, bias=True, score="sigmoid")
        loop = make(model, tmp_path / "log", bias_rate=0.1, amount=6, schedule="constant")
        loop.settings = Settings(**{**vars(loop.settings), "amount": amount})
        loop.keeper = keeper
        loop.run(bar)
        return loop

    whole = run(6, None)
    assert set(whole.biases) == {f"model.layers.{i}.mlp.router.selection_bias" for i in range(2)}
    assert torch.stack(list(whole.biases.values())).abs().max() > 0.05
    run(3, Keeper())
    rest = run(6, Keeper())
    assert all(torch.equal(rest.biases[name], bias) for name, bias in whole.biases.items())
    _, frozen = mixed(tiny, bias=True, score="sigmoid")
    assert not make(frozen, tmp_path / "frozen", select="experts").biases


def test_labels_choose_without_a_loss(tiny, tmp_path):
    dense = tiny("llama")
    entry = MixtureConfig(experts=ExpertsConfig(count=2, width=40), router=RouterConfig(kind="label", select="fixed"))
    model = mix(dense, [entry])
    loop = make(model, tmp_path / "a")
    assert not loop.scored
    model.register_forward_pre_hook(
        lambda m, args, kwargs: (args, kwargs | {"mixture_labels": kwargs["input_ids"] % 2}),
        with_kwargs=True,
        prepend=True,
    )
    records = loop.run(bar).metrics.of("step")
    assert len(records) == 4 and "balance" not in records[0]


def test_experts_are_chosen_without_the_base_they_share():
    torch.manual_seed(0)
    adapted = LoraFFNExperts(4, 6, 8, LowRank(rank=2), roles=("up", "down"), names={"up": "up", "down": "down"})
    adapted.adopt({"up": ("up", torch.nn.Linear(6, 8)), "down": ("down", torch.nn.Linear(8, 6))}, "relu")
    model = torch.nn.ModuleDict({
        "a": MixtureLayer(Router(RouterConfig(), 6, 4), adapted, name="a"),
        "b": MixtureLayer(Router(RouterConfig(), 6, 3), FFNExperts(3, 6, 8), name="b"),
    })  # fmt: skip
    choice = choose(model, find_sites(model), "experts")
    assert {name.split(".")[-1] for name in choice.params if name.startswith("a.")} == {
        "up_lora_A",
        "up_lora_B",
        "down_lora_A",
        "down_lora_B",
    }
    assert not any(p.requires_grad for p in adapted.base.parameters())
    model["b"].name = "a"
    with pytest.raises(ValueError, match="names of their own; found a, a"):
        find_sites(model)


def test_sites_that_share_a_decision_are_one_site():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            leader = SharedRouter(Router(RouterConfig(), 6, 4), "block")
            self.one, self.two = (MixtureLayer(Following(leader), FFNExperts(4, 6, 8), name=n) for n in "xy")
            leader.stand_before(self)

        def forward(self, hidden):
            return self.two(self.one(hidden))

    block = Block()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    (site,) = find_sites(block)
    assert site.name == "block" and len(site.banks) == 2
    assert choose(block, [site], "experts").size == 2 * 4 * 3 * 6 * 8
    with routing_module.watch([site], torch.tensor([[True, True, False]])) as seen:
        block(torch.randn(1, 3, 6))
    assert int(seen["block"].pairs.counts().sum()) == 4


def test_accumulation_weighs_by_real_tokens(tiny, tmp_path):
    """Two passes over two rows each, unevenly padded, are one pass over four: z is a mean over all real tokens of the step."""
    norms = []
    for rows, accumulate in ((4, 1), (2, 2)):
        _, model = mixed(tiny)
        loop = make(
            model, tmp_path / str(rows), rows=rows, accumulate=accumulate, amount=1, balance=0.0, z=30.0, clip=0.0
        )
        record = loop.run(bar).metrics.of("step")[0]
        norms.append((record["norm"], record["z"]))
    assert norms[0] == pytest.approx(norms[1], rel=1e-9)
