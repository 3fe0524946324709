"""Adapters of other programs: what is read of each format, byte for byte, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moeforge.checkpoint import lora_formats, open_checkpoint
from moeforge.checkpoint.linear_maps import linear_maps
from moeforge.checkpoint.lora_formats import frozen
from moeforge.checkpoint.lora_formats.locate import locate
from moeforge.errors import BadInput
from moeforge.testing import foreign
from moeforge.testing.models import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("formats") / "base"
    save_tiny(path, "llama")
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(11)


def read(adapter, base, **more):
    pickled = more.pop("allow_pickle", True)
    with open_checkpoint(str(base)) as opened:
        maps, config = linear_maps(opened.config, opened.tensors, opened.ref), opened.config
    return lora_formats.read(locate(str(adapter), allow_pickle=pickled), maps, config, **more)


def depth(base):
    return foreign.base_config(base)["num_hidden_layers"]


def ours(foreign_name):
    """Our name of a tensor of MixLoRA or MoE-PEFT."""
    prefix, _, rest = foreign_name.partition(".")
    name = rest
    if ".experts." in rest and prefix == "mixlora":
        module, _, member = rest.partition(".mlp.")
        projection, _, below = member.partition(".experts.")
        number, _, leaf = below.partition(".")
        name = f"{module}.mlp.experts.{number}.{projection}.{leaf}"
    return "model." + name.replace("moe_gate", "router")


def same(found, tensors, rename=ours):
    assert {rename(name) for name in tensors} == set(found.tensors)
    for name, value in tensors.items():
        held = found.tensors[rename(name)]
        assert held.shape == tuple(value.shape)
        assert held.read().tobytes() == value.numpy().tobytes(), name


def refused(adapter, base, *words, **more):
    with pytest.raises(BadInput) as caught:
        read(adapter, base, **more)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("pickled", [True, False])
def test_mixlora_tensor_for_tensor(base, tmp_path, pickled):
    tensors = foreign.mixlora(base)
    out = foreign.save(tmp_path / "a", foreign.mixlora_settings(base), tensors, pickled=pickled)
    found = read(out, base)
    same(found, tensors)
    ffn = next(entry for entry in found.entries if entry["site"] == "ffn")
    assert ffn["router"] == {"select": "topk", "top_k": 2} and ffn["experts"]["count"] == 3
    assert ffn["experts"]["options"] == {"rank": 5, "alpha": 11.0, "dropout": 0.05, "targets": ["gate", "up", "down"],
                                         "base_weight": "one"}  # fmt: skip
    plain = [entry for entry in found.entries if entry["site"] != "ffn"]
    assert {entry["site"] for entry in plain} == {"q", "k", "v", "o"}
    assert all(entry["router"]["kind"] == "always" for entry in plain)


def test_mixloras_first_names_are_the_same_adapter(base, tmp_path):
    torch.manual_seed(5)
    now = foreign.mixlora(base)
    torch.manual_seed(5)
    first = foreign.mixlora(base, first=True)
    targets = {name: True for name in (*foreign.ATTENTION, "w1_proj", "w2_proj", "w3_proj")} | {"lm_head": False}
    settings = foreign.mixlora_settings(base, routing_strategy="mixtral", target_modules=targets)
    found = read(foreign.save(tmp_path / "first", settings, first, pickled=True), base)
    other = read(foreign.save(tmp_path / "now", foreign.mixlora_settings(base), now), base)
    assert found.entries == other.entries
    same(found, now)


def test_a_lora_of_the_experts_own_is_heeded(base, tmp_path):
    tensors = foreign.mixlora(base, expert_rank=3)
    settings = foreign.mixlora_settings(base, expert_lora={"r": 3, "lora_alpha": 4, "lora_dropout": 0.0})
    found = read(foreign.save(tmp_path / "a", settings, tensors), base)
    same(found, tensors)
    options = {entry["site"]: entry["experts"]["options"] for entry in found.entries}
    assert (options["ffn"]["rank"], options["ffn"]["alpha"]) == (3, 4.0)
    assert (options["q"]["rank"], options["q"]["alpha"]) == (5, 11.0)
    assert found.notes and "expert_lora" in found.notes[0]


@pytest.mark.parametrize(
    ("more", "router"),
    [
        ({"routing_strategy": "mixlora-dynamic", "top_p": 0.7, "temperature": 0.0}, {"select": "topp", "top_p": 0.7, "renormalise": False}),
        ({"routing_strategy": "mixlora-dynamic", "jitter_noise": 0.1},
         {"select": "topp", "top_p": 0.8, "renormalise": False, "noise": "jitter", "noise_scale": 0.1}),
        ({"routing_strategy": "mixlora-switch", "expert_capacity": 8, "jitter_noise": 0.0},
         {"select": "topk", "top_k": 1, "renormalise": False}),
    ],
)  # fmt: skip
def test_the_other_routings(base, tmp_path, more, router):
    settings = foreign.mixlora_settings(base, **more)
    settings.pop("top_k")
    found = read(foreign.save(tmp_path / "a", settings, foreign.mixlora(base)), base)
    ffn = found.entries[-1]
    assert ffn["router"] == router and ffn["experts"]["options"]["base_weight"] == "paper"
    assert bool(found.warnings) == (more["routing_strategy"] == "mixlora-switch")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"routing_strategy": "mixlora-hash"}, "routing_strategy = 'mixlora-hash'"),
        ({"routing_strategy": "mixlora-dynamic", "temperature": 0.5, "top_p": 0.8}, "temperature = 0.5"),
        ({"use_dora": True}, "use_dora = True"),
        ({"task_type": "SEQ_CLS"}, "task_type = 'SEQ_CLS'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"act_fn": "relu"}, "act_fn = 'relu'"),
        ({"num_experts": 0}, "num_experts = 0"),
        ({"num_experts": "3"}, "num_experts = '3'"),
        ({"lora_alpha": float(2**80) * -1}, "lora_alpha"),
        ({"lora_dropout": 1.5}, "lora_dropout = 1.5"),
        ({"target_modules": ["q_proj", "w9_proj"]}, "w9_proj"),
        ({"target_modules": ["q_proj"]}, "none is of an FFN"),
        ({"target_modules": "all-linear"}, "target_modules = 'all-linear'"),
        ({"expert_lora": {"r": 3, "sparkle": 1}}, "expert_lora.sparkle = 1"),
        ({"sparkle": 1}, "sparkle = 1"),
        ({"r": 4}, "ask for [4, "),
        ({"num_experts": 4}, "missing"),
        ({"num_experts": 2}, "ask for [2, "),
    ],
)
def test_what_mixlora_does_not_say_rightly_is_refused(base, tmp_path, more, word):
    settings = foreign.mixlora_settings(base) | more
    refused(foreign.save(tmp_path / "a", settings, foreign.mixlora(base)), base, word)


def test_damage_is_refused_with_the_tensors_name(base, tmp_path):
    tensors, settings = foreign.mixlora(base), foreign.mixlora_settings(base)
    gone = "mixlora.layers.1.mlp.up_proj.experts.2.lora_B.weight"
    refused(
        foreign.save(tmp_path / "half", settings, {k: v for k, v in tensors.items() if k != gone}),
        base,
        gone,
        "missing",
    )
    extra = "mixlora.layers.0.mlp.gate_proj.experts.3.lora_A.weight"
    refused(foreign.save(tmp_path / "more", settings, tensors | {extra: torch.randn(5, 7)}), base, extra)
    whole = foreign.save(tmp_path / "cut", settings, tensors)
    file = whole / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(whole, base, "adapter_model.safetensors")
    integers = {k: v.to(torch.int32) if k == gone else v for k, v in tensors.items()}
    refused(foreign.save(tmp_path / "int", settings, integers), base, gone, "I32")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "adapter_config.json").write_text(json.dumps(settings))
    refused(tmp_path / "none", base, "incomplete")
    refused(tmp_path / "nowhere", base, "no such directory")


def test_pickles_need_leave_and_run_nothing(base, tmp_path):
    out = foreign.save(tmp_path / "a", foreign.mixlora_settings(base), foreign.mixlora(base), pickled=True)
    refused(out, base, "adapter_model.bin", "--allow-pickle", allow_pickle=False)
    file = out / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    refused(out, base, "adapter_model.bin", "damaged")

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"x": Evil()}, file)
    refused(out, base, "adapter_model.bin", "print")


def test_another_base_is_noticed(base, tmp_path):
    save_tiny(tmp_path / "other", "llama", hidden_size=48)
    out = foreign.save(tmp_path / "a", foreign.mixlora_settings(base), foreign.mixlora(base))
    refused(out, tmp_path / "other", "another base")


@pytest.mark.parametrize("kind", ["mola", "loramoe"])
def test_moe_peft_tensor_for_tensor(base, tmp_path, kind):
    tensors = foreign.moe_peft(base, kind)
    settings = foreign.mixlora_settings(base, peft_type=kind.upper(), routing_strategy=kind)
    if kind == "loramoe":
        settings.pop("top_k")
    found = read(foreign.save(tmp_path / "a", settings, tensors, pickled=True), base)
    same(found, tensors)
    by_site = {entry["site"]: entry for entry in found.entries}
    assert by_site["gate"]["router"]["select"] == ("topk" if kind == "mola" else "all")
    assert by_site["q"]["experts"]["count"] == (3 if kind == "mola" else 1)
    refused(foreign.save(tmp_path / "b", settings | {"top_k": 7}, tensors), base, "top_k = 7")
    refused(foreign.save(tmp_path / "c", settings | {"routing_strategy": "mixlora"}, tensors), base, "routing_strategy")


def mola_settings(base, ranks, **more):
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": ranks, "lora_alpha": 16,
            "lora_dropout": 0.05, "target_modules": [*foreign.ATTENTION, *foreign.FFN], "bias": "none", "fan_in_fan_out": False,
            "modules_to_save": None, "init_lora_weights": True, "layers_to_transform": None, "layers_pattern": None,
            "inference_mode": True, "revision": None, **more}  # fmt: skip


def of_mola(name):
    name = name.removeprefix("base_model.model.").replace("router.router", "router")
    module, half, rest = name.partition(".lora_")
    return name if not half else f"{module}.experts.{rest[2]}.lora_{rest[0]}.weight"


def test_mola_counts_its_experts(base, tmp_path):
    layers = depth(base)
    counts, ranks = [2 + i for i in range(layers)], [3 + i for i in range(layers)]
    tensors = foreign.mola(base, counts, ranks)
    out = foreign.save(tmp_path / "a", mola_settings(base, ranks), tensors, pickled=True)
    found = read(out, base)
    same(found, tensors, of_mola)
    assert found.warnings and "--top-k" in found.warnings[0]
    q = {entry["layers"][0]: entry for entry in found.entries if entry["site"] == "q"}
    assert [q[i]["experts"]["count"] for i in range(layers)] == counts
    assert [q[i]["experts"]["options"]["rank"] for i in range(layers)] == ranks
    assert not read(out, base, top_k=1).warnings
    assert {entry["router"]["top_k"] for entry in read(out, base, top_k=1).entries} == {1}
    refused(foreign.save(tmp_path / "b", mola_settings(base, [9] * layers), tensors), base, "r = 9")
    gap = {k: v for k, v in tensors.items() if "layers.0.self_attn.q_proj.lora_A_0" not in k}
    refused(foreign.save(tmp_path / "c", mola_settings(base, ranks), gap), base, "lora_A_0")


def peft_lora(base, out, **config):
    """A LoRA as PEFT itself writes it, with B that is not zero."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    wrapped.save_pretrained(out)
    return wrapped.eval()


def test_a_peft_lora_by_itself(base, tmp_path):
    peft_lora(base, tmp_path / "a", r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], rank_pattern={"layers.1.self_attn.q_proj": 5},
              alpha_pattern={"down_proj": 9}, use_rslora=True)  # fmt: skip
    found = read(tmp_path / "a", base)
    same(
        found,
        load_file(tmp_path / "a" / "adapter_model.safetensors"),
        lambda name: name.removeprefix("base_model.model."),
    )
    rows = {(e["site"], e["experts"]["options"]["rank"], e["experts"]["options"]["alpha"]) for e in found.entries}
    assert rows == {("q", 3, 7.0), ("q", 5, 7.0), ("down", 3, 9.0)}
    assert all(e["experts"]["options"]["rslora"] for e in found.entries)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"sparkle": 3}, "sparkle = 3"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"r": 4}, "ask for floating-point [4,"),
        ({"bias": "all"}, "--drop bias"),
        ({"modules_to_save": ["lm_head"]}, "--drop modules_to_save"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x'"),
        ({"target_modules": ["q_proj", "o_proj"]}, "'o_proj'"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
        ({"use_qalora": True}, "use_qalora = True"),
    ],
)
def test_what_a_peft_lora_does_not_say_rightly_is_refused(base, tmp_path, change, word):
    peft_lora(base, tmp_path / "a", r=3, target_modules=["q_proj"])
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(tmp_path / "a", base, word)


def test_what_no_expert_holds_is_left_out_by_name_only(base, tmp_path):
    peft_lora(base, tmp_path / "a", r=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    refused(tmp_path / "a", base, "--drop modules_to_save")
    found = read(tmp_path / "a", base, drop=frozenset({"modules_to_save"}))
    assert "modules_to_save" in found.warnings[0] and not any("lm_head" in name for name in found.tensors)


def frozen_of(base, *imports, **more):
    with open_checkpoint(str(base)) as opened:
        maps = linear_maps(opened.config, opened.tensors, opened.ref)
    named = [frozen.Imported(name, locate(str(path)), weight) for name, path, weight in imports]
    return frozen.experts(named, maps, {"select": "topk", "top_k": 1}, **more)


def test_frozen_experts_of_other_ranks_and_targets(base, tmp_path):
    peft_lora(base, tmp_path / "a", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    peft_lora(base, tmp_path / "b", r=5, lora_alpha=10, use_rslora=True, target_modules=["q_proj", "up_proj"])
    found = frozen_of(base, ("a", tmp_path / "a", 0.5), ("b", tmp_path / "b", 1.0))
    sites = {entry["site"]: entry["experts"]["options"] for entry in found.entries}
    assert sites["q"]["ranks"] == [3, 5] and sites["v"]["ranks"] == [3, 0] and sites["up"]["ranks"] == [0, 5]
    assert sites["q"]["rank"] == 5 and sites["q"]["frozen"] is True
    np.testing.assert_allclose(sites["q"]["scales"], [0.5 * 6 / 3, 10 / 5**0.5])
    assert sites["v"]["scales"] == [1.0, 0.0]
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    made = found.tensors["model.layers.0.self_attn.q_proj.experts.0.lora_A.weight"].read()
    theirs = stored["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].numpy()
    assert made.shape[0] == 5 and made[:3].tobytes() == theirs.tobytes() and not made[3:].any()
    assert not found.tensors["model.layers.0.mlp.up_proj.experts.0.lora_B.weight"].read().any()
    assert [row["name"] for row in found.experts] == ["a", "b"] and all(
        len(row["sha256"]) == 64 for row in found.experts
    )
    assert found.table[1]["sites"] == ["q", "up"]


def test_imports_that_are_no_experts_are_refused(base, tmp_path):
    peft_lora(base, tmp_path / "a", r=3, target_modules=["q_proj"])
    peft_lora(base, tmp_path / "d", r=3, target_modules=["q_proj"], use_dora=True)
    a, d = ("a", tmp_path / "a", 1.0), ("d", tmp_path / "d", 1.0)
    for imports, more, word in (
        ((a, a), {}, "two of the imported"),
        ((a, d), {}, "use_dora"),
        ((a,), {"share_a": True}, "--share-a"),
    ):
        with pytest.raises(BadInput, match=word):
            frozen_of(base, *imports, **more)
