"""Adapters of LoRA experts in other programs' forms and back, byte for byte; what a form cannot hold is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import moeforge
from moeforge.errors import BadInput, MoeforgeError
from moeforge.model.adapters import forced
from moeforge.testing import foreign
from moeforge.testing.inprocess import run
from moeforge.testing.models import save_tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "base"
    save_tiny(path, "llama")
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(31)


def attach(base, out, method, **more):
    """An adapter of ours, with values that are nowhere zero."""
    path = run("attach", base, out, method=method, verify=False, **more).path
    values = {name: torch.randn_like(value) / 8 for name, value in load_file(path / WEIGHTS).items()}
    save_file(values, path / WEIGHTS)
    (path / "moeforge.json").unlink()  # the digests are those of other values
    return path


def imported(base, adapter, out, **more):
    return run("attach", base, out, method="import", adapter=str(adapter), allow_pickle=True, verify=False, **more).path


def export(adapter, out, to, **more):
    return run("export", adapter, out, to=to, **more).path


def pickled(directory):
    return torch.load(directory / "adapter_model.bin", weights_only=True)


def equal(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].numpy().tobytes() == value.numpy().tobytes() and found[name].shape == value.shape, name


def entries(directory):
    return json.loads((directory / "adapter_config.json").read_text())["mixtures"]


def by_layer(directory):
    """(site, layer) -> what stands there."""
    return {(e["site"], i): (e["experts"]["count"], e["experts"]["options"].get("rank"), e["experts"]["options"].get("alpha"), e["router"])
            for e in entries(directory) for i in e["layers"]}  # fmt: skip


def refused(adapter, out, to, *words):
    with pytest.raises(MoeforgeError) as caught:
        export(adapter, out, to)
    text = str(caught.value)
    assert "\n" not in text and not out.exists()
    for word in words:
        assert word in text, text


FOREIGN = {
    "mixlora": lambda base: (foreign.mixlora_settings(base), foreign.mixlora(base), "mixlora"),
    "own-rank": lambda base: (
        foreign.mixlora_settings(base, expert_lora={"r": 3, "lora_alpha": 4, "lora_dropout": 0.1}),
        foreign.mixlora(base, expert_rank=3),
        "mixlora",
    ),
    "switch": lambda base: (
        {k: v for k, v in foreign.mixlora_settings(base, routing_strategy="mixlora-switch").items() if k != "top_k"},
        foreign.mixlora(base),
        "moe-peft",
    ),
    "dynamic": lambda base: (
        {k: v for k, v in foreign.mixlora_settings(base, routing_strategy="mixlora-dynamic", top_p=0.6).items() if k != "top_k"},
        foreign.mixlora(base),
        "moe-peft",
    ),
    "mola": lambda base: (
        foreign.mixlora_settings(base, peft_type="MOLA", routing_strategy="mola", use_rslora=True),
        foreign.moe_peft(base, "mola"),
        "moe-peft",
    ),
    "loramoe": lambda base: (
        {k: v for k, v in foreign.mixlora_settings(base, peft_type="LORAMOE", routing_strategy="loramoe").items() if k != "top_k"},
        foreign.moe_peft(base, "loramoe"),
        "moe-peft",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_theirs_to_ours_to_theirs(base, tmp_path, name):
    settings, tensors, to = FOREIGN[name](base)
    theirs = foreign.save(tmp_path / "theirs", settings, tensors, pickled=True)
    back = export(imported(base, theirs, tmp_path / "ours"), tmp_path / "back", to)
    equal(pickled(back), tensors)
    written = json.loads((back / "adapter_config.json").read_text())
    differs = {key for key in settings.keys() | written.keys() if settings.get(key) != written.get(key)}
    # what a config leaves out is written; Switch's capacity is none here; the base is named as it was found
    assert differs <= {"act_fn", "temperature", "expert_capacity", "jitter_noise", "base_model_name_or_path"}
    again = imported(base, back, tmp_path / "again")
    equal(load_file(again / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS))
    assert entries(again) == entries(tmp_path / "ours")


def test_first_mixlora_comes_back_under_todays_names(base, tmp_path):
    torch.manual_seed(3)
    now = foreign.mixlora(base)
    torch.manual_seed(3)
    targets = [*foreign.ATTENTION, "w1_proj", "w2_proj", "w3_proj"]
    settings = foreign.mixlora_settings(base, routing_strategy="mixtral", target_modules=targets)
    theirs = foreign.save(tmp_path / "theirs", settings, foreign.mixlora(base, first=True), pickled=True)
    equal(pickled(export(imported(base, theirs, tmp_path / "ours"), tmp_path / "back", "mixlora")), now)


def test_mola_and_back(base, tmp_path):
    layers = foreign.base_config(base)["num_hidden_layers"]
    counts, ranks = [1 + i for i in range(layers)], [3 + i for i in range(layers)]
    tensors = foreign.mola(base, counts, ranks)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": ranks, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none",
                "target_modules": [*foreign.ATTENTION, *foreign.FFN], "base_model_name_or_path": str(base)}  # fmt: skip
    ours = imported(base, foreign.save(tmp_path / "theirs", settings, tensors, pickled=True), tmp_path / "ours")
    back = export(ours, tmp_path / "back", "mola")
    equal(pickled(back), tensors)
    again = imported(base, back, tmp_path / "again")
    equal(load_file(again / WEIGHTS), load_file(ours / WEIGHTS))
    assert entries(again) == entries(ours)


@pytest.mark.parametrize(
    ("method", "to", "more"),
    [
        ("mixlora", "mixlora", {"rank": 5, "experts": "3", "dropout": 0.05}),
        (
            "mixlora",
            "mixlora",
            {"rank": 3, "experts": "3", "select": "topp", "renormalise": False, "base_weight": "paper"},
        ),
        ("mola", "mola", {"rank": 3, "experts": "2,3,4"}),
        ("mola", "moe-peft", {"rank": 3, "experts": "3"}),
        ("custom", "peft", {"rank": 3, "sites": "q,down,gate", "experts": "1", "rslora": True}),
        ("custom", "peft", {"rank": 3, "sites": "ffn", "experts": "1", "dora": True}),
    ],
)
def test_ours_to_theirs_to_ours(base, tmp_path, method, to, more):
    ours = attach(base, tmp_path / "ours", method, **more)
    theirs = export(ours, tmp_path / "theirs", to)
    again = imported(base, theirs, tmp_path / "again")
    equal(load_file(again / WEIGHTS), load_file(ours / WEIGHTS))
    assert by_layer(again).keys() == by_layer(ours).keys()
    for place, (count, rank, alpha, router) in by_layer(ours).items():
        found = by_layer(again)[place]
        assert found[:3] == (count, rank, alpha)
        same = {k: v for k, v in router.items() if k != "init_std"}
        assert {k: v for k, v in found[3].items() if k != "init_std"} == same


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits.float()


def close(found, wanted):
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5


def peft_model(base, directory):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), directory)


@pytest.mark.parametrize("more", [{}, {"rslora": True}, {"dora": True}])
def test_every_expert_as_a_lora_is_that_expert_forced(base, tmp_path, more):
    ours = attach(base, tmp_path / "ours", "mixlora", rank=4, experts="3", **more)
    loras = export(ours, tmp_path / "loras", "peft-experts")
    model, ids = moeforge.load(str(ours), dtype="float32"), torch.randint(90, (2, 11))
    for e in range(3):
        with forced(model, e):
            close(logits(peft_model(base, loras / f"expert-{e}"), ids), logits(model, ids))


def test_imported_loras_come_back_as_they_were(base, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    made = {"math": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
            "code": {"r": 5, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}}  # fmt: skip
    for name, config in made.items():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))
        wrapped.save_pretrained(tmp_path / name)
    refs = tuple(f"{name}={tmp_path / name}" for name in made)
    ours = run("attach", base, tmp_path / "ours", method="lora-mixer", experts_from=refs).path
    loras = export(ours, tmp_path / "loras", "peft-experts")
    for name in made:
        equal(load_file(loras / name / WEIGHTS), load_file(tmp_path / name / WEIGHTS))
        found, wanted = (json.loads((at / name / "adapter_config.json").read_text()) for at in (loras, tmp_path))
        assert sorted(found["target_modules"]) == sorted(wanted["target_modules"])
        assert (found["r"], found["lora_alpha"]) == (wanted["r"], wanted["lora_alpha"])


@pytest.mark.parametrize(
    ("method", "to", "more", "words"),
    [
        ("mixlora", "mixlora", {"null_experts": 1}, ("router.null_experts", "= 1")),
        ("mixlora", "mixlora", {"temperature": 2.0}, ("router.temperature", "2.0")),
        ("mixlora", "mixlora", {"dora": True}, ("options.dora", "True")),
        ("mixlora", "mixlora", {"experts": "2,3,4"}, ("experts.count", "3")),
        ("mixlora", "mixlora", {"layers": "0"}, ("layers of site", "[0]")),
        ("mixlora", "mixlora", {"alpha": 2.5}, ("options.alpha", "2.5")),
        ("mixlora", "mixlora", {"select": "threshold", "threshold": 0.1}, ("router.select", "'threshold'")),
        ("mixlora", "mixlora", {"select": "topp", "renormalise": False}, ("options.base_weight", "'one'")),
        ("mola", "mixlora", {"experts": "3"}, ("site", "--to mola")),
        ("mixlora", "mola", {}, ("site", "--to mixlora")),
        ("lora-mixer", "moe-peft", {}, ("router.train_select", "'all'")),
        ("mixlora", "peft", {}, ("experts.count", "--to peft-experts")),
        ("mola", "peft-experts", {"experts": "2,3,4"}, ("experts.count", "3")),
        ("custom", "peft-experts", {"experts": "1"}, ("router.kind", "'always'")),
        ("custom", "mixlora", {"experts": "1"}, ("experts.count", "1")),
        ("custom", "mola", {"sites": "q", "plain": "v"}, ("site", "'v'")),
        ("custom", "peft", {"sites": "q", "experts": "1", "plain": "v", "null_experts": 0, "dropout": 0.0}, None),
    ],
)
def test_what_a_form_cannot_hold_is_refused_by_name(base, tmp_path, method, to, more, words):
    ours = attach(base, tmp_path / "ours", method, **{"rank": 3, **more})
    if words is None:
        export(ours, tmp_path / "out", to)
    else:
        refused(ours, tmp_path / "out", to, *words)


def test_only_adapters_of_ours_go_to_such_forms(base, tmp_path):
    with pytest.raises(BadInput, match="--to mixlora is for adapters"):
        export(base, tmp_path / "out", "mixlora")


def test_the_same_bytes_again(base, tmp_path):
    ours = attach(base, tmp_path / "ours", "mixlora", rank=3, experts="2")
    one, two = (export(ours, tmp_path / name / "out", "mixlora") for name in "ab")
    for file in ("adapter_model.bin", "adapter_config.json"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
