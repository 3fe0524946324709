"""Many adapters in one model: a row of a mixed batch gets what its adapter alone gives it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput, UsageProblem
from moeforge.mixture.config import RouterConfig
from moeforge.mixture.joined import Joined, Part, joined_config
from moeforge.model.joining import join, labels_of
from moeforge.testing.inprocess import run
from moeforge.testing.models import save_tiny

WEIGHTS = "adapter_model.safetensors"
PUBLISHED = {
    "mixlora": ("mixlora", {"rank": 4}),
    "mixer": ("lora-mixer", {"rank": 3}),
    "plain": ("custom", {"sites": "q,v,down", "experts": "1", "rank": 5}),
}
"""Three adapters that share sites, have some inside each other's, and differ in rank, count and policy."""
POLICIES = {
    "topp": ("mixlora", {"rank": 2, "select": "topp"}),
    "null": ("mixlora", {"rank": 4, "null_experts": 1}),
    "threshold": ("custom", {"sites": "ffn,o", "experts": "3", "rank": 2, "select": "threshold", "threshold": 0.2}),
    "all": ("custom", {"sites": "q,ffn", "experts": "3", "rank": 2, "select": "all"}),
    "cosine": ("custom", {"sites": "q,o", "experts": "4", "rank": 3, "router": "cosine"}),
    "by_depth": ("mola", {"rank": 2}),
    "llava": ("llava-mole", {"rank": 2, "alpha": 5.0, "rslora": True}),
    "one_ffn": ("custom", {"sites": "ffn", "experts": "1", "rank": 2}),
    "share_a": ("custom", {"sites": "q,v", "experts": "3", "rank": 2, "share_a": True}),
    "one_router": ("mola", {"rank": 2, "router_input": "shared"}),
    "one_for_qv": ("custom", {"sites": "q,v,ffn", "experts": "3", "rank": 2, "router_input": "shared"}),
}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """`make(base, name, method, **options)`: an adapter whose tensors are all away from where they start."""
    where = tmp_path_factory.mktemp("adapters")

    def go(base, name, method, **options):
        path = run("attach", base, where / f"{base.name}-{name}", method, verify=False, **options).path
        random = torch.Generator().manual_seed(len(name) + 31 * len(list(where.iterdir())))
        values = load_file(path / WEIGHTS)
        for key, value in values.items():
            value += (0.5 if "router" in key else 0.1) * torch.randn(value.shape, generator=random)
        save_file(values, path / WEIGHTS)
        return path

    return go


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: save_tiny(root / family, family) for family in ("llama", "qwen3", "gpt2")}


def joined(base, refs, dtype="float32"):
    opened = {name: open_checkpoint(str(ref)) for name, ref in refs.items()}
    return join(open_checkpoint(str(base)), opened, dtype=dtype)


def batch(rows, seed=0):
    """Prompts of different lengths behind padding, and their mask."""
    ids = torch.randint(3, 190, (rows, 9), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(9) >= (torch.arange(rows) % 4).unsqueeze(-1)).long()
    return ids * mask, mask


def check_rows(base, refs):
    """Logits, greedy tokens and beams of every row of a batch for all adapters and the base."""
    model = joined(base, refs)
    names = [*refs, None, *reversed(refs)]
    ids, mask = batch(len(names))
    labels = labels_of(model, names)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)  # as `generate` counts them behind padding
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, mixture_labels=labels).logits
    made = {
        beams: model.generate(ids, attention_mask=mask, mixture_labels=labels, num_beams=beams, **how)
        for beams in (1, 3)
    }
    plain = moeforge.load(str(base), dtype="float32")
    for row, name in enumerate(names):
        alone = plain if name is None else moeforge.load(str(refs[name]), dtype="float32")
        own, start = ids[row : row + 1, mask[row].argmax() :], int(mask[row].argmax())
        with torch.no_grad():
            wanted, without = alone(input_ids=own).logits[0], plain(input_ids=own).logits[0]
        torch.testing.assert_close(
            logits[row, start:], wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()), msg=str
        )
        assert name is None or (wanted - without).abs().max() > 1e-2 * wanted.abs().max(), name
        for beams, found in made.items():
            only = alone.generate(own, attention_mask=torch.ones_like(own), num_beams=beams, **how)
            assert torch.equal(found[row, 9 : 9 + only.shape[1] - own.shape[1]], only[0, own.shape[1] :]), (name, beams)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_of_a_mixed_batch_are_what_each_adapter_alone_gives(family, bases, make):
    refs = {name: make(bases[family], name, method, **options) for name, (method, options) in PUBLISHED.items()}
    check_rows(bases[family], refs)


def test_a_map_inside_a_plain_network_is_reached_where_the_network_has_experts_too(bases, make):
    """GPT-2's network is mounted at its first map, where the other adapter's experts stand."""
    refs = {
        "whole": make(bases["gpt2"], "whole", "mixlora", rank=4),
        "maps": make(bases["gpt2"], "maps", "custom", sites="qkv,up,down", experts="2", rank=3),
    }
    check_rows(bases["gpt2"], refs)


def test_every_policy_is_joined_with_every_other(bases, make):
    check_rows(
        bases["llama"], {name: make(bases["llama"], name, m, **options) for name, (m, options) in POLICIES.items()}
    )


@pytest.mark.parametrize("sites", ["q,v", "ffn"])
def test_magnitudes_beside_adapters_without_them(sites, bases, make):
    refs = {
        "dora": make(bases["llama"], f"dora-{sites}", "custom", sites=sites, experts="2", rank=3, dora=True),
        "lora": make(bases["llama"], f"lora-{sites}", "custom", sites=sites, experts="3", rank=2),
    }
    check_rows(bases["llama"], refs)


def test_magnitudes_of_one_adapter_do_not_round_another_in_bfloat16(bases, make):
    """A ratio of norms that are held in bfloat16 is off by up to 0.4 %."""
    refs = {
        "dora": make(bases["llama"], "dora-bf16", "custom", sites="q,down", experts="2", rank=3, dora=True),
        "lora": make(bases["llama"], "lora-bf16", "custom", sites="q,down", experts="2", rank=2),
    }
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = []
    for names in (["dora", "lora"], ["lora"]):
        model = joined(bases["llama"], {name: refs[name] for name in names}, "bfloat16")
        model.mixture_context.begin(labels=torch.full((7,), names.index("lora")))
        layer = next(layer for site, layer in model.mixtures.values() if site.kind == "down")
        found.append(layer(x).float())
    assert (found[0] - found[1]).norm() < 1e-4 * found[1].norm()


def test_routers_of_one_policy_are_one_router(bases, make):
    refs = {name: make(bases["llama"], name, "mixlora", rank=4) for name in ("one", "two")}
    model = joined(bases["llama"], refs)
    layers = [layer for site, layer in model.mixtures.values() if site.kind == "ffn"]
    assert layers and all(len(layer.router.parts) == 1 for layer in layers)
    assert all(layer.router.parts[0].config.by_label == (8, 8) for layer in layers)
    plain = [layer for site, layer in model.mixtures.values() if site.kind == "q"]
    assert plain and all(layer.router.parts[0].config.select == "fixed" for layer in plain)


def test_plain_adapters_decide_once_a_pass_for_all_sites_that_are_alike(bases, make, monkeypatch):
    refs = {
        "one": make(bases["llama"], "one-of-two", "custom", sites="q,v", experts="1", rank=3),
        "two": make(bases["llama"], "two-of-two", "custom", sites="q,down", experts="1", rank=2),
    }
    model = check_rows(bases["llama"], refs)
    decided = []
    plain = Joined._decide
    monkeypatch.setattr(Joined, "_decide", lambda self, *given: decided.append(self) or plain(self, *given))
    ids, mask = batch(3)
    layers = len({site.layer for site, _ in model.mixtures.values()})
    assert layers > 1 and len(model.mixtures) == 3 * layers
    for turn, names in enumerate((["one", "two", None], ["two", "two", "one"]), 1):
        model(input_ids=ids, attention_mask=mask, mixture_labels=labels_of(model, names))
        assert len(decided) == 3 * turn  # q has both adapters, v and down one each


def test_decoding_with_a_cache_is_decoding_without_and_a_static_one_too(bases, make):
    refs = {name: make(bases["llama"], f"cache-{name}", method, **o) for name, (method, o) in PUBLISHED.items()}
    model = joined(bases["llama"], refs)
    ids, mask = batch(4)
    given = {"attention_mask": mask, "mixture_labels": labels_of(model, ["mixer", None, "plain", "mixlora"])}
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, use_cache=False, **given, **how)
    assert torch.equal(model.generate(ids, **given, **how), wanted)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(ids, **static, **given, **how), wanted)


def test_a_dense_model_in_memory_takes_adapters_and_nothing_in_it_learns(bases, make):
    ref = make(bases["llama"], "memory", "mixlora", rank=2)
    dense = moeforge.load(str(bases["llama"]), dtype="float32")
    ids, _ = batch(3)
    wanted = dense(input_ids=ids).logits
    model = join(dense, {"it": open_checkpoint(str(ref))})
    assert model.adapters == ("it",) and not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(input_ids=ids, mixture_labels=labels_of(model, [None] * 3)).logits, wanted)
    assert (model(input_ids=ids, mixture_labels=labels_of(model, ["it"] * 3)).logits - wanted).abs().max() > 1e-2


def test_a_pass_that_names_no_adapter_and_a_name_that_is_none_are_refused(bases, make):
    model = joined(bases["llama"], {"it": make(bases["llama"], "named", "mixlora", rank=2)})
    ids, _ = batch(2)
    with pytest.raises(BadInput, match=r"pass mixture_labels, \[B, 1\] or \[B, T\]"):
        model(input_ids=ids)
    with pytest.raises(UsageProblem, match="no adapter is called 'that'; there are it"):
        labels_of(model, ["it", "that"])
    with pytest.raises(UsageProblem, match="no adapters"):
        join(open_checkpoint(str(bases["llama"])), {})
    with model.mixture_context.forcing(0), pytest.raises(BadInput, match="forced route, 0"):
        model(input_ids=ids, mixture_labels=labels_of(model, ["it", None]))
    with pytest.raises(ValueError, match="mixture_lables"):
        model.generate(ids, mixture_lables=labels_of(model, ["it", None]))


def test_adapters_of_two_bases_are_refused(bases, make, tmp_path):
    other = save_tiny(tmp_path / "other", "llama", seed=5)
    refs = {"one": make(bases["llama"], "mine", "mixlora", rank=2), "two": make(other, "theirs", "mixlora", rank=2)}
    with pytest.raises(BadInput, match=r"adapter 'two': .* is made for .*other, not for .*llama"):
        joined(bases["llama"], refs)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda e: e["router"].update(causal=False), "router.causal = false"),
        (lambda e: e["router"].update(scale_at="input", top_k=1), "scale_at = 'input'"),
        (lambda e: e["router"].update(by_label=[4, 4]), "reads labels"),
        (
            lambda e: e["router"].update(renormalise=False) or e["experts"]["options"].update(base_weight="paper"),
            "'paper'",
        ),
    ],
)
def test_what_depends_on_more_than_the_token_and_its_adapter_is_refused(change, told, bases, make):
    path = make(bases["llama"], f"bad-{told[:12]}", "mixlora", rank=2)
    settings = json.loads((path / "adapter_config.json").read_text())
    change(next(entry for entry in settings["mixtures"] if entry["site"] == "ffn"))
    (path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=f"adapter 'bad': .*{told}.*; load it by itself"):
        joined(bases["llama"], {"bad": path})


def test_magnitudes_around_experts_inside_are_refused(bases, make):
    refs = {
        "dora": make(bases["llama"], "around", "custom", sites="ffn", experts="2", rank=3, dora=True),
        "maps": make(bases["llama"], "inside", "custom", sites="up", experts="2", rank=3),
    }
    with pytest.raises(
        BadInput, match=r"adapter 'dora' has experts with magnitudes .* adapter 'maps' has experts at .*up_proj"
    ):
        joined(bases["llama"], refs)


def test_the_base_counts_once_where_the_paper_says_the_sum_of_gates_and_that_is_one(bases, make):
    refs = {"paper": make(bases["llama"], "paper", "mixlora", rank=2, base_weight="paper"),
            "one": make(bases["llama"], "notpaper", "mixlora", rank=2)}  # fmt: skip
    check_rows(bases["llama"], refs)


def test_the_parts_of_a_router_must_have_the_experts_of_the_mixture():
    config = joined_config([Part((0, 1), (2, 3), RouterConfig(by_label=(2, 3)))])
    assert RouterConfig.from_json(config.as_json()) == config
    assert Joined(config, 4, 5).parts[0].experts == 5
    with pytest.raises(BadInput, match="have 5 experts, the mixture 6"):
        Joined(config, 4, 6)
    with pytest.raises(BadInput, match="expected objects with owners, counts and router"):
        Joined(RouterConfig(kind="joined", select="all", options={"parts": [{"owners": [0]}]}), 4, 1)
    choosing = RouterConfig(select="expert_choice", top_k=1, causal=False)
    with pytest.raises(BadInput, match="'expert_choice': experts would choose among the tokens of all adapters"):
        Joined(joined_config([Part((0,), (2,), choosing)]), 4, 2)


def test_no_tokens_are_joined_too():
    parts = [Part((0,), (2,), RouterConfig()), Part((1,), (1,), RouterConfig(kind="label", select="fixed"))]
    router = Joined(joined_config(parts), 4, 3)
    pairs = router(torch.empty(0, 4), labels=torch.empty(0, dtype=torch.long)).pairs
    assert pairs.tokens == 0 and pairs.experts == 3 and pairs.slots == 2
