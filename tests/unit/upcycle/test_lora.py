"""Adapters of LoRA experts written out as whole experts: what stock transformers makes of the result is the adapter's own function."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.errors import BadInput, GateRefused, UsageProblem
from moeforge.model import merged_experts
from moeforge.testing.conformance import check_stage
from moeforge.testing.inprocess import plan, run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(71)


@pytest.fixture
def attach(dense, tmp_path):
    """attach(family or base, method, **options) -> an adapter whose values are nowhere zero, its routers strong enough to choose."""

    def make(base, method="mixlora", name="adapter", **more):
        base = dense(base) if isinstance(base, str) else base
        path = run("attach", base, tmp_path / name, method=method, **{"rank": 3, "verify": False, **more}).path
        values = {}
        for name, value in load_file(path / WEIGHTS).items():
            noise = torch.randn_like(value)
            small = noise / 2 if ".router." in name else noise / 8
            values[name] = value * (1 + 0.3 * noise) if name.endswith("magnitude_vector") else small
        save_file(values, path / WEIGHTS)
        (path / "moeforge.json").unlink()  # the digests are those of other values
        return path

    return make


@pytest.fixture
def agree(logits):
    """agree(adapter, directory): the stock model's logits are the adapter's to 1e-5, and the base's are not."""

    def check(adapter, directory, ours=False):
        wanted = of(adapter)
        if ours:
            found, loading = of(directory), {}
        else:
            found, loading, _ = logits(directory)
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert not loading
        scale = wanted.abs().max()
        assert float((found - wanted).abs().max() / scale) <= 1e-5
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))
        assert float((of(base) - wanted).abs().max() / scale) > 1e-2

    return check


def of(directory):
    """What our own loading of it answers to the ids of the fixture `logits`."""
    model = moeforge.load(str(directory), dtype="float32", attention="eager")
    ids = torch.randint(0, 199, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def edit(adapter, change):
    """`change` every mixture of an adapter's config."""
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text())
    for entry in settings["mixtures"]:
        change(entry)
    path.write_text(json.dumps(settings))


def at_ffn(**router):
    return lambda entry: entry["router"].update(router) if entry["site"] == "ffn" else None


TARGETS = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "granite": "granitemoe",
}
METHODS = {
    "mixlora": {"experts": "4", "top_k": 2},
    "llava-mole": {"experts": "3"},
    "custom": {"sites": "ffn", "plain": "q", "experts": "4", "select": "all"},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", TARGETS)
def test_the_written_mixture_is_the_adapter(family, method, attach, agree, tmp_path):
    adapter = attach(family, method, **METHODS[method])
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    config = json.loads((done.path / "config.json").read_text())
    assert config["model_type"] == TARGETS[family]
    verdicts = done.manifest["verdicts"]
    assert verdicts["exact"] and verdicts["verified"] and verdicts["measured"]["exact"]
    assert done.manifest["parents"][0]["format"] == "lora experts"
    agree(adapter, done.path)


OPTIONS = {
    "dora": {"dora": True, "experts": "3"},
    "rslora": {"rslora": True, "alpha": 7.0, "experts": "3"},
    "temperature": {"temperature": 0.4, "experts": "4"},
    "no attention": {"attention": False, "experts": "4", "top_k": 3},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_an_adapter_may_say(case, attach, agree, tmp_path):
    adapter = attach("llama", **OPTIONS[case])
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    assert done.manifest["verdicts"]["exact"]
    agree(adapter, done.path)


def test_weights_that_do_not_sum_to_one_stay_as_they_are(attach, agree, tmp_path):
    adapter = attach("qwen3", experts="4", top_k=2, renormalise=False, base_weight="paper")
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    assert json.loads((done.path / "config.json").read_text())["norm_topk_prob"] is False
    agree(adapter, done.path)
    with pytest.raises(BadInput, match="mixtral always makes the top-k weights sum to one"):
        plan("upcycle", attach("llama", name="other", renormalise=False, base_weight="paper"), "lora", target="mixtral")


def test_sigmoid_scores_find_a_layout_that_has_them(attach, agree, tmp_path):
    adapter = attach("llama", experts="4", top_k=2)
    edit(adapter, at_ffn(score="sigmoid"))
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    assert json.loads((done.path / "config.json").read_text())["model_type"] == "glm4_moe"
    agree(adapter, done.path)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_layers_without_experts_stay_dense(family, attach, agree, tmp_path):
    adapter = attach(family, experts="3", layers="1")
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    names = load_file(done.path / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.1.mlp.experts.2.up_proj.weight" in names
    agree(adapter, done.path)


def test_a_table_with_one_expert_in_some_layers_merges_it_there(attach, agree, tmp_path):
    adapter = attach("qwen3", experts="4,1,4")
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    assert done.manifest["verdicts"]["exact"]
    agree(adapter, done.path)


@pytest.mark.parametrize("family", ["gemma", "phi3", "gpt2", "gpt_neox"])
def test_our_own_layout_holds_every_family(family, attach, agree, tmp_path):
    adapter = attach(family, experts="3")
    done = run("upcycle", adapter, tmp_path / "moe", "lora", target="moeforge", verify=True)
    mixtures = json.loads((done.path / "config.json").read_text())["mixtures"]
    assert [m["experts"]["type"] for m in mixtures] == ["ffn"] and done.manifest["verdicts"]["exact"]
    agree(adapter, done.path, ours=True)


def test_experts_of_other_ranks_and_scales(attach, agree, tmp_path):
    adapter = attach("llama", experts="3")

    def ranks(entry):
        if entry["site"] == "ffn":
            entry["experts"]["options"] |= {"ranks": [3, 1, 0], "scales": [0.5, -2.0, 1.5]}

    edit(adapter, ranks)
    values = load_file(adapter / WEIGHTS)
    for name, value in values.items():
        at = next((e for e in (1, 2) if f".experts.{e}." in name), 0)
        if at:
            kept = 2 - at  # the others are padding
            (value[kept:] if ".lora_A." in name else value[:, kept:]).zero_()
    save_file(values, adapter / WEIGHTS)
    done = run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    agree(adapter, done.path)


def test_a_sixteen_bit_base_says_that_it_rounds(attach, dense, agree, tmp_path):
    run("export", dense("llama"), tmp_path / "short", to="hf", type="bf16")
    adapter = attach(tmp_path / "short", experts="3")
    found = plan("upcycle", adapter, "lora")
    assert not found.verdicts["exact"] and "rounded in BF16" in found.verdicts["why_inexact"]
    rounded = run("upcycle", adapter, tmp_path / "rounded", "lora", verify=True).manifest["verdicts"]
    assert rounded["verified"] and 1e-5 < rounded["measured"]["relative_error"] < 0.1
    done = run("upcycle", adapter, tmp_path / "moe", "lora", dtype="f32", verify=True)
    assert done.manifest["verdicts"]["exact"]
    agree(adapter, done.path)


def test_conforms(attach, tmp_path):
    check_stage("upcycle", attach("llama", experts="3"), [], tmp_path, method="lora")


@pytest.mark.parametrize("wrong", ["sign", "expert"])
def test_the_proof_fails_where_an_expert_is_not_the_adapters(wrong, attach, monkeypatch, tmp_path):
    adapter = attach("llama", experts="3")
    product = merged_experts.MergedExperts._product

    def other(self, name, delta, scale, *more):
        if delta.expert == 2 and "layers.1.mlp.down" in name and wrong == "sign":
            scale = -scale
        if delta.expert == 2 and "layers.1.mlp.down" in name and wrong == "expert":
            first = next(d for d in merged_experts.deltas_of(self.adapter)[name] if d.expert == 0)
            return product(self, name, first, scale, *more)
        return product(self, name, delta, scale, *more)

    monkeypatch.setattr(merged_experts.MergedExperts, "_product", other)
    with pytest.raises(GateRefused, match="first differing layer 1"):
        run("upcycle", adapter, tmp_path / "moe", "lora", verify=True)
    assert not (tmp_path / "moe").exists()


REFUSED = {
    "linear sites": ("mola", {}, "no site ffn with several experts"),
    "linear sites beside ffn": ("custom", {"sites": "ffn,q"}, "site 'q' of layers .*--merge --expert N"),
    "different E": ("mixlora", {"experts": "2,3,3"}, r"layers \[1, 2\] have 2 of 3 experts.*layers \[0\] 2 of 2"),
    "top-p": ("mixlora", {"select": "topp"}, "router.select = 'topp': .*has 'topk' or 'all'.*export --to hf"),
    "labels": ("custom", {"select": "label"}, "router.kind = 'label'"),
    "null experts": ("mixlora", {"null_experts": 1}, "router.null_experts = 1"),
    "frozen counts once": ("mixlora", {"renormalise": False}, "renormalise = false with base_weight = 'one'"),
    "weights of one": ("mixlora", {"gate_scale": "none"}, "gate_scale = 'none' with 2 experts a token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_native_mixture_says_is_refused_in_one_line(case, attach):
    method, options, words = REFUSED[case]
    adapter = attach("llama", method, **options)
    with pytest.raises(BadInput, match=words) as caught:
        plan("upcycle", adapter, "lora")
    assert "\n" not in str(caught.value) and str(adapter) in str(caught.value)


def test_options_that_the_adapter_decides(attach, dense):
    adapter = attach("llama", experts="3")
    for options, words in (
        ({"experts": 4}, "--experts 4, but .* has 3"),
        ({"top_k": 1}, "--top-k 1, but .* visits 2"),
        ({"layers": "0"}, "--layers 0: .* decides that"),
        ({"router_init": "zero"}, "--router-init zero: .* decides that"),
        ({"norm_topk": False}, "--norm-topk False: .* decides that"),
    ):
        with pytest.raises(UsageProblem, match=words):
            plan("upcycle", adapter, "lora", **options)
    with pytest.raises(BadInput, match="--method lora is for adapters"):
        plan("upcycle", dense("llama"), "lora")
    with pytest.raises(BadInput, match="--method copy takes dense checkpoints; --method lora makes"):
        plan("upcycle", adapter, "copy")
    with pytest.raises(BadInput, match="mixtral cannot have just these layers sparse"):
        plan("upcycle", attach("llama", name="other", layers="1"), "lora", target="mixtral")
