"""One router for the linear maps that read one tensor: what separate routers with equal weights compute, decided and counted once."""

import copy

import pytest
import torch
from torch import nn

from moeforge.errors import BadInput
from moeforge.mixture.config import ExpertsConfig, MixtureConfig, RouterConfig
from moeforge.mixture.context import MixtureContext
from moeforge.mixture.layer import MixtureLayer
from moeforge.mixture.losses import assignments, layer_losses
from moeforge.mixture.router import Router
from moeforge.mixture.shared import Following, SharedInput
from moeforge.mixture.statistics import Statistics
from moeforge.model.adapters import forced, put
from moeforge.pipeline.progress import Progress
from moeforge.train.data import Document, Pool
from moeforge.train.loop import Loop, save_memory
from moeforge.train.packing import Packer
from moeforge.train.params import choose, frozen_in
from moeforge.train.routing import find_sites, watch
from moeforge.train.settings import Settings

SITES = {"q": 4, "k": 4, "v": 4, "o": 3, "gate": 3, "up": 3, "down": 3}
FIRST = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
LAYERS = 2
IDS = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))


def adapted(dense, dtype=torch.float32, sites=SITES, **router):
    """A frozen Llama with experts at linear maps that are not zero; what has one name has one value, whoever shares what."""
    policy = RouterConfig(**{"top_k": 2, "init_std": 0.5, "input": "shared", **router})
    model = dense.to(dtype)
    layers = tuple(range(LAYERS))
    put(
        model,
        [
            MixtureConfig(site, layers, ExpertsConfig("lora", n, options={"rank": 2}), policy)
            for site, n in sites.items()
        ],
        "test",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                seed = int.from_bytes(name.encode()[-40:], "little") % 2**31
                generator = torch.Generator().manual_seed(seed)
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return model


def keeper(name):
    """The router that a site's router is, where q, k, v and gate, up share."""
    for site, first in FIRST.items():
        name = name.replace(f".{site}.router.", f".{first}.router.")
    return name


def pair(tiny, dtype=torch.float32, **router):
    """A model whose routers are shared, and one with a router at every site, equal in what would be one."""
    one, many = adapted(tiny("llama"), dtype, **router), adapted(tiny("llama"), dtype, **{**router, "input": "site"})
    many.load_state_dict(one.state_dict(), strict=False)
    values = dict(one.named_parameters())
    with torch.no_grad():
        for name, parameter in many.named_parameters():
            parameter.copy_(values[keeper(name)])
    return one, many


def gradients(model):
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def near(found, wanted, tolerance=1e-6):
    assert bool(found.isfinite().all())
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


@pytest.mark.parametrize(
    ("dtype", "tolerance", "saving"),
    [(torch.float32, 1e-6, False), (torch.float64, 1e-13, False), (torch.float64, 1e-13, True)],
)
@pytest.mark.parametrize(
    "router",
    [{}, {"select": "all"}, {"select": "topp", "renormalise": False}, {"kind": "cosine", "train_select": "all"}],
)
def test_it_is_separate_routers_with_equal_weights_and_gradients_summed(tiny, router, dtype, tolerance, saving):
    one, many = pair(tiny, dtype, **router)
    if saving:
        save_memory(one)
    found, wanted = gradients(one.train()), gradients(many.train())
    near(found[0], wanted[0], tolerance)
    summed = {}
    for name, value in wanted[1].items():
        summed[keeper(name)] = summed.get(keeper(name), 0) + value
    assert found[1].keys() == summed.keys() and len(wanted[1]) - len(summed) == LAYERS * len(FIRST)
    for name, value in summed.items():
        near(found[1][name], value, tolerance)
        assert bool(value.any()), name


def pairs_at_experts(model):
    """Expert sites -> the list of pairs that each call handed them; filled while the model runs."""
    seen = {}
    for _, layer in model.mixtures.values():
        layer.experts.register_forward_hook(
            lambda _m, inputs, _o, name=layer.name: seen.setdefault(name, []).append(inputs[1])
        )
    return seen


def routers_called(model):
    called = []
    for name, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    return called


def test_one_decision_a_forward_pass_even_where_it_is_random(tiny):
    """Jitter makes two decisions about one tensor differ: there is one, and all sites get the very same list."""
    model = adapted(tiny("llama"), noise="jitter", noise_scale=0.9, top_k=1, renormalise=False).train()
    called, seen = routers_called(model), pairs_at_experts(model)
    torch.manual_seed(3)
    gradients(model)
    assert len(called) == len(set(called)) == LAYERS * (len(SITES) - len(FIRST))
    for site, first in FIRST.items():
        mine = [name for name in seen if name.endswith(site)]
        assert len(mine) == LAYERS
        for name in mine:
            assert seen[name][0] is seen[name.replace(site, first)][0]
    first = seen["model.layers.0.self_attn.q_proj"]
    gradients(model)
    assert not torch.equal(*(pairs.gates() > 0 for pairs in first)), "the noise does not matter, so this shows nothing"


def test_a_recomputed_block_decides_again_with_the_same_noise_and_keeps_nothing(tiny):
    results = []
    for saving in (False, True):
        model = adapted(tiny("llama"), torch.float64, noise="jitter", noise_scale=0.5).train()
        if saving:
            save_memory(model)
        called = routers_called(model)
        torch.manual_seed(5)
        results.append(gradients(model))
        assert len(called) == (1 + saving) * LAYERS * (len(SITES) - len(FIRST))
        inputs = {layer.shared_input for _, layer in model.mixtures.values()} - {None}
        assert len(inputs) == 2 * LAYERS and all(one.decided is None and one.read is None for one in inputs)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=0)
    for name, value in results[0][1].items():
        near(results[1][1][name], value, 1e-12)


def test_a_pass_that_fails_leaves_no_decision_for_the_next(tiny):
    model = adapted(tiny("llama")).eval()
    wanted = model(input_ids=IDS).logits
    block = model.model.layers[0].self_attn
    handle = block.v_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        model(input_ids=IDS.flip(0))
    handle.remove()
    assert block.q_proj.shared_input.decided is None
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, rtol=0, atol=0)


def test_the_same_tensor_twice_is_decided_twice():
    """A block that is given one tensor before and after its router has changed."""
    block, leader = two_readers()
    x = torch.randn(3, 6)
    before = block(x)
    with torch.no_grad():
        leader.router.weight.neg_()
    assert not torch.equal(block(x), before)


def test_losses_and_statistics_count_a_router_once(tiny):
    one, many = pair(tiny)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    real = int(mask.sum())
    assert [site.name for site in find_sites(one)] == [
        s.name for s in find_sites(many) if keeper(f".{s.name}.router.") == f".{s.name}.router."
    ]
    with one.mixture_context.record() as seen:
        one.eval()(input_ids=IDS, attention_mask=mask)
    with many.mixture_context.record() as apart:
        many.eval()(input_ids=IDS, attention_mask=mask)
    assert len(seen) == LAYERS * 4 and len(apart) == LAYERS * 7
    assert all(float(count.sum()) == 2 * real for count in assignments(seen).values())
    statistics = Statistics()
    statistics.add(seen)
    assert {name: row["tokens"] for name, row in statistics.as_json().items()} == dict.fromkeys(seen, real)
    terms, wanted = layer_losses(seen), layer_losses({name: apart[name] for name in seen})
    assert terms.layers == LAYERS * 4
    near(terms.balance, wanted.balance)
    assert abs(float(terms.balance - layer_losses(apart).balance)) > 1e-3, "the mean over sites is another one"


def test_a_site_is_a_router_with_the_experts_of_all_that_follow(tiny):
    model = adapted(tiny("llama"))
    sites = {site.name: site for site in find_sites(model)}
    assert len(sites) == LAYERS * 4
    assert (
        len(sites["model.layers.0.self_attn.q_proj"].banks) == 3
        and len(sites["model.layers.1.mlp.gate_proj"].banks) == 2
    )
    choice = choose(model, list(sites.values()), "routers", frozen_in(model))
    assert len(choice.params) == LAYERS * 4 and all(".router." in name for name in choice.params)
    experts = choose(adapted(tiny("llama")), find_sites(adapted(tiny("llama"))), "all")
    assert experts.size > choice.size
    both = adapted(tiny("llama"))
    chosen = choose(both, find_sites(both), "experts", frozen_in(both))
    assert len(chosen.params) == LAYERS * len(SITES) * 2 and all("lora_" in name for name in chosen.params)
    with watch(find_sites(model)) as seen:
        model.eval()(input_ids=IDS)
    assert seen.keys() == sites.keys()


def bar(title, total, unit):
    return Progress("tune", "none").bar(title, total, unit, lambda: None)


def trained(model, directory, **settings):
    directory.mkdir()
    generator = torch.Generator().manual_seed(0)
    text = {f"d{i}": torch.randint(3, 61, (n,), generator=generator).tolist() for i, n in enumerate((9, 17, 5, 12))}
    documents = tuple(Document(key, len(body), lambda: "", label=0) for key, body in text.items())
    sites = find_sites(model)
    options = Settings(**{"rows": 2, "accumulate": 2, "amount": 3, "learning_rate": 3e-3, "warmup": 0.2, "balance": 0.5, "z": 0.1, "entropy": 0.1,
                          **settings})  # fmt: skip
    packer = Packer([Pool(documents)], lambda d: text[d.key], 16, 5, shared=False)
    loop = Loop(model, sites, choose(model, sites, "all", frozen_in(model)), options, packer, None, directory)
    records = [{k: v for k, v in r.items() if k != "event"} for r in loop.run(bar).metrics.of("step")]
    return records, {name: value.detach().clone() for name, value in loop.named.items()}


def test_training_with_checkpointing_is_training_without(tiny, tmp_path):
    runs = []
    for saving in (False, True):
        model = adapted(tiny("llama"), torch.float64, noise="gumbel", noise_scale=0.5)
        if saving:
            save_memory(model)
        torch.manual_seed(3)
        runs.append(trained(model, tmp_path / str(saving)))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert other == pytest.approx(one, rel=1e-9)
    for name, value in runs[0][1].items():
        near(runs[1][1][name], value, 1e-9)


def test_decoding_with_a_cache_is_decoding_without(tiny):
    model = adapted(tiny("llama")).eval()
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > IDS.shape[1]


def test_forced_routes_are_those_of_every_site(tiny):
    one, many = pair(tiny)
    outputs = []
    for expert in (0, 2, 3):
        with forced(one, expert), forced(many, expert):
            found, wanted = (model.eval()(input_ids=IDS).logits for model in (one, many))
        near(found.detach(), wanted.detach())
        outputs.append(found)
    assert not torch.equal(outputs[0], outputs[1])


def test_a_copy_decides_for_itself(tiny):
    model = adapted(tiny("llama")).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer in other.mixtures.values():
            if isinstance(layer.router, Router):
                layer.router.weight.neg_()
    mine, theirs = model(input_ids=IDS).logits, other(input_ids=IDS).logits
    assert float((mine - theirs).detach().norm()) > 1e-3
    layer = other.model.layers[0].self_attn
    assert (
        layer.k_proj.shared_input
        is layer.q_proj.shared_input
        is not model.model.layers[0].self_attn.q_proj.shared_input
    )
    assert layer.k_proj.shared_input.leader is layer.q_proj


class TwoReaders(nn.Module):
    """`second` is given what `first` is given, or something else."""

    def __init__(self, other):
        super().__init__()
        torch.manual_seed(0)
        from moeforge.mixture.experts.ffn import FFNExperts

        policy = RouterConfig(top_k=1, renormalise=False)
        self.first = MixtureLayer(Router(policy, 6, 3), FFNExperts(3, 6, 4), name="first")
        shared = SharedInput(self.first, self)
        self.second = MixtureLayer(Following(shared), FFNExperts(3, 6, 4), name="second")
        self.first.shared_input = self.second.shared_input = shared
        self.other = other
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        return self.second(x + 1 if self.other else x) + self.first(x)


def two_readers(other=False):
    block = TwoReaders(other)
    return block, block.first


def test_the_first_that_is_asked_decides_whoever_keeps_the_router():
    block, leader = two_readers()
    context = leader.context = block.second.context = MixtureContext()
    with context.record() as seen:
        block(torch.randn(4, 6))
    assert list(seen) == ["first"] and int(seen["first"].pairs.counts().sum()) == 4


def test_sites_that_read_different_tensors_are_told():
    block, _ = two_readers(other=True)
    with pytest.raises(BadInput, match=r"second and first share a router .*different tensors.*router\.input = 'site'"):
        block(torch.randn(4, 6))


@pytest.mark.parametrize(("sites", "router", "told"), [
    ({"q": 4, "v": 3}, {}, "q and v of layer 0 share a router .* experts.count is 4 and 3"),
    ({"gate": 2, "up": 3}, {}, "gate and up of layer 0 share a router"),
    ({"q": 1}, {"kind": "always", "select": "all"}, "input = 'shared': where all tokens go one way"),
])  # fmt: skip
def test_what_cannot_share_is_told(tiny, sites, router, told):
    with pytest.raises(BadInput, match=told):
        adapted(tiny("llama"), sites=sites, **router)


def test_different_policies_cannot_share(tiny):
    entries = [MixtureConfig(site, (1,), ExpertsConfig("lora", 4, options={"rank": 2}), RouterConfig(top_k=k, input="shared"))
               for site, k in (("k", 2), ("q", 1))]  # fmt: skip
    with pytest.raises(BadInput, match=r"q and k of layer 1 share a router .* router\.top_k is 1 and 2"):
        put(tiny("llama"), entries, "test")


def test_a_site_that_nobody_shares_with_keeps_its_router(tiny):
    """k leads where q has no experts; o and down are alone; 'site' beside 'shared' is apart."""
    policy = {name: RouterConfig(input=name) for name in ("site", "shared")}
    model = tiny("llama")
    put(model, [MixtureConfig(site, layers, ExpertsConfig("lora", 4, options={"rank": 2}), policy[kind]) for site, layers, kind in
                (("v", (0, 1), "shared"), ("k", (0, 1), "shared"), ("q", (1,), "site"), ("o", (0,), "shared"))], "test")  # fmt: skip
    assert [site.name for site in find_sites(model)] == [
        "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
    ]  # fmt: skip
