"""Adapters read from other programs compute what those programs compute: PEFT, and the mixlora package (0.2.3) where it is installed."""

import pytest
import torch

import moeforge
from moeforge.model.adapters import forced
from moeforge.testing import foreign
from moeforge.testing.inprocess import run
from moeforge.testing.models import save_tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("oracles") / "base"
    save_tiny(path, "llama")
    return path


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(23)


def hidden(model, ids):
    """The last hidden states."""
    with torch.no_grad():
        return model.eval()(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1].float()


def close(found, wanted):
    assert wanted.isfinite().all()
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5


def imported(base, adapter, out, **more):
    return moeforge.load(
        str(run("attach", base, out, method="import", adapter=str(adapter), **more).path), dtype="float32"
    )


def dense(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.mark.parametrize("first", [False, True], ids=["today", "first-names"])
def test_mixlora_is_what_its_package_computes(base, tmp_path, first):
    package = pytest.importorskip("mixlora.model", reason="the mixlora package is not installed")
    from mixlora.config import MixLoraConfig

    torch.manual_seed(7)
    tensors = foreign.mixlora(base)
    settings = foreign.mixlora_settings(base, act_fn="silu")
    config = MixLoraConfig.from_config(settings)
    config.adapter_name_, config.dtype_ = "default", torch.float32
    theirs = dense(base)
    package.inject_adapter_in_model(theirs, config.check(), tensors)
    for layer in theirs.model.layers:  # the package keeps its experts where eval() does not reach their dropout
        for expert in layer.mlp.mixlora_moes["default"].experts_.values():
            expert.eval()
    if first:
        torch.manual_seed(7)
        tensors = foreign.mixlora(base, first=True)
        targets = [*foreign.ATTENTION, "w1_proj", "w2_proj", "w3_proj"]
        settings |= {"routing_strategy": "mixtral", "target_modules": targets}
    adapter = foreign.save(tmp_path / "a", settings, tensors, pickled=True)
    ours = imported(base, adapter, tmp_path / "out", allow_pickle=True)
    ids = torch.randint(90, (3, 17))
    wanted = hidden(theirs, ids)
    close(hidden(ours, ids), wanted)
    assert (hidden(dense(base), ids) - wanted).norm() / wanted.norm() > 1e-2


def lora(base, out, **config):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(dense(base), peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
            if "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    wrapped.save_pretrained(out)
    return wrapped.eval()


@pytest.mark.parametrize("dora", [False, True])
def test_a_lora_by_itself_is_pefts(base, tmp_path, dora):
    theirs = lora(base, tmp_path / "a", r=5, lora_alpha=9, target_modules=["q_proj", "v_proj", "up_proj"], use_dora=dora,
                  rank_pattern={"layers.1.self_attn.q_proj": 3})  # fmt: skip
    ids = torch.randint(90, (2, 13))
    close(hidden(imported(base, tmp_path / "a", tmp_path / "out"), ids), hidden(theirs, ids))


def test_a_forced_frozen_expert_is_its_peft_lora(base, tmp_path):
    made = {
        "a": lora(base, tmp_path / "a", r=3, lora_alpha=9, target_modules=["q_proj", "v_proj"]),
        "b": lora(base, tmp_path / "b", r=6, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "down_proj", "o_proj"]),
    }  # fmt: skip
    refs = tuple(f"{name}={tmp_path / name}" for name in made)
    out = run("attach", base, tmp_path / "out", method="lora-mixer", experts_from=refs)
    ours = moeforge.load(str(out.path), dtype="float32")
    assert not any(p.requires_grad for name, p in ours.named_parameters() if "lora_" in name)
    ids = torch.randint(90, (2, 13))
    for number, theirs in enumerate(made.values()):
        with forced(ours, number):
            close(hidden(ours, ids), hidden(theirs, ids))
