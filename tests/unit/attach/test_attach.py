"""The verb on small models of every family: what it plans, writes, proves and refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.checkpoint import open_checkpoint
from moeforge.errors import BadInput, GateRefused, MoeforgeError, UsageProblem
from moeforge.testing.conformance import check_stage
from moeforge.testing.inprocess import plan, run
from moeforge.testing.models import save_tiny
from moeforge_attach.design import entries, settle
from moeforge_attach.methods.custom import Custom
from moeforge_attach.methods.mixlora import MixLoRA
from moeforge_attach.methods.mola import MoLA
from moeforge_attach.options import Options

METHODS = ("mixlora", "mola", "llava-mole", "lora-mixer", "custom")
FLOATS = ("top_p", "threshold", "sparsity", "jitter", "temperature", "dropout")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("attach") / "base"
    save_tiny(path, "llama")
    return path


def words(more):
    """`--top-k 3 --no-verify` as the runner takes it."""
    found, name = {}, None
    for word in more:
        if word.startswith("--"):
            no, name = word.startswith("--no-"), word.removeprefix("--no-").removeprefix("--").replace("-", "_")
            found[name] = not no
        else:
            found[name] = int(word) if word.isdecimal() and name not in ("experts", "layers") else word
    return {key: float(v) if key in FLOATS else v for key, v in found.items()}


def attach(base, out, *more):
    return run("attach", base, out, **{"rank": 4, **words(more)})


def adapter(base, out, *more):
    return attach(base, out, *more).path


def refused(base, out, *more):
    with pytest.raises(MoeforgeError) as caught:
        attach(base, out, *more)
    assert "\n" not in str(caught.value) and not out.exists()
    return caught.value


@pytest.mark.parametrize("method", METHODS)
def test_conforms(method, base, tmp_path):
    check_stage("attach", base, ["--rank", "3"], tmp_path, method=method)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["mixlora", "mola", "lora-mixer"])
def test_step_0_is_the_base_in_every_family(family, method, tmp_path):
    save_tiny(tmp_path / "base", family)
    out = adapter(tmp_path / "base", tmp_path / "out", "--method", method)
    verdicts = json.loads((out / "moeforge.json").read_text())["verdicts"]
    assert verdicts["verified"] and not verdicts["failed"]
    assert verdicts["measured"]["step_0_relative_error"] <= 1e-5
    assert verdicts["measured"]["forced_relative_error"] <= 1e-5
    assert verdicts["measured"]["tensors_reached"] == verdicts["measured"]["tensors_learning"] > 0
    ids = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(3))
    model, dense = moeforge.load(str(out), dtype="float32"), moeforge.load(str(tmp_path / "base"), dtype="float32")
    torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


def test_the_base_is_not_copied_and_names_are_pefts_where_it_is_plain_lora(base, tmp_path):
    out = adapter(base, tmp_path / "out")
    tensors = load_file(out / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert "base_model.model.model.layers.0.mlp.experts.7.gate_proj.lora_B.weight" in tensors
    assert "base_model.model.model.layers.0.mlp.router.weight" in tensors
    assert not any(name.endswith("_proj.weight") for name in tensors)
    b = [value for name, value in tensors.items() if ".lora_B." in name]
    assert b and not any(value.any() for value in b)
    a = [value for name, value in tensors.items() if ".lora_A." in name]
    assert all(value.any() for value in a) and len({value.flatten()[0].item() for value in a}) == len(a), (
        "each drawn anew"
    )


def test_same_seed_same_bytes_and_layers_do_not_depend_on_each_other(base, tmp_path):
    first, again, other = (adapter(base, tmp_path / name, *more, "--no-verify") for name, more in
                           (("a", ()), ("b", ()), ("c", ("--seed", "1"))))  # fmt: skip
    one, two, three = (load_file(path / "adapter_model.safetensors") for path in (first, again, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not any(torch.equal(one[name], three[name]) for name in one if "lora_A" in name)
    few = load_file(adapter(base, tmp_path / "d", "--layers", "1", "--no-verify") / "adapter_model.safetensors")
    assert few and all(torch.equal(one[name], few[name]) for name in few)


def test_experts_by_layer_and_single_experts_are_plain(base, tmp_path):
    out = adapter(base, tmp_path / "out", "--method", "mola", "--experts", "1,2,3", "--no-verify")
    tensors = load_file(out / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.{}"
    assert name.format(0, "lora_A.weight") in tensors and name.format(0, "router.weight") not in tensors
    assert tensors[name.format(1, "router.weight")].shape[0] == 2
    assert (
        name.format(2, "experts.2.lora_A.weight") in tensors
        and name.format(2, "experts.3.lora_A.weight") not in tensors
    )
    manifest = json.loads((out / "moeforge.json").read_text())
    assert manifest["counts"]["experts_by_layer"]["q"] == [1, 2, 3]


@pytest.mark.parametrize("policy", [
    ("--select", "topp", "--top-p", "0.4"), ("--select", "threshold", "--threshold", "0.2"), ("--select", "sparsegen", "--sparsity", "0.4"), ("--select", "all"), ("--select", "label"),
    ("--top-k", "1", "--gate-scale", "prob", "--no-renormalise"), ("--router", "cosine"), ("--router", "static"), ("--null-experts", "2"),
    ("--jitter", "0.1"), ("--temperature", "2"), ("--dora",), ("--rslora",), ("--dropout", "0.1"), ("--base-weight", "paper"),
    ("--router-init", "zero"), ("--experts", "3", "--top-k", "3"),
])  # fmt: skip
def test_every_policy_starts_as_the_base_and_learns_everywhere(policy, base, tmp_path):
    out = adapter(base, tmp_path / "out", *policy)
    verdicts = json.loads((out / "moeforge.json").read_text())["verdicts"]
    assert verdicts["verified"] and not verdicts["failed"], verdicts


def test_gates_that_do_not_sum_to_one_shrink_the_frozen_network_only_as_the_paper_has_it(base, tmp_path):
    ids = torch.arange(12).view(2, 6)
    want = moeforge.load(str(base), dtype="float32")(input_ids=ids).logits
    for weight, same in (("one", True), ("paper", False)):
        out = adapter(
            base, tmp_path / weight, "--select", "topp", "--top-p", "0.3", "--base-weight", weight, "--no-verify"
        )
        found = moeforge.load(str(out), dtype="float32")(input_ids=ids).logits
        assert (bool((found - want).norm() <= 1e-5 * want.norm())) is same


def test_custom_sites(base, tmp_path):
    out = adapter(
        base, tmp_path / "out", "--method", "custom", "--sites", "q,down", "--plain", "v", "--share-a", "--experts", "3"
    )
    tensors = load_file(out / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].ndim == 2
    assert "base_model.model.model.layers.0.mlp.down_proj.experts.2.lora_B.weight" in tensors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["--experts", "4", "--top-k", "5"], UsageProblem, "--top-k 5 is more than --experts 4"),
        (["--layers", "9"], UsageProblem, "layers 0 to 2"),
        (["--method", "custom", "--sites", "head"], UsageProblem, "'head' is no site"),
        (["--method", "custom", "--sites", "in"], BadInput, "none of the sites in"),
        (["--method", "custom", "--share-a"], UsageProblem, "--share-a is for experts at linear maps"),
        (["--gate-scale", "straight_through", "--top-k", "1"], BadInput, "renormalised, is 1"),
        (["--select", "topp", "--top-p", "0"], BadInput, "top_p = 0"),
    ],
)
def test_refusals(options, error, message, base, tmp_path):
    found = refused(base, tmp_path / "out", *options)
    assert type(found) is error and message in str(found)


def test_mixtures_and_adapters_are_no_base(base, tmp_path):
    out = adapter(base, tmp_path / "out", "--no-verify")
    moe = run("upcycle", base, tmp_path / "moe", experts=4, verify=False).path
    for src, message in ((out, "has mixtures already"), (moe, "mixture of experts already")):
        assert message in str(refused(src, tmp_path / "again"))


def test_a_plan_needs_no_bytes(base, tmp_path):
    facts = plan("attach", base).facts
    assert facts["experts_by_layer"]["ffn"] == [8, 8, 8]
    assert facts["parameters_trainable"] == facts["parameters_adapter"] == facts["write_bytes"] // 4


def test_the_proof_can_fail(base, tmp_path, monkeypatch):
    """Each of its parts, with the thing broken that it is there for."""
    import moeforge_attach.start as start
    import moeforge_attach.verify as verify
    from moeforge.mixture.experts.lora import LoraExperts

    def attempt():
        error = refused(base, tmp_path / "out", "--method", "mola", "--rank", "2")
        assert type(error) is GateRefused
        return str(error)

    real = start.values_of
    with monkeypatch.context() as patch:
        patch.setattr(
            start,
            "values_of",
            lambda model: {n: v + 0.1 if n.endswith("lora_B.weight") else v for n, v in real(model).items()},
        )
        found = attempt()
        assert "step 0 is not the base" in found
    with monkeypatch.context() as patch:
        patch.setattr(LoraExperts, "_scale", lambda self: -torch.tensor(self.scales))
        found = attempt()
        assert "PEFT" in found
    with monkeypatch.context() as patch:
        patch.setattr(
            LoraExperts, "forward", lambda self, x, pairs: self.base(x) + 0 * self.lora_B.sum() + self.lora_A.sum() * 0
        )
        assert "PEFT" in attempt()
    real_values = verify.values_of
    with monkeypatch.context() as patch:
        patch.setattr(verify, "values_of", lambda model: {n: v * 1.01 for n, v in real_values(model).items()})
        found = attempt()
        assert "saved and loaded" in found
    assert not (tmp_path / "out").exists()


def test_damaged_adapters_are_refused(base, tmp_path):
    out = adapter(base, tmp_path / "out", "--no-verify")
    file, settings = out / "adapter_model.safetensors", out / "adapter_config.json"
    tensors, config = load_file(file), json.loads(settings.read_text())

    def damaged(message):
        with pytest.raises(BadInput, match=message):
            open_checkpoint(str(out))

    first = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != first}, file)
    damaged("is missing")
    save_file({**tensors, "base_model.model.extra": torch.ones(3)}, file)
    damaged("holds base_model.model.extra")
    save_file({**tensors, first: torch.ones(3, 5)}, file)
    damaged("another base")
    save_file(tensors, file)
    settings.write_text(json.dumps(config | {"surprise": 1}))
    damaged("unknown key 'surprise'")
    settings.write_text(json.dumps(config | {"format_version": 2}))
    damaged("format_version = 2")
    settings.write_text(json.dumps(config | {"base_shapes_sha256": "sha256:00"}))
    damaged("another base")
    settings.write_text(json.dumps(config))
    with open_checkpoint(str(out)) as whole:
        assert np.isfinite(whole.read(first.removeprefix("base_model.model."))).all()
    file.write_bytes(file.read_bytes()[:-10])
    damaged("adapter_model.safetensors")


def test_methods_count_as_their_papers_do():
    """Trainable parameters of Llama-2-7B's shapes: 203.4 M for MixLoRA's template (D 4096, F 11008, 32 layers)."""
    from moeforge.checkpoint.adapter_layout import shapes_of
    from moeforge.checkpoint.linear_maps import LinearMap

    sizes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096), "gate": (4096, 11008), "up": (4096, 11008),
             "down": (11008, 4096)}  # fmt: skip
    maps = {(role, layer): LinearMap(role, layer, f"layers.{layer}.{'mlp' if role in ('gate', 'up', 'down') else 'attn'}.{role}", i, o, False)
            for layer in range(32) for role, (i, o) in sizes.items()}  # fmt: skip

    def total(method, options):
        stage = Options()
        found = entries(settle(method().design(stage, options), stage), stage, maps, "x")
        return sum(int(np.prod(s)) for s in shapes_of([e.as_json() for e in found], maps, "x").values())

    assert abs(total(MixLoRA, MixLoRA.Options()) / 203.4e6 - 1) < 0.01
    mola = sum(5 * 8 * (i + o) for i, o in sizes.values()) * 32
    routers = sum(5 * i for i, _ in sizes.values()) * 32
    assert total(MoLA, MoLA.Options()) == mola + routers
    assert total(Custom, Custom.Options(sites="q")) == 32 * (8 * 8 * 2 * 4096 + 8 * 4096)


@pytest.mark.parametrize("family", ["MambaConfig", "FalconMambaConfig"])
def test_state_space_mixers(family, tmp_path):
    """Experts at the map into the mixer; in training the one that leads out is read by a fused function, past any module there."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, family)(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=4, expand=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    out = adapter(tmp_path / "base", tmp_path / "out", "--method", "lora-mixer")
    manifest = json.loads((out / "moeforge.json").read_text())
    assert manifest["counts"]["experts_by_layer"] == {"in": [6] * 4}
    verdicts = manifest["verdicts"]
    assert verdicts["verified"] and not verdicts["failed"] and verdicts["measured"]["forced_relative_error"] <= 1e-5
    assert verdicts["measured"]["tensors_reached"] == verdicts["measured"]["tensors_learning"] == 4 * 3, "A, B, router"


def test_a_model_that_sees_routes_images_and_text_and_no_padding(tmp_path):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=95)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    out = adapter(tmp_path / "base", tmp_path / "out", "--method", "llava-mole")
    model = moeforge.load(str(out), dtype="float32")
    ids = torch.randint(1, 90, (2, 9))
    ids[:, 2:6] = 95  # four patches
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), model.mixture_context.record() as seen:
        found = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    dense = moeforge.load(str(tmp_path / "base"), dtype="float32")
    want = dense(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert len(seen) == 3
    for routing in seen.values():
        assert int(routing.pairs.counts().sum()) == 16, (
            "every image and text token has one expert, the two of padding none"
        )
